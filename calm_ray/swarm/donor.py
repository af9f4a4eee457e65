"""Hand the training state to newcomers, beside nothing else: averaging comes first, and few are served at a time.

The class carries the name of hivemind's averager, because names are part of RPC handles: newcomers of either kind can
then download from us.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable

# hivemind tells a stream by typing's alias, and only by that.
from typing import AsyncIterator  # noqa: UP035

from hivemind.compression import CompressionInfo, NoCompression
from hivemind.p2p import P2P, P2PContext, ServicerBase
from hivemind.proto import averaging_pb2
from hivemind.utils import MSGPackSerializer
from hivemind.utils.streaming import split_for_streaming

from calm_ray.swarm.holder import HeldState
from calm_ray.swarm.roster import state_prefix

logger = logging.getLogger(__name__)

MAX_DOWNLOADS = 2
"""At a time. Others are sent away with an empty answer, and ask another donor or come again."""
MAX_SECONDS = 600.0
STALL_SECONDS = 30.0
"""Whoever takes longer in all, or nothing for so long, is given up: there are few places, and each holds a state."""
MAX_WAIT_SECONDS = 20.0
"""For an all-reduce of ours to end, before the state or between two of its tensors; then we send all the same."""
HANG_UP_SECONDS = 3.0
"""Whoever has everything hangs up; hivemind's own peers wait for us to. See `Desk.rpc_part` for why we wait."""


class TrainingStateAverager(ServicerBase):
    """Serves `snapshot()`; `pause` before averaging, `resume` after it and after each step, from any thread."""

    def __init__(self, snapshot: Callable[[], HeldState | None]) -> None:
        self._snapshot = snapshot
        self._num_downloads = 0
        self._is_averaging = threading.Event()
        self._cached: HeldState | None = None
        self._lock = threading.Lock()

    async def serve(self, p2p: P2P, *, run_id: str) -> None:
        await self.add_p2p_handlers(p2p, namespace=state_prefix(run_id))

    def pause(self) -> None:
        self._is_averaging.set()

    def resume(self) -> None:
        """Downloads go on, new ones with the state as it is now."""
        self._is_averaging.clear()
        with self._lock:
            self._cached = None

    async def rpc_download_state(
        self, _request: averaging_pb2.DownloadRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.DownloadData]:
        """As hivemind's: metadata with the first message, then tensor after tensor; nothing at all if we cannot."""
        if self._num_downloads >= MAX_DOWNLOADS:
            return
        self._num_downloads += 1
        started, loop, task = time.monotonic(), asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        stall: asyncio.TimerHandle | None = None
        try:
            await self._wait_for_averaging()
            state = await loop.run_in_executor(None, self._copy)
            if state is None:
                return
            header = {
                "epoch": state.epoch, "group_bits": "", "optimizer_metadata": state.optimizer_metadata,
                "num_tensors": len(state.tensors),
            }  # fmt: skip
            metadata: bytes | None = MSGPackSerializer.dumps(header)
            for index, tensor in enumerate(state.tensors):
                await self._wait_for_averaging()
                info = CompressionInfo.from_tensor(tensor, key=index)
                packed = await loop.run_in_executor(None, NoCompression().compress, tensor, info)
                for part in split_for_streaming(packed):
                    if time.monotonic() > started + MAX_SECONDS:
                        return
                    stall = loop.call_later(STALL_SECONDS, task.cancel)
                    yield averaging_pb2.DownloadData(tensor_part=part, metadata=metadata)
                    stall.cancel()
                    metadata = None
            logger.info(
                "state sent to=%s epoch=%d seconds=%.1f", context.remote_id, state.epoch, time.monotonic() - started
            )
            await asyncio.sleep(HANG_UP_SECONDS)
        finally:
            self._num_downloads -= 1
            if stall is not None:
                stall.cancel()

    async def _wait_for_averaging(self) -> None:
        deadline = time.monotonic() + MAX_WAIT_SECONDS
        while self._is_averaging.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    def _copy(self) -> HeldState | None:
        with self._lock:  # downloads at the same time share one copy
            if self._cached is None:
                self._cached = self._snapshot()
            return self._cached
