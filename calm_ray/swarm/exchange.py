"""All-reduce on our own wire ("calm-1"): every member of a group ends with the same bits, and knows that it did.

A group's members cut the vector into slices; each slice has one reducer, who receives it from every sender, averages by
weight, and sends the encoded average to all. A round is true for a member if it got every part; it may take them from
another member if their reducer died. Readers send nothing at all.

Why not hivemind's: there a reducer sends `average - yours`, so that in fp16 members end with different bits; one
malformed part stalls everyone, one NaN poisons everyone; readers must upload a whole vector of nothing; and a round in
which nothing arrived is reported as a success (AllReduceRunner, TensorPartReducer of 1.1.12).
"""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from calm_ray.errors import StateUnavailable
from calm_ray.swarm.exchange_frames import PEER_FAULTS, FrameKind, Stream, Traffic
from calm_ray.swarm.exchange_lobby import Lobby
from calm_ray.swarm.exchange_messages import Opening, PartsRequest, decode
from calm_ray.swarm.exchange_reduce import refuse
from calm_ray.swarm.exchange_repair import Kept, ask_for_parts, hand_out_parts, new_collection, receive_parts
from calm_ray.swarm.exchange_round import Protocols, Round, check_contribution
from calm_ray.swarm.group import Group, Kind
from calm_ray.swarm.limits import RoundLimits
from calm_ray.swarm.part_codecs import CODECS, BadPart, Vector
from calm_ray.swarm.verdict import Outcome, RoundResult

logger = logging.getLogger(__name__)

HANGUP_SECONDS = 10.0
"""For a caller that we refused, to go; and for one that has come, to say what it wants."""
MAX_HAND_OUTS = 8
"""Peers that read an average from us at the same time. It competes with averaging; others have it, too."""
MIN_HAND_OUT_SECONDS, MIN_READER_SPEED = 60.0, 100e3
"""Whoever reads slower than so many bytes per second is given up: it holds one of few places."""
MAX_CALLERS = 512
CLOSE_CHECK_SECONDS = 0.1
LINGER_CHECK_SECONDS = 1.0


class Exchange:
    """Takes part in rounds. All methods are coroutines of one loop; `serve` first, `close` at the end."""

    def __init__(self, *, num_elements: Mapping[Kind, int]) -> None:
        """`num_elements`: length of the flat vector of each kind of round."""
        self._num_elements = dict(num_elements)
        self._p2p: P2P | None = None
        self._protocols = Protocols(exchange="", parts="")
        self._is_serving = False
        self._own_id = ""
        self._rounds: Lobby[Round] = Lobby()
        self._kept: dict[Kind, Kept] = {}
        self._carried: dict[Kind, Vector] = {}
        self._traffic: dict[Kind, Traffic] = {kind: Traffic() for kind in num_elements}
        self._handlers: set[asyncio.Task[None]] = set()
        self._hand_outs = asyncio.Semaphore(MAX_HAND_OUTS)
        self._hashing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="digest")

    async def serve(self, p2p: P2P, *, namespace: str, is_reachable: bool = True) -> None:
        """Use a libp2p daemon; unless nobody can call this peer, answer others: reduce, and hand out averages."""
        self._p2p, self._own_id = p2p, str(p2p.peer_id.to_base58())
        self._protocols = Protocols(exchange=f"{namespace}::calm-1.exchange", parts=f"{namespace}::calm-1.parts")
        if is_reachable:
            await p2p.add_binary_stream_handler(self._protocols.exchange, self._on_exchange)
            await p2p.add_binary_stream_handler(self._protocols.parts, self._on_parts)
            self._is_serving = True

    async def run(
        self, group: Group, *, vector: torch.Tensor | None, weight: float, codec: str, max_weight: float
    ) -> RoundResult:
        """Average `vector` with the group, by `weight`; readers bring None and 0.

        `vector`: flat, contiguous fp32 on the CPU, shape (num_elements[kind],); not changed, and not to be changed
        before this returns. Never raises for what other peers do, and lasts at most limits.round_seconds and the time
        that hashing takes. Cancelling it ends everything that belongs to the round.
        """
        num_elements = self._num_elements[group.kind]
        if vector is not None and (vector.shape != (num_elements,) or vector.dtype != torch.float32):
            raise ValueError(f"vector of {vector.dtype} {tuple(vector.shape)}, expected float32 ({num_elements},)")
        if group.group_id.hex() in self._rounds.begun:
            return RoundResult(outcome="failed", detail="the leader gives us a group that it had before")
        if (early := self._foregone(group)) is not None:
            return early
        assert self._p2p is not None, "serve first"
        is_sender = any(member.is_sender for member in group.members if member.peer_id == self._own_id)
        contribution = await asyncio.to_thread(
            check_contribution, vector if is_sender else None, weight=weight, max_weight=max_weight
        )
        if contribution.objection:
            logger.warning("own_contribution_stopped epoch=%d reason=%s", group.epoch, contribution.objection)
        round_ = Round(
            p2p=self._p2p,
            group=group,
            own_id=self._own_id,
            protocols=self._protocols,
            contribution=contribution,
            codec=CODECS[codec],
            max_weight=max_weight,
            num_elements=num_elements,
            carried=self._carried.get(group.kind),
            traffic=self._traffic[group.kind],
            hashing=self._hashing,
        )
        try:
            round_.start()
        except ValueError as exc:  # a leader's nonsense
            return RoundResult(outcome="failed", detail=f"the group makes no sense: {exc}")
        self._rounds.begin(group.group_id.hex(), round_)
        try:
            result = await round_.run()
        except BaseException:
            await round_.cancel()
            self._rounds.end(group.group_id.hex())
            raise
        if result.is_true:
            self._commit(round_, result)
        round_.release()
        self._linger(round_)
        traffic = self._traffic[group.kind]
        result = replace(result, bytes_sent=traffic.sent, bytes_received=traffic.received)
        traffic.sent = traffic.received = 0
        traffic.meter.end_round()
        return result

    @property
    def bytes_per_second(self) -> float | None:
        """What our line has taken at its best in the last rounds; None until one was long enough to tell."""
        return max((rate for t in self._traffic.values() if (rate := t.meter.bytes_per_second)), default=None)

    async def fetch_last(
        self, peer_id: str, *, kind: Kind, epoch: int, limits: RoundLimits
    ) -> tuple[torch.Tensor, str]:
        """The average that a peer stepped with at `epoch`, and its digest, for a peer that missed the round.

        At most limits.round_seconds. StateUnavailable if that peer does not have it, or what it sends is not sound or
        does not match its digest; whether the digest is the swarm's is for the caller to ask others.
        """
        assert self._p2p is not None, "serve first"
        request = PartsRequest(group_id="", kind=kind, epoch=epoch)
        traffic = self._traffic[kind]
        try:
            async with (
                asyncio.timeout(limits.round_seconds),
                ask_for_parts(self._p2p, peer_id, self._protocols.parts, request, limits=limits, traffic=traffic) as (
                    header,
                    stream,
                ),
            ):
                if not header.is_known:
                    raise StateUnavailable(f"{peer_id} does not hold the average of epoch {epoch}")
                collection = new_collection(header, num_elements=self._num_elements[kind], hashing=self._hashing)
                await receive_parts(stream, collection, range(collection.layout.num_parts), limits=limits)
        except (*PEER_FAULTS, BadPart) as exc:
            raise StateUnavailable(f"{peer_id} did not hand over the average of epoch {epoch}: {exc!r}") from exc
        digest = "" if collection.num_missing else await collection.digest()
        if digest != header.digest or not digest:
            raise StateUnavailable(f"{peer_id} handed over another average of epoch {epoch} than it announced")
        self._kept[kind] = Kept(group_id="", epoch=epoch, collection=collection, digest=digest)
        return torch.from_numpy(collection.release()), digest

    async def close(self) -> None:
        """Serve those who still need us, at most until their rounds' time is over, then stop answering."""
        while any(not round_.is_served() for round_ in self._rounds.begun.values()):
            await asyncio.sleep(CLOSE_CHECK_SECONDS)
        if self._is_serving and self._p2p is not None:
            self._is_serving = False
            for protocol in (self._protocols.exchange, self._protocols.parts):
                with contextlib.suppress(*PEER_FAULTS):  # a daemon that died has nothing to be told
                    await self._p2p.remove_binary_stream_handler(protocol)
        for group_id, round_ in list(self._rounds.begun.items()):
            await round_.cancel()
            self._rounds.end(group_id)
        for task in self._handlers:
            task.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)
        self._hashing.shutdown(wait=False, cancel_futures=True)

    def _foregone(self, group: Group) -> RoundResult | None:
        """The result of a round that need not begin."""
        cause: tuple[Outcome, str] | None = None
        if len(group.members) < 2:
            cause = "alone", "nobody else is in the group"
        elif not any(member.fraction > 0 for member in group.members):
            cause = "only_clients", "no member can average for the others"
        elif [member.peer_id for member in group.members].count(self._own_id) != 1:
            cause = "failed", "we are not in this group, or twice"
        if cause is None:
            return None
        return RoundResult(
            outcome=cause[0], detail=cause[1], group_size=len(group.members), num_senders=group.num_senders
        )

    def _linger(self, round_: Round) -> None:
        """Forget a round that is over for us, with all its buffers, as soon as nobody needs us any more."""
        if round_.is_served():
            self._rounds.end(round_.group.group_id.hex())
        else:
            asyncio.get_running_loop().call_later(LINGER_CHECK_SECONDS, self._linger, round_)

    def _commit(self, round_: Round, result: RoundResult) -> None:
        """A true round: keep its average for others, and what its encoding left out for the next one."""
        kind = round_.group.kind
        self._kept[kind] = round_.kept(result.digest)
        for number, desk in round_.desks.items():
            if desk.reduction.residual is not None:
                if kind not in self._carried:
                    self._carried[kind] = np.zeros(self._num_elements[kind], dtype=np.float32)
                for part, left_out in zip(round_.layout.parts_of(number), desk.reduction.residual, strict=True):
                    self._carried[kind][slice(*round_.layout.span(part))] = left_out

    async def _on_exchange(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = Stream(reader, writer, Traffic())
        await self._handle(stream, self._reduce_for(str(info.peer_id.to_base58()), stream))

    async def _on_parts(
        self,
        info: StreamInfo,  # noqa: ARG002  hivemind's signature
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        stream = Stream(reader, writer, Traffic())
        if len(self._handlers) >= MAX_CALLERS:
            stream.abort()
            return
        await self._handle(stream, self._hand_out_to(stream))

    async def _handle(self, stream: Stream, job: Coroutine[None, None, None]) -> None:
        """Serve one caller, in a task that `close` may cancel: asyncio complains of a cancelled connection handler."""
        task = asyncio.create_task(job)
        self._handlers.add(task)
        try:
            await asyncio.wait({task})
            if not task.cancelled() and (error := task.exception()) is not None:
                if not isinstance(error, PEER_FAULTS):
                    logger.error("caller not served", exc_info=error)
                logger.info("caller_lost reason=%s: %s", type(error).__name__, error)
        finally:
            task.cancel()
            self._handlers.discard(task)
            stream.abort()

    async def _reduce_for(self, peer: str, stream: Stream) -> None:
        """A member of a group wants our slice."""
        async with asyncio.timeout(HANGUP_SECONDS):
            opening = decode(Opening, await stream.receive_as(FrameKind.OPENING))
        round_ = await self._rounds.enter(opening.group_id, peer)
        if round_ is None:
            async with asyncio.timeout(HANGUP_SECONDS):
                await refuse(stream, "I do not know this group, or it is over")
            return
        task = asyncio.current_task()
        assert task is not None
        stream.traffic = round_.traffic
        round_.handlers.add(task)
        try:
            async with asyncio.timeout_at(round_.deadline):
                await round_.serve(peer, opening, stream)
        finally:
            round_.handlers.discard(task)

    async def _hand_out_to(self, stream: Stream) -> None:
        """Somebody wants averages that we may have."""
        async with asyncio.timeout(HANGUP_SECONDS):
            request = decode(PartsRequest, await stream.receive_as(FrameKind.PARTS_REQUEST))
        stream.traffic = self._traffic.get(request.kind, stream.traffic)
        kept = self._kept_for(request)
        if kept is None:
            async with asyncio.timeout(HANGUP_SECONDS):
                await hand_out_parts(stream, request, None)
            return
        async with self._hand_outs, asyncio.timeout(MIN_HAND_OUT_SECONDS + kept.num_bytes / MIN_READER_SPEED):
            await hand_out_parts(stream, request, kept)

    def _kept_for(self, request: PartsRequest) -> Kept | None:
        kept = self._kept.get(request.kind)
        if request.group_id:
            round_ = self._rounds.begun.get(request.group_id)
            if round_ is not None and round_.group.kind == request.kind:
                return round_.kept()
            return kept if kept is not None and kept.group_id == request.group_id else None
        return kept if kept is not None and kept.epoch == request.epoch else None
