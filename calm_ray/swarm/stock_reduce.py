"""One all-reduce on hivemind's wire, with every part checked: what stock hivemind 1.1.12 sends, believed less.

Stock adds up whatever arrives (a NaN, a weight of 1e9, one element for a whole part), divides by a total weight of
zero, waits for nothing to say so, and calls the round a success. Here a part that cannot be right bans its sender
before it is counted, an average that cannot be right counts as missing, and the runner can say how it went.

A peer that brings nothing *reads*: it sends one zero of weight 0 for each part, and stock reducers answer with the
whole averaged part, for torch broadcasts. Stock's own auxiliary mode was rejected: bare peers lose it on the way, wait
for tensors that never come, and ban the sender after their chunk timeout in each round.
"""

import asyncio
import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

# hivemind tells a stream by typing's alias, and only by that.
from typing import Any, AsyncIterator  # noqa: UP035

import torch
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.averaging.partition import (
    AllreduceException,
    BannedException,
    TensorPartContainer,
    TensorPartReducer,
)
from hivemind.compression import deserialize_torch_tensor
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils.asyncio import aiter_with_timeout, amap_in_executor, attach_event_on_finished

from calm_ray.swarm.verdict import Outcome

MAX_MAGNITUDE = 65504.0
"""Largest number in 16 bits. A gradient or parameter beyond it is no use to anyone, and would be cut off on the way."""

MAX_CAUSES = 4


def flaw_of(tensor: torch.Tensor, *, limit: float = MAX_MAGNITUDE) -> str:
    """Why these numbers must not be averaged; empty if they may."""
    largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
    if not math.isfinite(largest):
        return "not finite"
    return f"as large as {largest:.3g}" if largest > limit else ""


@dataclass
class Traffic:
    """Payload bytes. A round's reducer goes on sending after its verdict; that is told with the next one."""

    sent: int = 0
    received: int = 0


@dataclass(frozen=True, kw_only=True)
class ReduceReport:
    """How an all-reduce went for one member. Crosses the process boundary by pickle."""

    is_weightless: bool
    """Nobody brought any weight for some part that we reduced."""
    is_foul: bool
    """Some reducer answered with numbers that cannot be right."""
    missing_fraction: float
    failures: Mapping[str, str]
    """Peer id -> why its part of the average did not come, or not wholly."""
    banned: Mapping[str, str]
    """Peer id -> why our reducer gave up on it."""
    weights: Mapping[str, float]
    """Peer id -> weight, of those that brought all of our slice. Empty if we reduced nothing."""
    num_senders: int
    """Members that were to bring something: without those known to read only."""

    def judge(self) -> tuple[Outcome, str]:
        """Pure: the outcome, and a few words on why it is no better."""
        if self.is_weightless:
            return "zero_weight", "nobody brought a sample"
        causes = "; ".join(f"{peer[-6:]}: {cause}" for peer, cause in sorted(self.failures.items())[:MAX_CAUSES])
        if self.is_foul:
            return "non_finite", causes
        if self.missing_fraction:
            return "partial", f"{self.missing_fraction:.1%} of the average did not come: {causes}"
        if self.weights and 2 * len(self.weights) < self.num_senders:
            return "partial", f"only {len(self.weights)} of {self.num_senders} senders brought their parts"
        return "averaged", ""


class CheckedContainer(TensorPartContainer):
    """Our tensors in parts; an averaged part of a wrong shape or with absurd numbers counts as missing."""

    is_foul = False

    def register_processed_part(self, peer_index: int, part_index: int, part: torch.Tensor) -> None:
        own = self._input_parts_by_peer[peer_index][part_index][0]
        if part.shape != own.shape or part.dtype != own.dtype:
            raise ValueError(f"averaged part {tuple(part.shape)} {part.dtype}, expected {tuple(own.shape)} {own.dtype}")
        flaw = flaw_of(part, limit=2 * MAX_MAGNITUDE)  # a difference of two numbers
        if flaw:
            self.is_foul = True
            raise ValueError(f"average {flaw}")
        super().register_processed_part(peer_index, part_index, part)


class CheckedReducer(TensorPartReducer):
    """Averages our slice of everyone's tensors. Violations are kept by sender index."""

    denominator: float

    def __init__(self, part_shapes: tuple[torch.Size, ...], num_senders: int, *, max_weight: float) -> None:
        super().__init__(part_shapes, num_senders)
        self._max_weight = max_weight
        self.weights: dict[int, float] = {}
        self.violations: dict[int, str] = {}
        self.is_weightless = False

    async def accumulate_part(
        self, sender_index: int, part_index: int, tensor_part: torch.Tensor, weight: float = 1.0
    ) -> torch.Tensor:
        """As stock, but what is wrong is not counted, and a sender that dies takes nobody with it.

        Stock counts a part as received before its turn comes, and lets the death of one sender cancel the future that
        all others wait for: either way the whole round hangs until its timeout.
        """
        problem = self._problem(sender_index, part_index, tensor_part, weight)
        if problem:
            self.violations[sender_index] = problem
            raise BannedException(problem)
        while part_index > self.current_part_index and not self.finished.is_set():
            await asyncio.wait({self.current_part_future})
        if self.finished.is_set():
            raise AllreduceException("came after the end")
        if self.sender_failed_after[sender_index] != math.inf:
            raise BannedException("banned while it waited for its turn")
        average_to_be = self.current_part_future
        self.weights[sender_index] = weight
        self.num_parts_received[sender_index] += 1
        self.accumulator.add_(tensor_part, alpha=weight)
        self.current_part_accumulated_from += 1
        self.denominator += weight
        self.check_current_part_finished()
        average: torch.Tensor = await asyncio.shield(average_to_be)
        if not math.isnan(float(average.flatten()[0])):
            return average
        # A reader gets the NaN, which it knows; a bare hivemind peer gets its own part back, which changes nothing.
        self.is_weightless = True
        return tensor_part if tensor_part.shape == average.shape else average

    def check_current_part_finished(self) -> None:
        if self.current_part_accumulated_from == self.num_current_senders and self.denominator <= 0:
            self.accumulator.fill_(math.nan)
            self.denominator = 1.0
        super().check_current_part_finished()

    def _problem(self, sender_index: int, part_index: int, part: torch.Tensor, weight: float) -> str:
        if not 0 <= part_index < self.num_parts:
            return f"part {part_index} of {self.num_parts}"
        if not (math.isfinite(weight) and 0 <= weight <= self._max_weight):
            return f"weight {weight:g}, at most {self._max_weight:g} is allowed"
        if weight != self.weights.get(sender_index, weight):
            return f"weight {weight:g} after {self.weights[sender_index]:g}"
        shape = self.part_shapes[part_index]
        is_read = weight == 0 and part.numel() == 1
        if part.shape != shape and not is_read:
            return f"part of {tuple(part.shape)} instead of {tuple(shape)}: another compression?"
        if part.dtype != torch.float32:
            return f"part of {part.dtype}"
        return flaw_of(part)


class CheckedRunner(AllReduceRunner):
    """One all-reduce. Iterate it as stock's, then ask `report`. Its tensors must be zeros if `is_reader`."""

    tensor_part_container: CheckedContainer
    tensor_part_reducer: CheckedReducer

    def __init__(
        self, *, tensors: list[torch.Tensor], is_reader: bool, max_weight: float, peer_fractions: tuple[int, ...],
        compression: Any, tensor_infos: Any = None, part_size_bytes: int, traffic: Traffic, **kwargs: Any,
    ) -> None:  # fmt: skip
        parts = {"compression": compression, "tensor_infos": tensor_infos, "part_size_bytes": part_size_bytes}
        super().__init__(tensors=tensors, peer_fractions=peer_fractions, **parts, **kwargs)
        self._is_reader, self._traffic = is_reader, traffic
        # Stock makes these two itself, from classes that it names; they are unused yet, and must not warn when they go.
        self.tensor_part_container.finished.set()
        self.tensor_part_reducer.finished.set()
        self.tensor_part_container = CheckedContainer(tensors, peer_fractions, return_deltas=True, **parts)
        own_index = self.ordered_peer_ids.index(self.peer_id)
        self.parts_for_local_averaging = self.tensor_part_container.get_raw_input_parts(own_index)
        shapes = tuple(part.shape for part in self.parts_for_local_averaging)
        self.tensor_part_reducer = CheckedReducer(shapes, len(self.sender_peer_ids), max_weight=max_weight)
        self._callers: set[PeerID] = set()
        self._banned: dict[str, str] = {}
        self._failures: dict[str, str] = {}

    def report(self) -> ReduceReport:
        container, reducer = self.tensor_part_container, self.tensor_part_reducer
        names = [str(peer) for peer in self.sender_peer_ids]
        weights = {names[i]: w for i, w in reducer.weights.items() if w > 0 and names[i] not in self._banned}
        readers = {names[i] for i, w in reducer.weights.items() if w == 0}
        if self.weight == 0:
            readers.add(str(self.peer_id))
        return ReduceReport(
            is_weightless=reducer.is_weightless,
            is_foul=container.is_foul,
            missing_fraction=container.failed_size / max(1, container.total_size),
            failures=dict(self._failures),
            banned=dict(self._banned),
            weights=weights,
            num_senders=len(names) - len(readers),
        )

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        """As stock, but one stream per member: a second one would be counted in the place of an honest sender's."""
        sender = context.remote_id
        if sender not in self.sender_peer_ids or sender in self._callers:
            yield averaging_pb2.AveragingData(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        self._callers.add(sender)
        async for answer in super().rpc_aggregate_part(self._counted(stream), context):
            self._traffic.sent += len(answer.tensor_part.buffer)
            yield answer

    async def _counted(self, stream: Any) -> AsyncIterator[averaging_pb2.AveragingData]:
        async for message in stream:
            self._traffic.received += len(message.tensor_part.buffer)
            yield message

    async def _ban_sender(self, peer_id: PeerID) -> None:
        """Also called for those that hang up when they have everything: they are no failures."""
        reducer, index = self.tensor_part_reducer, self.sender_peer_ids.index(peer_id)
        is_whole = reducer.num_parts_received[index] == reducer.num_parts and index not in reducer.violations
        if peer_id not in self.banned_senders and not is_whole:
            silent = f"broke off, or silent for {self.sender_timeout:g} s"
            self._banned[str(peer_id)] = reducer.violations.get(index, silent)
        await super()._ban_sender(peer_id)

    async def _generate_input_for_peer(self, peer_index: int) -> AsyncIterator[averaging_pb2.AveragingData]:
        inputs = self._reads(peer_index) if self._is_reader else super()._generate_input_for_peer(peer_index)
        async for message in inputs:
            self._traffic.sent += len(message.tensor_part.buffer)
            yield message

    async def _reads(self, peer_index: int) -> AsyncIterator[averaging_pb2.AveragingData]:
        container = self.tensor_part_container
        first: dict[str, Any] = {"code": averaging_pb2.PART_FOR_AVERAGING, "group_id": self.group_id}
        for _, info in list(container._input_parts_by_peer[peer_index]):
            zero = container.compression.compress(torch.zeros(1), info)
            yield averaging_pb2.AveragingData(tensor_part=zero, weight=0.0, **first)
            first = {}

    async def _communicate_with_peer(self, peer_id: PeerID) -> None:
        """As stock, but we hang up as soon as we have it all: see `StockProcess.rpc_aggregate_part`."""
        if peer_id == self.peer_id:
            return await super()._communicate_with_peer(peer_id)
        container, index = self.tensor_part_container, self.ordered_peer_ids.index(peer_id)
        expected, received = container.num_parts_by_peer[index], 0
        is_sent = asyncio.Event()
        try:
            inputs = attach_event_on_finished(self._generate_input_for_peer(index), is_sent)
            stream = await self._get_peer_stub(peer_id).rpc_aggregate_part(inputs)
            async with contextlib.aclosing(stream):
                if self.should_delay_results(self.peer_id):
                    await is_sent.wait()
                answers = aiter_with_timeout(stream, self.reducer_timeout)
                decoded = amap_in_executor(self._decode, answers, max_prefetch=container.prefetch)
                async with contextlib.aclosing(answers), contextlib.aclosing(decoded):
                    async for delta in decoded:
                        container.register_processed_part(index, received, delta)
                        received += 1
                        if received == expected:
                            return None
            raise AllreduceException(f"sent {received} of {expected} parts")
        except BaseException as exc:
            self._failures[str(peer_id)] = str(exc) or type(exc).__name__
            if not container.finished.is_set():
                container.register_failed_reducer(index)
            raise

    def _decode(self, message: averaging_pb2.AveragingData) -> torch.Tensor:
        if message.code != averaging_pb2.AVERAGED_PART:
            raise AllreduceException(f"answered {averaging_pb2.MessageCode.Name(message.code)}")
        self._traffic.received += len(message.tensor_part.buffer)
        tensor: torch.Tensor = deserialize_torch_tensor(message.tensor_part)
        return tensor
