"""Reducers that die, lie or dawdle, over real libp2p: those who are left agree, in time."""

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from calm_ray.swarm.exchange_frames import FrameKind, Stream, Traffic
from tests.unit.swarm.loopback import (
    Loopback,
    Peer,
    group_of,
    loopback,
    run_all,
    start_daemon,
)
from tests.unit.swarm.strangers import (
    MARGIN_SECONDS,
    NUM_ELEMENTS,
    PART,
    STRICT,
    VECTORS,
    WEIGHTS,
    assert_same,
    by_slice,
    listen,
    parts_for,
)

# hivemind leaves sockets and subprocess transports to the garbage collector, after their loop was closed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:loop is closed:ResourceWarning"),
]


@pytest.fixture(autouse=True)
def _one_slice_for_each_reducer(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the stranger has few streams to speak on."""
    monkeypatch.setattr("calm_ray.swarm.parts.MIN_STREAMS", 1)


@pytest.fixture(scope="module")
def net() -> Iterator[Loopback]:
    with loopback() as found:
        yield found


def test_round_whose_reducer_never_comes_is_partial_in_time(net: Loopback) -> None:
    async def test() -> None:
        async with net.peers(3, num_elements=NUM_ELEMENTS, strangers=[2]) as members:
            group = group_of(members, fractions=[0.3, 0.3, 0.4], senders=[0, 1], limits=STRICT)
            results = await run_all(members[:2], group, vectors=VECTORS[:2], weights=WEIGHTS[:2])
            assert [result.outcome for result in results] == ["partial"] * 2
            assert results[0].missing_fraction == pytest.approx(0.4, abs=0.03)
            assert max(result.seconds for result in results) < STRICT.round_seconds

    net.run(test())


@pytest.mark.parametrize(("handed_out", "is_repaired"), [((4, 2), True), ((2, 0), False)])
def test_round_whose_reducer_dies_is_repaired_if_anyone_has_its_parts(
    net: Loopback, handed_out: tuple[int, int], is_repaired: bool
) -> None:
    """The dying reducer has handed four and two of its four parts to its members, or two and none."""

    async def test() -> None:
        async with net.peers(3, num_elements=NUM_ELEMENTS, strangers=[2]) as members:
            left = dict(zip((peer.name for peer in members), handed_out, strict=False))

            async def die(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                stream = Stream(reader, writer, Traffic())
                await stream.receive_as(FrameKind.OPENING)
                listening = asyncio.create_task(listen(stream))
                for part in parts_for(1)[: left[info.peer_id.to_base58()]]:
                    await stream.send(FrameKind.PART, part)
                await asyncio.sleep(1.0)  # sleep: what was sent is on its way; then p2pd resets the stream
                stream.abort()
                await listening

            protocol = f"{members[2].namespace}::calm-1.exchange"
            await members[2].p2p.add_binary_stream_handler(protocol, die)
            group = group_of(members, fractions=[0.5, 0.0, 0.5], senders=[0, 1], limits=STRICT)
            results = await run_all(members[:2], group, vectors=VECTORS[:2], weights=WEIGHTS[:2])
            await members[2].p2p.remove_binary_stream_handler(protocol)
            if is_repaired:
                average = assert_same(results)
                assert by_slice(average)[1].contiguous().numpy().tobytes() == b"".join(parts_for(1))
            else:
                assert [result.outcome for result in results] == ["partial"] * 2
            assert max(result.seconds for result in results) < STRICT.round_seconds / 2

    net.run(test())


def test_reducer_that_sends_nonsense_makes_the_round_partial_not_wrong(net: Loopback) -> None:
    async def test() -> None:
        async with net.peers(3, num_elements=NUM_ELEMENTS, strangers=[2]) as members:

            async def lie(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                stream = Stream(reader, writer, Traffic())
                await stream.send(FrameKind.PART, np.full(PART, np.inf, dtype=np.float32).tobytes())
                await stream.discard_until_hangup()
                stream.abort()

            protocol = f"{members[2].namespace}::calm-1.exchange"
            await members[2].p2p.add_binary_stream_handler(protocol, lie)
            group = group_of(members, fractions=[0.5, 0.0, 0.5], senders=[0, 1], limits=STRICT)
            results = await run_all(members[:2], group, vectors=VECTORS[:2], weights=WEIGHTS[:2])
            await members[2].p2p.remove_binary_stream_handler(protocol)
            assert [result.outcome for result in results] == ["partial"] * 2
            assert all(result.average is None and result.missing_fraction == 0.5 for result in results)

    net.run(test())


@pytest.mark.parametrize("delay_seconds", [0.0, 0.05])
def test_killed_daemon_of_a_reducer_leaves_the_others_agreed(net: Loopback, delay_seconds: float) -> None:
    """Whenever it dies, nobody steps with another average than the rest."""

    async def test() -> None:
        async with net.peers(3, num_elements=NUM_ELEMENTS) as members:
            victim = await start_daemon(net.daemons[:1])
            doomed = Peer(p2p=victim, exchange=type(members[2].exchange)(num_elements={"gradients": NUM_ELEMENTS}),
                          namespace=members[0].namespace)  # fmt: skip
            await doomed.exchange.serve(victim, namespace=doomed.namespace)
            some = [*members, doomed]
            group = group_of(some, fractions=[0.3, 0.2, 0.0, 0.5], senders=[0, 1, 2, 3], limits=STRICT)
            task = asyncio.create_task(run_all(some, group, vectors=[*VECTORS, VECTORS[0]], weights=[1, 1, 1, 1]))
            await asyncio.sleep(delay_seconds)  # sleep: into the middle of the round
            assert victim._child is not None
            os.kill(victim._child.pid, signal.SIGKILL)
            results = await task
            await doomed.exchange.close()
            await victim.shutdown()
            outcomes = {result.outcome for result in results[:3]}
            assert outcomes in ({"averaged"}, {"partial"}), results
            assert len({result.digest for result in results[:3]}) == 1
            assert max(result.seconds for result in results) < STRICT.round_seconds + MARGIN_SECONDS

    net.run(test())


def test_round_lasts_no_longer_than_its_time(net: Loopback) -> None:
    """A reducer that says it is alive and never gets on."""

    async def test() -> None:
        async with net.peers(2, num_elements=NUM_ELEMENTS, strangers=[1]) as members:

            async def dawdle(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                stream = Stream(reader, writer, Traffic())
                try:
                    while True:
                        await stream.send(FrameKind.WAIT)
                        await asyncio.sleep(0.2)  # sleep: it dawdles
                except OSError:
                    stream.abort()

            protocol = f"{members[1].namespace}::calm-1.exchange"
            await members[1].p2p.add_binary_stream_handler(protocol, dawdle)
            limits = replace(STRICT, round_seconds=4.0)
            group = group_of(members, fractions=[0.5, 0.5], senders=[0], limits=limits)
            (result,) = await run_all(members[:1], group, vectors=VECTORS[:1], weights=[1])
            await members[1].p2p.remove_binary_stream_handler(protocol)
            assert result.outcome == "timeout" and result.missing_fraction == 0.5
            assert 4.0 <= result.seconds < 4.0 + MARGIN_SECONDS

    net.run(test())
