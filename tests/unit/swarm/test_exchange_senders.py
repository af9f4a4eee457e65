"""Senders that break the rules or fall silent, over real libp2p: nobody stalls, and what is averaged is right."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from calm_ray.swarm.exchange_frames import PREFIX, FrameKind, Traffic, open_stream
from calm_ray.swarm.group import Group
from calm_ray.swarm.verdict import RoundResult
from tests.unit.swarm.loopback import (
    MAX_WEIGHT,
    Loopback,
    Peer,
    group_of,
    loopback,
    run_all,
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
    by_slice,
    frames_of,
    listen,
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
    "too short": (parts_for(0)[1][:-4], "bytes in a part of"),
    "one element": (b"\0\0\x80\x3f", "4 bytes in a part of"),
    "empty": (b"", "0 bytes in a part of"),
    "a NaN": (altered(5, float("nan")), "not finite"),
    "an infinity": (altered(5, float("-inf")), "not finite"),
    "an absurd value": (altered(5, 1e6), "not finite, or larger"),
}
BROKEN_FRAMES = {
    "too long": (PREFIX.pack(FrameKind.PART, PART * 4 + 1) + bytes(PART * 4 + 1), "in a frame of kind 2"),
    "gigabytes announced": (PREFIX.pack(FrameKind.PART, 2**31), "in a frame of kind 2"),
    "another kind": (PREFIX.pack(FrameKind.ENDING, 0), "ending where none was due"),
    "an unknown kind": (PREFIX.pack(99, 0), "in a frame of kind 99"),
    "noise": (b"\xff" * 64, "in a frame of kind 255"),
    "a confirmation of nothing": ((PREFIX.pack(FrameKind.CONFIRMED, 8) + bytes(8)) * 100, "never sent"),
}


def expect_first_part_only(results: Sequence[RoundResult], name: str, reason: str) -> torch.Tensor:
    """The stranger's first part of each slice is in the average, its others are not; its ban is told everywhere."""
    average = by_slice(assert_same(results))
    assert max(result.seconds for result in results) < STRICT.chunk_seconds
    expected = by_slice(HONEST).clone()
    for slice_, honest in zip(expected, by_slice(VECTORS[0] + 2 * VECTORS[1]), strict=True):
        slice_[0] = (honest[0] + WEIGHTS[2] * by_slice(VECTORS[2])[0, 0]) / sum(WEIGHTS)
    assert (average - expected).abs().max() < 1e-5
    for result in results:
        assert reason in result.banned[name] and name not in result.weights
    return average


@pytest.mark.parametrize("what", BAD_SECOND_PARTS)
def test_sender_of_a_bad_part_is_banned_at_once_and_reads_on(net: Loopback, what: str) -> None:
    """In stock hivemind a part of wrong shape stalls everyone, one of one element shifts all, a NaN poisons all."""
    part, reason = BAD_SECOND_PARTS[what]
    results, answers, name = net.run(two_beside(net, openings={}, frames=[frames_of(FIRST, part)] * 2))
    average = expect_first_part_only(results, name, reason)
    for answer in answers:
        assert len(answer.averages()) == 4 and FrameKind.BAN in answer.kinds and answer.kinds[-1] == FrameKind.ENDING
    assert b"".join(answers[0].averages() + answers[1].averages()) == average.contiguous().numpy().tobytes()


@pytest.mark.parametrize("what", BROKEN_FRAMES)
def test_sender_of_a_broken_frame_is_banned_and_hung_up_on(net: Loopback, what: str) -> None:
    raw, reason = BROKEN_FRAMES[what]
    results, answers, name = net.run(two_beside(net, openings={}, frames=[frames_of(FIRST)] * 2, raw=raw))
    expect_first_part_only(results, name, reason)
    assert all(FrameKind.ENDING not in answer.kinds for answer in answers)


def test_sender_of_two_weights_is_banned(net: Loopback) -> None:
    """Each reducer sees only its own streams; but of those it compares the weights."""

    async def test() -> None:
        async with net.peers(3, num_elements=NUM_ELEMENTS, strangers=[2]) as members:
            group = group_of(members, fractions=[0.5, 0.5, 0.0], senders=[0, 1, 2], limits=STRICT)
            honest = asyncio.create_task(run_all(members[:2], group, vectors=VECTORS[:2], weights=WEIGHTS[:2]))
            answers = await asyncio.gather(
                *(
                    speak(members[2], members[number // 2], opening=opening_of(group, slice=number, weight=weight))
                    for number, weight in enumerate([1.0, 2.0, 3.0, 3.5])
                )
            )
            results = await honest
            assert (assert_same(results) - HONEST).abs().max() < 1e-5
            assert all("one weight" in result.banned[members[2].name] for result in results)
            assert [FrameKind.FAILURE] in [answer.kinds for answer in answers]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calm_ray.swarm.parts.MIN_STREAMS", 4)
        net.run(test())


def test_sender_that_is_banned_in_one_slice_is_banned_in_all_of_that_reducer(net: Loopback) -> None:
    async def test() -> None:
        async with net.peers(2, num_elements=NUM_ELEMENTS, strangers=[1]) as members:
            group = group_of(members, fractions=[1.0, 0.0], senders=[0, 1], limits=STRICT)
            honest = asyncio.create_task(run_all(members[:1], group, vectors=VECTORS[:1], weights=[1]))
            answers = await asyncio.gather(
                speak(members[1], members[0], opening=opening_of(group, slice=0), frames=frames_of(b"short")),
                *(speak(members[1], members[0], opening=opening_of(group, slice=s)) for s in range(1, 4)),
            )
            (result,) = await honest
            assert torch.equal(assert_same([result]), VECTORS[0])
            assert result.seconds < STRICT.chunk_seconds
            assert all(FrameKind.BAN in answer.kinds and len(answer.averages()) == 2 for answer in answers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calm_ray.swarm.parts.MIN_STREAMS", 4)
        net.run(test())


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
    monkeypatch.setattr("calm_ray.swarm.exchange_lobby.EARLY_SECONDS", 0.5)

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
    average = by_slice(assert_same(results))
    assert (average[:, :2] - by_slice(EVERYONE)[:, :2]).abs().max() < 1e-5
    assert (average[:, 2:] - by_slice(HONEST)[:, 2:]).abs().max() < 1e-5
    assert all("silent" in result.banned[name] and result.total_weight == 3.0 for result in results)
    seconds = max(result.seconds for result in results)
    assert STRICT.chunk_seconds <= seconds < 2.5 * STRICT.chunk_seconds
    assert b"".join(answers[0].averages() + answers[1].averages()) == average.contiguous().numpy().tobytes()


def test_sender_that_is_too_slow_for_the_round_is_banned_before_its_end(net: Loopback) -> None:
    """It is never silent for long, so that only the round's clock can stop it."""
    limits = replace(STRICT, round_seconds=6.0)

    async def trickle(stranger: Peer, reducer: Peer, group: Group) -> None:
        protocol = f"{stranger.namespace}::calm-1.exchange"
        async with open_stream(stranger.p2p, reducer.name, protocol, timeout_seconds=10.0, traffic=Traffic()) as stream:
            await stream.send(FrameKind.OPENING, opening_of(group))
            listening = asyncio.create_task(listen(stream))
            for part in VECTORS[2].reshape(8, PART):
                await stream.send(FrameKind.PART, part.numpy().tobytes())
                await asyncio.sleep(1.2)  # sleep: it is slow
            await listening

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
