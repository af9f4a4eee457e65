"""A stranger's message is as long as we allow, whatever length it announces; over real libp2p daemons."""

import asyncio
from collections.abc import Iterator

import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2P

from calm_ray.swarm.matchmaking import Matchmaker
from calm_ray.swarm.transport import MAX_STREAM_MESSAGE_BYTES, bound_messages
from tests.unit.swarm.camp import Camp, camp
from tests.unit.swarm.loopback import Loopback, loopback

# hivemind leaves sockets and subprocess transports to the garbage collector, after their loop was closed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:loop is closed:ResourceWarning"),
]


@pytest.fixture(scope="module")
def net() -> Iterator[Loopback]:
    with loopback() as found:
        yield found


@pytest.fixture
def bounded() -> Iterator[None]:
    stock = P2P.receive_raw_data
    bound_messages()
    bound_messages()
    yield
    P2P.receive_raw_data = staticmethod(stock)


async def open_stream(here: Camp) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """From the second peer to the first one's matchmaker."""
    handle = Matchmaker._get_handle_name(here.seekers[0].maker._run_id, "rpc_join_round")
    _, reader, writer = await here.seekers[1].p2p.call_binary_stream_handler(here.seekers[0].p2p.peer_id, handle)
    return reader, writer


@pytest.mark.parametrize("length", [MAX_STREAM_MESSAGE_BYTES + 1, 2**40, 2**64 - 1])
def test_message_that_is_announced_too_long_ends_the_stream(net: Loopback, bounded: None, length: int) -> None:
    async def test() -> None:
        async with camp(net, count=2) as here:
            reader, writer = await open_stream(here)
            writer.write(P2P.MESSAGE_MARKER + length.to_bytes(P2P.HEADER_LEN, P2P.BYTEORDER) + bytes(1000))
            assert await reader.read() == b"", "before anything else is read"
            writer.transport.abort()

    net.run(test())


def test_longest_message_is_read(net: Loopback, bounded: None) -> None:
    async def test() -> None:
        async with camp(net, count=2) as here:
            reader, writer = await open_stream(here)
            room = MAX_STREAM_MESSAGE_BYTES - 5  # the message's own header
            await P2P.send_protobuf(BytesValue(value=bytes(room)), writer)
            await P2P.send_protobuf(P2P.END_OF_STREAM, writer)
            answer, _ = await P2P.receive_protobuf(BytesValue, reader)
            assert answer is not None and b"malformed" in answer.value
            writer.transport.abort()

    net.run(test())


def test_answer_that_is_too_long_is_not_read_either(net: Loopback, bounded: None) -> None:
    async def test() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data((MAX_STREAM_MESSAGE_BYTES + 1).to_bytes(P2P.HEADER_LEN, P2P.BYTEORDER))
        with pytest.raises(ValueError, match="at most 4194304 are read"):
            await P2P.receive_raw_data(reader)

    net.run(test())
