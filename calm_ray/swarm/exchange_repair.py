"""Averages from whoever has them: to make a round whole whose reducer died, and to catch up with one that was missed.

Each member keeps the encoded averages that it got, so that the death of a reducer who had served only some does not
split the swarm. Only if nobody has a part is the round partial.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Container, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from struct import Struct

from hivemind.p2p import P2P

from calm_ray.swarm.exchange_collect import Collection
from calm_ray.swarm.exchange_frames import PEER_FAULTS, FrameKind, Stream, Traffic, open_stream
from calm_ray.swarm.exchange_messages import BadMessage, PartsHeader, PartsRequest, decode
from calm_ray.swarm.limits import RoundLimits
from calm_ray.swarm.part_codecs import CODECS, BadPart
from calm_ray.swarm.parts import Layout

logger = logging.getLogger(__name__)

NUMBER = Struct(">I")
STALL_SECONDS = 30.0
"""For a reader to take a part. It holds one of few places."""
PAUSE_SECONDS = 0.5
"""Between two rounds of asking those who may still get what we miss."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """An average, whole or on its way, as this peer can hand it to others."""

    group_id: str
    epoch: int
    collection: Collection
    digest: str = ""

    @property
    def num_bytes(self) -> int:
        """Of what there is to hand out now."""
        return sum(len(payload) for payload in self.collection.encoded if payload is not None)


async def hand_out_parts(stream: Stream, request: PartsRequest, kept: Kept | None) -> None:
    """Answer a request with what is there now, then wait for the caller to hang up."""
    if kept is None:
        await stream.send(FrameKind.PARTS_HEADER, PartsHeader(is_known=False).encode())
        await stream.until_hangup()
        return
    collection = kept.collection
    parts: Sequence[int] = range(collection.layout.num_parts)
    if request.group_id:
        is_slice = request.slice in collection.layout.slices
        parts = collection.layout.parts_of(request.slice)[request.skip :] if is_slice else ()
    header = PartsHeader(
        is_known=True,
        may_come=request.slice in collection.live_slices,
        codec=collection.codec.name,
        num_elements=collection.layout.num_elements,
        digest=kept.digest,
    )
    await stream.send(FrameKind.PARTS_HEADER, header.encode())
    listening = asyncio.create_task(stream.until_hangup())
    sending = asyncio.create_task(_send_parts(stream, collection, parts))
    try:
        await asyncio.wait((listening, sending), return_when=asyncio.FIRST_COMPLETED)
        if sending.done():
            sending.result()
        async with asyncio.timeout(STALL_SECONDS):
            await listening
    finally:
        listening.cancel()
        sending.cancel()
        await asyncio.gather(listening, sending, return_exceptions=True)


async def _send_parts(stream: Stream, collection: Collection, parts: Sequence[int]) -> None:
    for part in parts:
        payload = collection.encoded[part]
        if payload is not None:
            async with asyncio.timeout(STALL_SECONDS):
                await stream.send(FrameKind.PART, NUMBER.pack(part) + payload)
    await stream.send(FrameKind.ENDING)


@contextlib.asynccontextmanager
async def ask_for_parts(
    p2p: P2P, peer: str, protocol: str, request: PartsRequest, *, limits: RoundLimits, traffic: Traffic
) -> AsyncIterator[tuple[PartsHeader, Stream]]:
    """Send a request and read the header of the answer; one of PEER_FAULTS if there is none."""
    async with open_stream(p2p, peer, protocol, timeout_seconds=limits.request_seconds, traffic=traffic) as stream:
        await stream.send(FrameKind.PARTS_REQUEST, request.encode())
        async with asyncio.timeout(limits.request_seconds):
            payload = await stream.receive_as(FrameKind.PARTS_HEADER)
        yield decode(PartsHeader, payload), stream


async def receive_parts(stream: Stream, collection: Collection, wanted: Container[int], *, limits: RoundLimits) -> None:
    """Store what a peer hands out; BadPart or one of PEER_FAULTS if that is not what was asked for."""
    max_bytes = NUMBER.size + collection.max_bytes()
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(2 * limits.chunk_seconds) as clock:
        while True:
            kind, payload = await stream.receive(max_bytes=max_bytes)
            clock.reschedule(loop.time() + 2 * limits.chunk_seconds)
            if kind == FrameKind.ENDING:
                return
            if kind != FrameKind.PART or len(payload) < NUMBER.size:
                raise BadMessage(f"{kind.name.lower()} where a part was due")
            (part,) = NUMBER.unpack_from(payload)
            if part not in wanted:
                raise BadMessage(f"part {part}, which was not asked for")
            collection.store(part, payload[NUMBER.size :])


def new_collection(header: PartsHeader, *, num_elements: int, hashing: Executor) -> Collection:
    """An empty collection for what `header` announces; BadMessage if that cannot be an average of our vector."""
    codec = CODECS.get(header.codec)
    if codec is None:
        raise BadMessage(f"codec {header.codec!r}")
    if header.num_elements != num_elements:
        raise BadMessage(f"{header.num_elements} elements, expected {num_elements}")
    layout = Layout(num_elements=num_elements, part_elements=codec.part_elements)
    return Collection(layout, codec, hashing=hashing)


class Repair:
    """Looks for the missing parts of one round among its other members, until they are found or cannot be."""

    def __init__(
        self, p2p: P2P, *, protocol: str, request: PartsRequest, peers: Sequence[str], collection: Collection,
        limits: RoundLimits, traffic: Traffic,
    ) -> None:  # fmt: skip
        """`request` names the round; the slice is filled in here."""
        self._p2p, self._protocol, self._request, self._peers = p2p, protocol, request, list(peers)
        self._collection, self._limits, self._traffic = collection, limits, traffic

    async def run(self, number: int) -> None:
        """Fill in a slice as far as anybody can. Does not raise for what peers do."""
        is_hopeless = 0
        while self._collection.missing(number) and is_hopeless < 2:
            hopes = [await self._ask(peer, number) for peer in list(self._peers) if self._collection.missing(number)]
            is_hopeless = 0 if any(hopes) else is_hopeless + 1
            if self._collection.missing(number):
                await asyncio.sleep(PAUSE_SECONDS)

    async def _ask(self, peer: str, number: int) -> bool:
        """Whether that peer had something, or may have it later."""
        before, parts = self._collection.num_missing, self._collection.layout.parts_of(number)
        skip = parts.index(self._collection.missing(number)[0])
        request = self._request.model_copy(update={"slice": number, "skip": skip})
        try:
            async with ask_for_parts(
                self._p2p, peer, self._protocol, request, limits=self._limits, traffic=self._traffic
            ) as (header, stream):
                if header.is_known and header.codec == self._collection.codec.name:
                    await receive_parts(stream, self._collection, parts[skip:], limits=self._limits)
                    return header.may_come or self._collection.num_missing < before
        except (*PEER_FAULTS, BadPart) as exc:
            logger.info("repair_failed peer=%s epoch=%d reason=%s", peer, request.epoch, type(exc).__name__)
            self._peers.remove(peer)
        return self._collection.num_missing < before
