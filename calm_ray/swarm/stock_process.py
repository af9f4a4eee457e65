"""The averaging process of one kind of round on hivemind's wire: find a group, all-reduce, say how it went.

hivemind's averager with another course of a round. Stock's `_step` waits for its trigger after a search that found
nobody, retries without a word, and tells the trainer no more than who was there. `rpc_download_state` is left out: the
training state is served elsewhere (`roster.py`), and a bare peer must not take gradients for it.
"""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe

# hivemind tells a stream by typing's alias, and only by that.
from typing import Any, AsyncIterator  # noqa: UP035

import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.allreduce import AveragingMode
from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.load_balancing import load_balance_peers
from hivemind.p2p import P2PContext
from hivemind.proto import averaging_pb2
from hivemind.utils import get_dht_time
from hivemind.utils.asyncio import as_aiter, azip

from calm_ray.swarm.limits import RoundLimits
from calm_ray.swarm.node import Swarm
from calm_ray.swarm.stock_reduce import CheckedRunner, ReduceReport, Traffic
from calm_ray.swarm.verdict import Outcome

logger = logging.getLogger(__name__)

HANG_UP_SECONDS = 0.5
"""How long we leave a stream open for a bare peer, who waits for its end. Ours hang up themselves."""
RETRY_SECONDS = 0.2
DROP_SECONDS = 1.0
"""For a round that nobody waits for any more to come to its end. It does not if the DHT process has died."""
POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class RoundRequest:
    """What the peer wants of its averaging process. Times are `time.monotonic()`, which all processes here share."""

    number: int
    epoch: int
    search_until: float
    deadline: float
    limits: RoundLimits


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The group stands; now the process wants our tensors."""

    group_size: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How the round ended."""

    outcome: Outcome
    detail: str = ""
    group_size: int = 0
    report: ReduceReport | None = None
    traffic: Traffic = field(default_factory=Traffic)


class NoAnswerError(Exception):
    """The averaging process did not answer: `outcome` is "timeout" or "failed"."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.outcome, self.detail = outcome, detail


@dataclass(frozen=True, kw_only=True)
class _Search:
    """What hivemind's matchmaking asks of its StepControl, which is shared memory and futures between processes."""

    scheduled_time: float
    deadline: float
    data_for_gather: bytes

    def get_timeout(self) -> float:
        return max(0.0, self.deadline - float(get_dht_time()))


class StockProcess(DecentralizedAverager):
    """Made and asked by the peer's main process; its coroutines run in the forked one."""

    rpc_download_state = None

    def __init__(
        self, swarm: Swarm, *, prefix: str, tensors: Sequence[torch.Tensor], codec: Any, limits: RoundLimits,
        max_weight: float,
    ) -> None:  # fmt: skip
        super().__init__(
            tensors, swarm.dht, start=False, prefix=prefix, compression=codec, client_mode=swarm.is_client_mode,
            allow_state_sharing=False, min_matchmaking_time=limits.matchmaking_seconds,
            request_timeout=_request_timeout(limits),
        )  # fmt: skip
        self._max_weight = max_weight
        self._replies, self._reply = Pipe(duplex=False)
        self._round: asyncio.Task[None] | None = None
        self._number = self._num_serving = 0
        self._serve_until = 0.0
        self._traffic = Traffic()

    # --- in the main process -----------------------------------------------------------------------------------------

    def tell(self, method: str, *args: Any) -> None:
        """Have the averaging process call its coroutine `method`."""
        self._outer_pipe.send((method, args, {}))

    def answer(self, number: int, *, until: float) -> Standing | Verdict:
        """Wait for what the process says next about round `number`; NoAnswerError if it does not by `until`."""
        while True:
            if self._replies.poll(max(0.0, min(POLL_SECONDS, until - time.monotonic()))):
                about, said = self._replies.recv()
                if about == number:
                    assert isinstance(said, Standing | Verdict)
                    return said
            elif not self.is_alive():
                raise NoAnswerError("failed", f"the averaging process has ended (exit code {self.exitcode})")
            elif time.monotonic() >= until:
                raise NoAnswerError("timeout", "the averaging process did not answer in time")

    def close(self, *, linger_seconds: float) -> None:
        """End the process, but let groupmates fetch first what we have averaged for them (P13)."""
        self._inner_pipe.send(("_SHUTDOWN", None))  # ends a thread that hivemind keeps in this process
        if self.is_alive():
            self.tell("_shutdown", linger_seconds)
            self.join(linger_seconds + 2 * DROP_SECONDS)
        for end in (self.terminate, self.kill):
            if self.is_alive():
                end()
                self.join(DROP_SECONDS)

    # --- in the averaging process ------------------------------------------------------------------------------------

    def run(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # stock sets this in the main process, which then ignores Ctrl-C
        super().run()

    async def begin(self, request: RoundRequest) -> None:
        await self._drop_round()
        self._number = request.number
        self._contribution: asyncio.Future[tuple[float, bool]] = asyncio.get_running_loop().create_future()
        self._round = asyncio.create_task(self._run_round(request))

    async def contribute(self, number: int, weight: float, is_reader: bool) -> None:
        """Our tensors are in the shared memory: go."""
        if number == self._number and not self._contribution.done():
            self._contribution.set_result((weight, is_reader))

    async def abandon(self, number: int) -> None:
        if number == self._number:
            await self._drop_round()

    async def _drop_round(self) -> None:
        if self._round is not None:
            self._round.cancel()
            await asyncio.wait({self._round}, timeout=DROP_SECONDS)
            self._round = None

    async def _run_round(self, request: RoundRequest) -> None:
        self._pending_groups_registered.clear()
        try:
            group = await self._find_group(request)
            if group is None:
                verdict = await self._without_group()
            else:
                self._reply.send((request.number, Standing(group_size=group.group_size)))
                async with asyncio.timeout(request.deadline - time.monotonic()):
                    weight, is_reader = await self._contribution
                verdict = await self._all_reduce(group, request, weight=weight, is_reader=is_reader)
        except TimeoutError:
            verdict = Verdict(outcome="timeout", detail="our own tensors came too late")
        except Exception as exc:
            logger.exception("all-reduce failed")
            verdict = Verdict(outcome="failed", detail=str(exc) or type(exc).__name__)
        finally:
            self._pending_groups_registered.set()  # groupmates that called early are waiting for it
        self._reply.send((request.number, replace(verdict, traffic=self._traffic)))
        self._traffic.sent = self._traffic.received = 0

    async def _find_group(self, request: RoundRequest) -> GroupInfo | None:
        matchmaking, limits = self._matchmaking, request.limits
        matchmaking.request_timeout = _request_timeout(limits)
        for part in (matchmaking, matchmaking.potential_leaders):
            part.min_matchmaking_time = limits.matchmaking_seconds
        now = get_dht_time()
        gathered = [self.bandwidth, self.mode.value, self.serializer.dumps(request.epoch)]
        search = _Search(
            scheduled_time=now + limits.matchmaking_seconds,
            deadline=now + max(0.0, request.search_until - time.monotonic()),
            data_for_gather=self.serializer.dumps(gathered),
        )
        while search.get_timeout() > 0:
            try:
                return await matchmaking.look_for_group(search)
            except Exception as exc:  # noqa: BLE001  a groupmate that failed in any way: look for others
                logger.warning("matchmaking failed, trying again: %r", exc)
                await asyncio.sleep(RETRY_SECONDS)
        return None

    async def _without_group(self) -> Verdict:
        keys = self._matchmaking.group_key_manager
        others = {peer for peer, _ in await keys.get_averagers(keys.current_key, only_active=False)} - {self.peer_id}
        if not others:
            return Verdict(outcome="alone", detail="nobody else was looking for a group")
        return Verdict(outcome="timeout", detail=f"{len(others)} others were looking, but no group came about")

    async def _all_reduce(self, group: GroupInfo, request: RoundRequest, *, weight: float, is_reader: bool) -> Verdict:
        bandwidths, modes, told = zip(*map(self.serializer.loads, group.gathered), strict=True)
        with self._register_allreduce_group(group), self._released(group.group_id):
            # Stock's function: everyone must come to the same split, bare peers too.
            shares = [
                0.0 if AveragingMode(mode) == AveragingMode.CLIENT else bandwidth
                for bandwidth, mode in zip(bandwidths, modes, strict=True)
            ]
            fractions = await asyncio.get_running_loop().run_in_executor(
                None, load_balance_peers, self.total_size, shares, 0
            )
            runner = CheckedRunner(
                p2p=self._p2p, servicer_type=type(self), prefix=self.prefix, tensors=self._averaged_tensors,
                group_id=group.group_id, ordered_peer_ids=group.peer_ids, peer_fractions=fractions, weight=weight,
                is_reader=is_reader, max_weight=self._max_weight, compression=self.allreduce_kwargs["compression"],
                part_size_bytes=self.allreduce_kwargs["part_size_bytes"],
                sender_timeout=request.limits.chunk_seconds, reducer_timeout=2 * request.limits.chunk_seconds,
                traffic=self._traffic,
            )  # fmt: skip
            self._running_groups[group.group_id].set_result(runner)
            seconds = max(0.0, min(request.limits.round_seconds, request.deadline - time.monotonic()))
            self._serve_until = time.monotonic() + seconds
            try:
                async with asyncio.timeout(seconds):
                    async for tensor, update in azip(as_aiter(*self._averaged_tensors), runner):
                        tensor.add_(update)
            except TimeoutError:
                detail = f"all-reduce not done within {seconds:.1f} s"
                return Verdict(outcome="timeout", detail=detail, group_size=group.group_size, report=runner.report())
        report = runner.report()
        outcome, detail = report.judge()
        strangers = sorted({e for e in map(self.serializer.loads, told) if isinstance(e, int)} - self._near(request))
        if outcome == "averaged" and strangers:
            outcome, detail = "failed", f"we are at epoch {request.epoch}, others at {strangers}"
        return Verdict(outcome=outcome, detail=detail, group_size=group.group_size, report=report)

    def _near(self, request: RoundRequest) -> set[int]:
        """Epochs that may be averaged with ours. Only our peers tell theirs with gradients, all do with the state."""
        return {request.epoch}

    @contextlib.contextmanager
    def _released(self, group_id: bytes) -> Any:
        """Groupmates wait for the runner; if there will be none, they must not wait any longer."""
        try:
            yield
        finally:
            self._running_groups[group_id].cancel()  # does nothing to one that is there

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        """As stock, but open until the caller has everything.

        When a handler ends, libp2p's daemon resets the stream, and what is still under way is lost (see `desk.py`).
        """
        self._num_serving += 1
        try:
            async for answer in super().rpc_aggregate_part(stream, context):
                yield answer
            await asyncio.sleep(HANG_UP_SECONDS)
        finally:
            self._num_serving -= 1

    async def _shutdown(self, timeout: float) -> None:
        await self._drop_round()
        until = min(time.monotonic() + timeout, self._serve_until)  # later, nobody waits for us any more
        while self._num_serving and time.monotonic() < until:
            await asyncio.sleep(POLL_SECONDS)
        if not self.client_mode:
            with contextlib.suppress(Exception):  # a daemon that has died has no handlers
                await asyncio.wait_for(self.remove_p2p_handlers(self._p2p, namespace=self.prefix), DROP_SECONDS)


class GradientAverager(StockProcess):
    """Averages gradients, weighted by samples. Named as stock's, for the name is part of the wire."""

    def _near(self, request: RoundRequest) -> set[int]:
        return {request.epoch - 1, request.epoch, request.epoch + 1}


class TrainingStateAverager(StockProcess):
    """Averages parameters, everyone with weight 1. Named as stock's, for the name is part of the wire."""


def _request_timeout(limits: RoundLimits) -> float:
    """hivemind's matchmaking can deadlock if this is longer than the matchmaking itself."""
    return min(limits.request_seconds, limits.matchmaking_seconds / 2)
