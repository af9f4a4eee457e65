"""Frames on a raw libp2p stream: one byte of kind, four of length, then the payload.

hivemind's protobuf streams read whatever length a peer announces into memory, and leave the local socket open when a
stream cannot be opened. Here the reader says how long a frame may be, before it is read, and every socket is closed.

Only the caller hangs up: when a handler ends, libp2p's daemon resets the stream and what was under way is lost.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import IntEnum
from struct import Struct

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import DaemonConnector
from hivemind.p2p.p2p_daemon_bindings.utils import (
    P2PDaemonError,
    raise_if_failed,
    read_pbmsg_safe,
    write_pbmsg,
)
from hivemind.proto import p2pd_pb2

from calm_ray.swarm.exchange_messages import MAX_HEADER_BYTES, BadMessage
from calm_ray.swarm.exchange_meter import RateMeter
from calm_ray.swarm.exchange_window import Window

PREFIX, CLOCK = Struct(">BI"), Struct(">d")
DISCARD_BYTES = 2**16
PEER_FAULTS = (OSError, EOFError, TimeoutError, BadMessage, P2PDaemonError)
"""What talking to a peer may raise for no fault of ours. EOFError: a stream that ends, if inside a frame."""


class FrameKind(IntEnum):
    OPENING = 1
    PART = 2
    WAIT = 3
    """Nothing yet, but I am alive."""
    BAN = 4
    FAILURE = 5
    ENDING = 6
    PARTS_REQUEST = 7
    PARTS_HEADER = 8
    CONFIRMED = 9
    """The next part has arrived, now by my clock: a number of seconds."""


KINDS = frozenset(map(int, FrameKind))


@dataclass
class Traffic:
    """Payload bytes of parts; frames' prefixes, headers and what libp2p and TCP add are not counted."""

    sent: int = 0
    received: int = 0
    meter: RateMeter = field(default_factory=RateMeter)
    """Of what others have confirmed."""


class Stream:
    """One end of a stream between two peers. Not to be shared by two readers or two writers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, traffic: Traffic) -> None:
        self._reader, self._writer, self.traffic = reader, writer, traffic
        self._window, self._has_room = Window(), asyncio.Event()
        self._on_its_way: deque[int] = deque()  # bytes of the parts that are not confirmed: as many as the window holds
        self._clock = asyncio.get_running_loop().time

    async def send(self, kind: FrameKind, payload: bytes = b"") -> None:
        """Returns when the transport has room again, so at most one frame is buffered here.

        Parts wait for room in the window. Somebody must be in `receive` then, for it is there that parts are confirmed.
        """
        if kind == FrameKind.PART:
            while not self._window.has_room:
                self._has_room.clear()
                await self._has_room.wait()
            self._window.on_sent(self._clock())
            self._on_its_way.append(len(payload))
            self.traffic.sent += len(payload)
        self._writer.write(PREFIX.pack(kind, len(payload)) + payload)
        await self._writer.drain()
        await asyncio.sleep(0)  # drain does not yield while there is room

    async def receive(self, *, max_bytes: int = MAX_HEADER_BYTES) -> tuple[FrameKind, bytes]:
        """The next frame that is not about our own parts; those that are parts are confirmed.

        BadMessage, before the payload is read, if that is longer than `max_bytes`, or the frame of no known kind.
        """
        while True:
            number, length = PREFIX.unpack(await self._reader.readexactly(PREFIX.size))
            if length > max_bytes or number not in KINDS:
                raise BadMessage(f"{length} bytes in a frame of kind {number}, expected at most {max_bytes}")
            payload = await self._reader.readexactly(length)
            kind = FrameKind(number)
            if kind == FrameKind.CONFIRMED:
                if length != CLOCK.size or not self._window.on_confirmed(CLOCK.unpack(payload)[0]):
                    raise BadMessage("confirmed what was never sent")
                self.traffic.meter.note(self._on_its_way.popleft(), now=self._clock())
                self._has_room.set()
                continue
            if kind == FrameKind.PART:
                self.traffic.received += length
                self._writer.write(PREFIX.pack(FrameKind.CONFIRMED, CLOCK.size) + CLOCK.pack(self._clock()))
            return kind, payload

    async def receive_as(self, expected: FrameKind, *, max_bytes: int = MAX_HEADER_BYTES) -> bytes:
        kind, payload = await self.receive(max_bytes=max_bytes)
        if kind != expected:
            raise BadMessage(f"{kind.name.lower()} where {expected.name.lower()} was due")
        return payload

    async def until_hangup(self) -> None:
        """Take confirmations until the other side closes; BadMessage if it has anything else to say."""
        with contextlib.suppress(OSError, EOFError):
            kind, _ = await self.receive(max_bytes=CLOCK.size)
            raise BadMessage(f"{kind.name.lower()} where nothing was due")

    async def discard_until_hangup(self) -> None:
        """As if nobody listened, but the other side has time to read what we sent last."""
        with contextlib.suppress(OSError):
            while await self._reader.read(DISCARD_BYTES):
                pass

    def abort(self) -> None:
        """Let go of the socket at once: whoever ends a stream has nothing left to say on it."""
        self._writer.transport.abort()


@contextlib.asynccontextmanager
async def open_stream(
    p2p: P2P, peer_id: str, protocol: str, *, timeout_seconds: float, traffic: Traffic
) -> AsyncIterator[Stream]:
    """Call `protocol` of a peer, and hang up at the end. One of PEER_FAULTS if it cannot be reached in time."""
    try:
        peer = PeerID.from_base58(peer_id).to_bytes()
    except ValueError as exc:
        raise BadMessage(f"peer id {peer_id[:64]!r}") from exc
    async with asyncio.timeout(timeout_seconds):
        reader, writer = await DaemonConnector(p2p.daemon_listen_maddr).open_connection()
    try:
        async with asyncio.timeout(timeout_seconds):
            await write_pbmsg(
                writer,
                p2pd_pb2.Request(
                    type=p2pd_pb2.Request.STREAM_OPEN,
                    streamOpen=p2pd_pb2.StreamOpenRequest(peer=peer, proto=[protocol]),
                ),
            )
            response = p2pd_pb2.Response()
            await read_pbmsg_safe(reader, response)
            raise_if_failed(response)
    except BaseException:
        writer.transport.abort()
        raise
    stream = Stream(reader, writer, traffic)
    try:
        yield stream
    finally:
        stream.abort()
