"""Download a run's training state without owning a model: for the monitor, which only writes it down.

The state is what `TrainingStateAverager` serves: parameters in the optimizer's order, then the optimizer's tensors. It
is decoded with msgpack and hivemind's tensor codecs, nothing is unpickled; sizes and time are bounded.
"""

import asyncio
import logging
import math
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hivemind.compression import deserialize_torch_tensor
from hivemind.p2p import P2P, PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils import MSGPackSerializer
from hivemind.utils.streaming import combine_from_streaming

from calm_ray.errors import StateUnavailable
from calm_ray.swarm.donor import TrainingStateAverager
from calm_ray.swarm.holder import HeldState
from calm_ray.swarm.node import Swarm
from calm_ray.swarm.roster import parse_roster, state_prefix

logger = logging.getLogger(__name__)

CHUNK_TIMEOUT_SECONDS = 30.0
"""A donor in the middle of averaging answers only after it, so this is longer than a chunk on a slow line."""


@dataclass(frozen=True, kw_only=True)
class TrainingState(HeldState):
    """One peer's state as it was when it began to send."""

    donor: str


def download_state(
    swarm: Swarm, *, min_epoch: int, max_bytes: int, timeout_seconds: float, only_from: str | None = None,
    avoid: Collection[str] = (), check: Callable[[TrainingState], None] = lambda state: None,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> TrainingState:  # fmt: skip
    """Ask donors, auxiliary peers first; StateUnavailable with what each said if none gives a usable state.

    `max_bytes` bounds what a donor may send in all, `timeout_seconds` the whole download from one donor. `only_from`
    names the one donor to ask, `avoid` some not to ask. `check` raises to refuse a state: a donor that claims the
    newest epoch and sends rubbish is asked first each time, and must not keep us from the others. `on_progress` gets
    the bytes that one donor has sent so far.
    """
    problems = []
    for donor in _donors(swarm, only_from=only_from):
        if donor in avoid:
            continue
        try:
            download = partial(
                _download, donor=PeerID.from_base58(donor), run_id=swarm.run_id, max_bytes=max_bytes,
                on_progress=on_progress,
            )  # fmt: skip
            state = swarm.call(download, timeout_seconds=timeout_seconds)
            check(state)
        except Exception as exc:  # noqa: BLE001  one donor's failure of any kind: ask the next
            problems.append(f"{donor}: {str(exc) or type(exc).__name__}")
            logger.warning("state refused or not sent: %s", problems[-1])
            continue
        if state.epoch >= min_epoch:
            return state
        problems.append(f"{donor}: only at epoch {state.epoch}")
    raise StateUnavailable(f"no state of epoch {min_epoch} or later: {'; '.join(problems) or 'no peer offers one'}")


def _donors(swarm: Swarm, *, only_from: str | None) -> list[str]:
    """Newest epoch first; at one epoch auxiliary peers first, who compute nothing; else at random."""
    entries = swarm.get(f"{state_prefix(swarm.run_id)}.all_averagers")
    holders = parse_roster(entries, own_peer_id=swarm.peer_id)
    order = {peer: (h.epoch, h.is_auxiliary, secrets.randbits(16)) for peer, h in holders.items()}
    return sorted((p for p in order if only_from in (None, p)), key=order.__getitem__, reverse=True)


async def _download(
    p2p: P2P, *, donor: PeerID, run_id: str, max_bytes: int, on_progress: Callable[[int], None]
) -> TrainingState:
    stub = TrainingStateAverager.get_stub(p2p, donor, namespace=state_prefix(run_id))
    stream = aiter(await stub.rpc_download_state(averaging_pb2.DownloadRequest()))
    metadata: dict[str, Any] | None = None
    parts: list[Any] = []
    tensors: list[torch.Tensor] = []
    received, num_missing_chunks = 0, 0
    while metadata is None or num_missing_chunks or len(tensors) + 1 < metadata.get("num_tensors", math.inf):
        try:
            message = await asyncio.wait_for(anext(stream), CHUNK_TIMEOUT_SECONDS)
        except StopAsyncIteration:
            break
        received += message.ByteSize()
        on_progress(received)
        if received > max_bytes:
            raise ValueError(f"sends more than the {max_bytes} bytes that this model can have")
        if message.metadata:
            metadata = MSGPackSerializer.loads(message.metadata)
        if message.tensor_part.dtype and parts:  # a dtype marks the first part of the next tensor
            tensors.append(deserialize_torch_tensor(combine_from_streaming(parts)))
            parts = []
        parts.append(message.tensor_part)
        num_missing_chunks = (message.tensor_part.chunks or num_missing_chunks) - 1
    if parts:
        tensors.append(deserialize_torch_tensor(combine_from_streaming(parts)))
    if not isinstance(metadata, dict) or not isinstance(metadata.get("epoch"), int):
        raise ValueError("sent no state")
    return TrainingState(
        donor=str(donor), epoch=metadata["epoch"], optimizer_metadata=list(metadata["optimizer_metadata"]),
        tensors=tensors,
    )  # fmt: skip
