"""Members that break the rules, fall silent or die, over real libp2p: nobody stalls, and what is averaged is right.

A stranger here is a daemon without our code: the test speaks the protocol for it, by hand.
"""

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from calm_ray.swarm.exchange_frames import PEER_FAULTS, PREFIX, FrameKind, Stream, Traffic, open_stream
from calm_ray.swarm.exchange_messages import Opening
from calm_ray.swarm.group import Group
from calm_ray.swarm.part_codecs import CODECS
from calm_ray.swarm.verdict import RoundResult
from tests.unit.swarm.loopback import (
    LIMITS,
    MAX_WEIGHT,
    Loopback,
    Peer,
    group_of,
    loopback,
    random_vector,
    run_all,
    start_daemon,
    weighted_mean,
)

# hivemind leaves sockets and subprocess transports to the garbage collector, after their loop was closed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:loop is closed:ResourceWarning"),
]

PART = CODECS["none"].part_elements
NUM_ELEMENTS = 8 * PART
"""Four parts for each of two reducers."""
STRICT = replace(LIMITS, request_seconds=1.0, chunk_seconds=1.5, round_seconds=20.0)
MARGIN_SECONDS = 1.0
"""A round may last this much longer than its limit: hashing, and a busy machine."""

VECTORS = [random_vector(seed, NUM_ELEMENTS) for seed in range(3)]
WEIGHTS = [1.0, 2.0, 4.0]
HONEST = weighted_mean(VECTORS[:2], WEIGHTS[:2])
EVERYONE = weighted_mean(VECTORS, WEIGHTS)


@pytest.fixture(scope="module")
def net() -> Iterator[Loopback]:
    with loopback() as found:
        yield found


Frames = Sequence[tuple[FrameKind, bytes]]


@dataclass
class Answer:
    """What a reducer sent to a stranger."""

    kinds: list[FrameKind] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)

    def averages(self) -> list[bytes]:
        return [p for k, p in zip(self.kinds, self.payloads, strict=True) if k == FrameKind.PART]


def opening_of(group: Group, **changes: Any) -> bytes:
    usual = {
        "group_id": group.group_id.hex(), "kind": group.kind, "epoch": group.epoch, "weight": WEIGHTS[2],
        "num_elements": NUM_ELEMENTS, "codec": "none",
    }  # fmt: skip
    return Opening(**{**usual, **changes}).encode()


def parts_for(reducer: int) -> list[bytes]:
    """The stranger's honest parts for one of two reducers with half of the vector each."""
    parts = VECTORS[2].numpy().reshape(2, 4, PART)[reducer]
    return [part.tobytes() for part in parts]


async def speak(stranger: Peer, reducer: Peer, *, opening: bytes, frames: Frames = (), raw: bytes = b"") -> Answer:
    """Open a stream, send all this, and listen until the reducer has no more to say."""
    answer = Answer()
    protocol = f"{stranger.namespace}::calm-1.exchange"
    async with open_stream(stranger.p2p, reducer.name, protocol, timeout_seconds=10.0, traffic=Traffic()) as stream:
        await stream.send(FrameKind.OPENING, opening)
        for kind, payload in frames:
            await stream.send(kind, payload)
        if raw:
            stream._writer.write(raw)
        try:
            while not answer.kinds or answer.kinds[-1] not in (FrameKind.ENDING, FrameKind.FAILURE):
                kind, payload = await stream.receive()
                answer.kinds.append(kind)
                answer.payloads.append(payload)
        except PEER_FAULTS:
            pass
    return answer


async def two_beside(
    net: Loopback, *, openings: dict[str, Any], frames: Sequence[Frames], raw: bytes = b"", is_member: bool = True,
) -> tuple[list[RoundResult], list[Answer], str]:  # fmt: skip
    """A round of two honest trainers and a stranger who says `frames[r]` to reducer r; and the stranger's name."""
    async with net.peers(3, num_elements=NUM_ELEMENTS, strangers=[2]) as members:
        everyone = group_of(members, fractions=[0.5, 0.5, 0.0], senders=[0, 1, 2], limits=STRICT)
        group = everyone if is_member else replace(everyone, members=everyone.members[:2])
        honest = asyncio.create_task(run_all(members[:2], group, vectors=VECTORS[:2], weights=WEIGHTS[:2]))
        answers = await asyncio.gather(
            *(
                speak(members[2], members[r], opening=opening_of(group, **openings), frames=frames[r], raw=raw)
                for r in range(2)
            )
        )
        return await honest, answers, members[2].name


def frames_of(*payloads: bytes) -> Frames:
    return [(FrameKind.PART, payload) for payload in payloads]


def altered(index: int, value: float) -> bytes:
    part = np.frombuffer(parts_for(0)[1], dtype=np.float32).copy()
    part[index] = value
    return part.tobytes()


def assert_same(results: Sequence[RoundResult]) -> torch.Tensor:
    assert all(result.is_true for result in results), results
    assert len({result.digest for result in results}) == 1
    assert results[0].average is not None
    return results[0].average


FIRST = parts_for(0)[0]

BAD_SECOND_PARTS = {
    "too short": (frames_of(FIRST, parts_for(0)[1][:-4]), b"", "bytes in a part of"),
    "one element": (frames_of(FIRST, b"\0\0\x80\x3f"), b"", "4 bytes in a part of"),
    "empty": (frames_of(FIRST, b""), b"", "0 bytes in a part of"),
    "too long": (frames_of(FIRST, parts_for(0)[1] + b"1234"), b"", "in a frame of at most"),
    "a NaN": (frames_of(FIRST, altered(5, float("nan"))), b"", "not finite"),
    "an infinity": (frames_of(FIRST, altered(5, float("-inf"))), b"", "not finite"),
    "an absurd value": (frames_of(FIRST, altered(5, 1e6)), b"", "not finite, or larger"),
    "another kind of frame": ([*frames_of(FIRST), (FrameKind.ENDING, b"")], b"", "ending where a part was due"),
    "gigabytes announced": (frames_of(FIRST), PREFIX.pack(FrameKind.PART, 2**31), "in a frame of at most"),
    "noise": (frames_of(FIRST), b"\xff" * 64, "in a frame of at most"),
}


@pytest.mark.parametrize("what", BAD_SECOND_PARTS)
def test_sender_of_a_bad_part_is_banned_at_once_and_its_good_part_stays(net: Loopback, what: str) -> None:
    """In stock hivemind a part of wrong shape stalls everyone, one of one element shifts all, a NaN poisons all."""
    frames, raw, reason = BAD_SECOND_PARTS[what]
    results, answers, name = net.run(two_beside(net, openings={}, frames=[frames, frames], raw=raw))
    average = assert_same(results).reshape(8, PART)
    assert max(result.seconds for result in results) < STRICT.chunk_seconds
    honest, everyone = HONEST.reshape(8, PART), EVERYONE.reshape(8, PART)
    second_first = weighted_mean([*VECTORS[:2], VECTORS[2].roll(4 * PART)], WEIGHTS).reshape(8, PART)
    expected = torch.stack([everyone[0], *honest[1:4], second_first[4], *honest[5:]])
    assert (average - expected).abs().max() < 1e-5
    for result in results:
        assert reason in result.banned[name] and name not in result.weights
    for answer in answers:  # it goes on as a reader
        assert len(answer.averages()) == 4 and FrameKind.BAN in answer.kinds and answer.kinds[-1] == FrameKind.ENDING
    assert b"".join(answers[0].averages() + answers[1].averages()) == average.numpy().tobytes()


@pytest.mark.parametrize("weight", [float("inf"), float("nan"), -1.0, MAX_WEIGHT * 1.01])
def test_sender_of_an_absurd_weight_is_banned_before_anything_counts(net: Loopback, weight: float) -> None:
    frames = [frames_of(*parts_for(r)) for r in range(2)]
    results, _, name = net.run(two_beside(net, openings={"weight": weight}, frames=frames))
    assert (assert_same(results) - HONEST).abs().max() < 1e-5
    assert all("weight" in result.banned[name] and result.total_weight == 3.0 for result in results)
    assert max(result.seconds for result in results) < STRICT.chunk_seconds


@pytest.mark.parametrize(
    "changes", [{"epoch": 8}, {"kind": "state"}, {"num_elements": NUM_ELEMENTS + 1}, {"codec": "fp16"}]
)
def test_sender_in_another_round_than_its_group_is_refused_and_not_waited_for(
    net: Loopback, changes: dict[str, Any]
) -> None:
    frames = [frames_of(*parts_for(r)) for r in range(2)]
    results, answers, name = net.run(two_beside(net, openings=changes, frames=frames))
    assert (assert_same(results) - HONEST).abs().max() < 1e-5
    assert all("differs" in result.banned[name] for result in results)
    assert [answer.kinds for answer in answers] == [[FrameKind.FAILURE]] * 2
    assert max(result.seconds for result in results) < STRICT.chunk_seconds


def test_peer_that_is_not_in_the_group_is_refused_and_changes_nothing(net: Loopback) -> None:
    frames = [frames_of(*parts_for(r)) for r in range(2)]
    results, answers, _ = net.run(two_beside(net, openings={}, frames=frames, is_member=False))
    assert (assert_same(results) - HONEST).abs().max() < 1e-5
    assert all(not result.banned for result in results)
    assert [answer.kinds for answer in answers] == [[FrameKind.FAILURE]] * 2


def test_member_that_asks_for_an_unknown_group_is_not_kept_for_ever(
    net: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calm_ray.swarm.exchange.EARLY_SECONDS", 0.5)

    async def test() -> None:
        async with net.peers(2, num_elements=NUM_ELEMENTS, strangers=[1]) as members:
            group = group_of(members, fractions=[1.0, 0.0], senders=[0, 1])
            for opening in (
                opening_of(group),
                opening_of(group, group_id="abc"),
                b"{",
                b'{"group_id": 1}',
                b"[" * 9999,
            ):
                answer = await speak(members[1], members[0], opening=opening)
                assert answer.kinds in ([], [FrameKind.FAILURE])

    net.run(test())


def test_second_stream_of_a_member_is_refused(net: Loopback) -> None:
    """Or a member could count twice."""

    async def test() -> None:
        async with net.peers(2, num_elements=NUM_ELEMENTS, strangers=[1]) as members:
            group = group_of(members, fractions=[1.0, 0.0], senders=[0, 1], limits=STRICT)
            whole = frames_of(*parts_for(0), *parts_for(1))
            honest = asyncio.create_task(run_all(members[:1], group, vectors=VECTORS[:1], weights=[1]))
            first = asyncio.create_task(speak(members[1], members[0], opening=opening_of(group), frames=whole[:4]))
            await asyncio.sleep(0.3)
            second = await speak(members[1], members[0], opening=opening_of(group), frames=whole)
            assert second.kinds == [FrameKind.FAILURE]
            assert (await honest)[0].banned and len((await first).averages()) == 8

    net.run(test())


def test_sender_that_falls_silent_is_banned_after_its_time_and_reads_on(net: Loopback) -> None:
    frames = [frames_of(*parts_for(r)[:2]) for r in range(2)]
    results, answers, name = net.run(two_beside(net, openings={}, frames=frames))
    average = assert_same(results).reshape(2, 4, PART)
    assert (average[:, :2] - EVERYONE.reshape(2, 4, PART)[:, :2]).abs().max() < 1e-5
    assert (average[:, 2:] - HONEST.reshape(2, 4, PART)[:, 2:]).abs().max() < 1e-5
    assert all("silent" in result.banned[name] and result.total_weight == 3.0 for result in results)
    seconds = max(result.seconds for result in results)
    assert STRICT.chunk_seconds <= seconds < 2.5 * STRICT.chunk_seconds
    assert b"".join(answers[0].averages() + answers[1].averages()) == average.numpy().tobytes()


def test_sender_that_is_too_slow_for_the_round_is_banned_before_its_end(net: Loopback) -> None:
    """It is never silent for long, so that only the round's clock can stop it."""
    limits = replace(STRICT, round_seconds=6.0)

    async def trickle(stranger: Peer, reducer: Peer, group: Group) -> None:
        protocol = f"{stranger.namespace}::calm-1.exchange"
        async with open_stream(stranger.p2p, reducer.name, protocol, timeout_seconds=10.0, traffic=Traffic()) as stream:
            await stream.send(FrameKind.OPENING, opening_of(group))
            for part in parts_for(0) + parts_for(1):
                await stream.send(FrameKind.PART, part)
                await asyncio.sleep(1.2)

    async def test() -> None:
        async with net.peers(3, num_elements=NUM_ELEMENTS, strangers=[2]) as members:
            group = group_of(members, fractions=[1.0, 0.0, 0.0], senders=[0, 1, 2], limits=limits)
            slow = asyncio.create_task(trickle(members[2], members[0], group))
            results = await run_all(members[:2], group, vectors=VECTORS[:2], weights=WEIGHTS[:2])
            slow.cancel()
            await asyncio.gather(slow, return_exceptions=True)
            average = assert_same(results).reshape(8, PART)
            assert (average[0] - EVERYONE.reshape(8, PART)[0]).abs().max() < 1e-5
            assert (average[-1] - HONEST.reshape(8, PART)[-1]).abs().max() < 1e-5
            assert all("not done" in result.banned[members[2].name] for result in results)
            assert 3.5 < max(result.seconds for result in results) < 5

    net.run(test())


def test_round_in_which_most_senders_fail_is_partial_for_all(net: Loopback) -> None:
    async def test() -> None:
        async with net.peers(4, num_elements=NUM_ELEMENTS, strangers=[2, 3]) as members:
            limits = replace(STRICT, request_seconds=0.5, chunk_seconds=1.0)
            group = group_of(members, fractions=[0.5, 0.5, 0, 0], senders=[0, 2, 3], limits=limits)
            results = await run_all(members[:2], group, vectors=[VECTORS[0], None], weights=[1, 0])
            assert [result.outcome for result in results] == ["partial"] * 2
            assert all("1 of 3 senders" in result.detail and result.average is None for result in results)
            assert max(result.seconds for result in results) < 4

    net.run(test())


def test_round_whose_reducer_never_comes_is_partial_in_time(net: Loopback) -> None:
    async def test() -> None:
        async with net.peers(3, num_elements=NUM_ELEMENTS, strangers=[2]) as members:
            group = group_of(members, fractions=[0.3, 0.3, 0.4], senders=[0, 1], limits=STRICT)
            results = await run_all(members[:2], group, vectors=VECTORS[:2], weights=WEIGHTS[:2])
            assert [result.outcome for result in results] == ["partial"] * 2
            assert results[0].missing_fraction == pytest.approx(0.4, abs=0.01)
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
                for part in parts_for(1)[: left[info.peer_id.to_base58()]]:
                    await stream.send(FrameKind.PART, part)
                await asyncio.sleep(1.0)  # what was sent is on its way; then p2pd resets the stream
                stream.abort()

            protocol = f"{members[2].namespace}::calm-1.exchange"
            await members[2].p2p.add_binary_stream_handler(protocol, die)
            group = group_of(members, fractions=[0.5, 0.0, 0.5], senders=[0, 1], limits=STRICT)
            results = await run_all(members[:2], group, vectors=VECTORS[:2], weights=WEIGHTS[:2])
            await members[2].p2p.remove_binary_stream_handler(protocol)
            if is_repaired:
                average = assert_same(results)
                assert average[4 * PART :].numpy().tobytes() == b"".join(parts_for(1))
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
                await stream.until_hangup()
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
            await asyncio.sleep(delay_seconds)
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
                        await asyncio.sleep(0.2)
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
