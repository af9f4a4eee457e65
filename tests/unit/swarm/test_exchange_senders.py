"""Senders that break the rules or fall silent, over real libp2p: nobody stalls, and what is averaged is right."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from calm_ray.swarm.exchange_frames import PREFIX, FrameKind, Traffic, open_stream
from calm_ray.swarm.group import Group
from tests.unit.swarm.loopback import (
    MAX_WEIGHT,
    Loopback,
    Peer,
    group_of,
    loopback,
    run_all,
    weighted_mean,
)
from tests.unit.swarm.strangers import (
    EVERYONE,
    HONEST,
    NUM_ELEMENTS,
    PART,
    STRICT,
    VECTORS,
    WEIGHTS,
    altered,
    assert_same,
    frames_of,
    opening_of,
    parts_for,
    speak,
    two_beside,
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
            await asyncio.sleep(0.3)  # sleep: the first is at its parts
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
                await asyncio.sleep(1.2)  # sleep: it is slow

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
