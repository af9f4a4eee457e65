"""A member's side of a round: it brings its parts to every reducer, and collects the averages from all of them.

Parts are checked as they arrive and kept encoded, because this peer may be the only one who has them if their reducer
dies: see exchange_repair.
"""

import asyncio
import hashlib
import logging
from concurrent.futures import Executor

import numpy as np
from hivemind.p2p import P2P

from calm_ray.swarm.exchange_frames import PEER_FAULTS, FrameKind, Stream, Traffic, open_stream
from calm_ray.swarm.exchange_messages import BadMessage, Ban, Ending, Failure, Opening, decode
from calm_ray.swarm.limits import RoundLimits
from calm_ray.swarm.part_codecs import BadPart, PartCodec, Vector
from calm_ray.swarm.parts import Layout

logger = logging.getLogger(__name__)

PARTS_PER_HASHING = 32
"""About a megabyte of values in half a millisecond, so that it costs little to ask for it."""
OPEN_ATTEMPTS = 2
"""A connection that has just been cut is opened anew at the second attempt."""


class Collection:
    """Averages as they come in: the vector, shape (num_elements,), and every part as it was encoded."""

    def __init__(self, layout: Layout, codec: PartCodec, *, hashing: Executor) -> None:
        """`hashing`: does one thing after the other."""
        self.layout, self.codec, self._hashing = layout, codec, hashing
        self.average: Vector = np.empty(layout.num_elements, dtype=np.float32)
        self.encoded: list[bytes | None] = [None] * layout.num_parts
        self.num_missing = layout.num_parts
        self.live_slices: set[int] = set()
        """Those whose reducer may still hand out parts to us itself."""
        self._hash = hashlib.sha256()
        self._num_in_order = self._num_hashed = 0
        self._is_released = False

    def max_bytes(self) -> int:
        return self.codec.encoded_bytes(self.layout.part_elements)

    def store(self, part: int, payload: bytes) -> None:
        """BadPart unless `payload` is a sound encoded average of `part`."""
        start, stop = self.layout.span(part)
        self.keep(part, payload, self.codec.decode(payload, stop - start))

    def keep(self, part: int, payload: bytes, decoded: Vector) -> None:
        """The first one counts: it may have been hashed."""
        if self.encoded[part] is not None:
            return
        self.encoded[part] = payload
        self.num_missing -= 1
        if self._is_released:
            return
        start, stop = self.layout.span(part)
        self.average[start:stop] = decoded
        while self._num_in_order < len(self.encoded) and self.encoded[self._num_in_order] is not None:
            self._num_in_order += 1
        if self._num_in_order - self._num_hashed >= PARTS_PER_HASHING:
            self._hash_on()

    def release(self) -> Vector:
        """Hand over the average. From now on only encoded parts are kept."""
        average, self.average, self._is_released = self.average, self.average[:0].copy(), True
        return average

    async def digest(self) -> str:
        """SHA-256, in hex, of the average as little-endian fp32. Most of it was hashed while the rest came."""
        assert not self.num_missing and not self._is_released
        self._hash_on()
        return await asyncio.get_running_loop().run_in_executor(self._hashing, self._hash.hexdigest)

    def missing(self, number: int) -> list[int]:
        """Parts of a slice that are not there."""
        return [part for part in self.layout.parts_of(number) if self.encoded[part] is None]

    def missing_fraction(self) -> float:
        spans = (self.layout.span(part) for part, payload in enumerate(self.encoded) if payload is None)
        return sum(stop - start for start, stop in spans) / max(1, self.layout.num_elements)

    def _hash_on(self) -> None:
        """Hash what has come in order, in the other thread; it lets go of the interpreter while it does."""
        if self._num_in_order > self._num_hashed:
            start, stop = self.layout.span(self._num_hashed)[0], self.layout.span(self._num_in_order - 1)[1]
            self._num_hashed = self._num_in_order
            self._hashing.submit(self._hash.update, self.average[start:stop].astype("<f4", copy=False).data)


class Courier:
    """Goes to a reducer with our part of one of its slices, and comes back with the averages."""

    def __init__(
        self,
        p2p: P2P,
        *,
        protocol: str,
        reducer: str,
        opening: Opening,
        vector: Vector | None,
        residual: Vector | None,
        collection: Collection,
        limits: RoundLimits,
        traffic: Traffic,
    ) -> None:
        """`vector`: what we bring, shape (num_elements,), or None. `residual`: as long, gets what encoding left out."""
        self._p2p, self._protocol, self._reducer, self.number = p2p, protocol, reducer, opening.slice
        self._opening, self._vector, self._residual = opening, vector, residual
        self._collection, self._limits, self._traffic = collection, limits, traffic
        self.ban: Ban | None = None
        self.failure: Failure | None = None
        self.ending: Ending | None = None

    async def run(self) -> None:
        """Does not raise for what the reducer does; then `missing(number)` of the collection is not empty."""
        self._collection.live_slices.add(self.number)
        try:
            for _ in range(OPEN_ATTEMPTS):
                is_open = False
                try:
                    async with open_stream(
                        self._p2p,
                        self._reducer,
                        self._protocol,
                        timeout_seconds=self._limits.request_seconds,
                        traffic=self._traffic,
                    ) as stream:
                        is_open = True
                        await self._talk(stream)
                        return
                except (*PEER_FAULTS, BadPart) as exc:
                    logger.warning(
                        "reducer_lost peer=%s epoch=%d reason=%s: %s",
                        self._reducer, self._opening.epoch, type(exc).__name__, exc,
                    )  # fmt: skip
                    if is_open:
                        return  # the reducer takes one stream for a slice from each member
        finally:
            self._collection.live_slices.discard(self.number)

    async def _talk(self, stream: Stream) -> None:
        await stream.send(FrameKind.OPENING, self._opening.encode())
        sending = asyncio.create_task(self._send_parts(stream))
        try:
            await self._collect(stream, sending)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _send_parts(self, stream: Stream) -> None:
        if self._vector is None:
            return
        codec, layout, weight = self._collection.codec, self._collection.layout, np.float32(self._opening.weight)
        for part in layout.parts_of(self.number):
            start, stop = layout.span(part)
            values = self._vector[start:stop]
            payload = codec.encode(values)
            if self._residual is not None:
                self._residual[start:stop] = (values - codec.decode(payload, stop - start)) * weight
            await stream.send(FrameKind.PART, payload)

    async def _collect(self, stream: Stream, sending: "asyncio.Task[None]") -> None:
        loop, limits = asyncio.get_running_loop(), self._limits
        # The reducer may learn of the group later than we, and first lets us wait for that.
        patience = limits.request_seconds + 2 * limits.chunk_seconds
        max_bytes = max(self._collection.max_bytes(), 2**18)
        parts = iter(self._collection.layout.parts_of(self.number))
        async with asyncio.timeout(patience) as clock:
            while True:
                kind, payload = await stream.receive(max_bytes=max_bytes)
                clock.reschedule(loop.time() + 2 * limits.chunk_seconds)
                if kind == FrameKind.PART:
                    part = next(parts, None)
                    if part is None:
                        raise BadMessage("more parts than the slice has")
                    self._collection.store(part, payload)
                elif kind == FrameKind.BAN:
                    sending.cancel()
                    self.ban = decode(Ban, payload)
                    self._forget_residual()
                elif kind == FrameKind.FAILURE:
                    self.failure = decode(Failure, payload)
                    return
                elif kind == FrameKind.ENDING:
                    self.ending = decode(Ending, payload)
                    return
                elif kind != FrameKind.WAIT:
                    raise BadMessage(f"{kind.name.lower()} where an average was due")

    def _forget_residual(self) -> None:
        """What was not counted was lost whole: there is nothing left to make up for."""
        assert self.ban is not None
        if self._residual is not None:
            for part in self._collection.layout.parts_of(self.number)[self.ban.counted :]:
                start, stop = self._collection.layout.span(part)
                self._residual[start:stop] = 0
