"""Rounds over real libp2p daemons on the loopback interface: what every member ends with, and what it is told."""

import asyncio
import gc
import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from calm_ray.errors import StateUnavailable
from tests.unit.swarm.loopback import (
    LIMITS,
    Loopback,
    eventually,
    group_of,
    loopback,
    random_vector,
    run_all,
    weighted_mean,
)

# hivemind leaves sockets and subprocess transports to the garbage collector, after their loop was closed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:loop is closed:ResourceWarning"),
]

NUM_ELEMENTS = 400_000
ERRORS = {"none": 1e-6, "fp16": 2e-3, "8bit": 5e-2}
"""Largest difference to the exact mean of values of about 1."""


@pytest.fixture(scope="module")
def net() -> Iterator[Loopback]:
    with loopback() as found:
        yield found


def vector(seed: int) -> torch.Tensor:
    return random_vector(seed, NUM_ELEMENTS)


@pytest.mark.parametrize("codec", ["none", "fp16", "8bit"])
def test_exchange_of_senders_reader_and_client_gives_all_the_same_bits(net: Loopback, codec: str) -> None:
    """Three trainers, an auxiliary peer that reduces and brings nothing, and a trainer that nobody can call."""
    vectors = [vector(1), vector(2), vector(3), None, vector(4)]
    weights = [1.0, 2.0, 5.0, 0.0, 3.0]
    expected = weighted_mean([v for v in vectors if v is not None], [w for w in weights if w])

    async def test() -> None:
        async with net.peers(5, num_elements=NUM_ELEMENTS, clients=[4]) as members:
            group = group_of(members, fractions=[0.2, 0.1, 0.4, 0.3, 0.0], senders=[0, 1, 2, 4])
            results = await run_all(members, group, vectors=vectors, weights=weights, codec=codec)
            for result in results:
                assert result.is_true, result
                assert result.average is not None
                assert result.digest == hashlib.sha256(result.average.numpy().tobytes()).hexdigest()
                assert (result.average.double() - expected).abs().max() < ERRORS[codec]
                assert result.weights == {
                    peer.name: weight for peer, weight in zip(members, weights, strict=True) if weight
                }
                assert result.total_weight == 11.0
                assert (result.group_size, result.num_senders, result.missing_fraction) == (5, 4, 0.0)
                assert not result.banned
            assert len({result.digest for result in results}) == 1
            assert (results[3].residual is None, results[0].residual is None) == (True, codec != "8bit")

    net.run(test())


def test_exchange_counts_each_payload_byte_that_a_member_sends_and_gets(net: Loopback) -> None:
    """One trainer averages for two: it gets their vectors and hands each the average; the third reads."""

    async def test() -> None:
        async with net.peers(3, num_elements=NUM_ELEMENTS) as members:
            group = group_of(members, fractions=[1.0, 0.0, 0.0], senders=[0, 1])
            results = await run_all(
                members, group, vectors=[vector(1), vector(2), None], weights=[1, 1, 0], codec="fp16"
            )
            size = 2 * NUM_ELEMENTS
            assert [(result.bytes_sent, result.bytes_received) for result in results[1:]] == [(size, size), (0, size)]
            again = replace(group, group_id=b"next")
            after = await run_all(members, again, vectors=[vector(1), vector(2), None], weights=[1, 1, 0], codec="fp16")
            # What it still hands out when its own round is over is told with the next one.
            assert results[0].bytes_sent + after[0].bytes_sent > 3 * size
            assert results[0].bytes_received == size

    net.run(test())


def test_exchange_whose_reducer_leaves_at_once_still_serves_a_slow_member(net: Loopback) -> None:
    """hivemind's P13: early leavers cut their slower groupmates off."""

    async def test() -> None:
        async with net.peers(3, num_elements=NUM_ELEMENTS) as members:
            group = group_of(members, fractions=[0.5, 0.5, 0.0], senders=[0, 1])
            early = await run_all(members[:2], group, vectors=[vector(1), vector(2)], weights=[1, 1])
            leaving = asyncio.gather(*(member.exchange.close() for member in members[:2]))
            await asyncio.sleep(0.5)  # sleep: time enough to leave too early
            assert not leaving.done()
            (late,) = await run_all(members[2:], group, vectors=[None], weights=[0])
            await leaving
            assert late.is_true and {result.digest for result in [late, *early]} == {late.digest}

    net.run(test())


def test_exchange_of_an_own_vector_that_is_not_finite_only_reads(net: Loopback) -> None:
    bad = vector(3)
    bad[17] = float("nan")

    async def test() -> None:
        async with net.peers(3, num_elements=NUM_ELEMENTS) as members:
            group = group_of(members, fractions=[0.3, 0.3, 0.4], senders=[0, 1, 2])
            results = await run_all(members, group, vectors=[vector(1), vector(2), bad], weights=[1, 2, 3])
            for result in results:
                assert result.is_true and result.average is not None
                assert (result.average - weighted_mean([vector(1), vector(2)], [1, 2])).abs().max() < 1e-6
                assert members[2].name not in result.weights
            assert "not finite" in results[2].banned[members[2].name] and "not finite" in results[2].detail

    net.run(test())


def test_exchange_of_only_bad_vectors_is_non_finite_for_its_owner(net: Loopback) -> None:
    async def test() -> None:
        async with net.peers(2, num_elements=NUM_ELEMENTS) as members:
            group = group_of(members, fractions=[0.5, 0.5], senders=[0])
            bad = torch.full((NUM_ELEMENTS,), 1e9)
            results = await run_all(members, group, vectors=[bad, None], weights=[1, 0])
            assert [result.outcome for result in results] == ["non_finite", "zero_weight"]
            assert all(result.average is None for result in results)

    net.run(test())


def test_exchange_of_weights_that_are_all_zero_divides_nothing(net: Loopback) -> None:
    """Stock hivemind makes NaN of it (partition.py, no guard)."""

    async def test() -> None:
        async with net.peers(3, num_elements=NUM_ELEMENTS) as members:
            group = group_of(members, fractions=[0.5, 0.5, 0.0], senders=[0, 1, 2])
            results = await run_all(members, group, vectors=[vector(1), vector(2), None], weights=[0, 0, 0])
            assert [result.outcome for result in results] == ["zero_weight"] * 3
            assert all(result.average is None and result.seconds < 5 for result in results)

    net.run(test())


def test_exchange_without_a_reducer_or_without_company_is_told_at_once(net: Loopback) -> None:
    async def test() -> None:
        async with net.peers(2, num_elements=NUM_ELEMENTS, clients=[0, 1]) as members:
            clients = group_of(members, fractions=[0.0, 0.0], senders=[0, 1])
            results = await run_all(members, clients, vectors=[vector(1), vector(2)], weights=[1, 1])
            assert [result.outcome for result in results] == ["only_clients"] * 2
            alone = group_of(members[:1], fractions=[1.0], senders=[0])
            assert (await run_all(members[:1], alone, vectors=[vector(1)], weights=[1]))[0].outcome == "alone"

    net.run(test())


def test_fetch_last_of_a_missed_round_gives_its_average_and_no_other(net: Loopback) -> None:
    async def test() -> None:
        async with net.peers(3, num_elements=NUM_ELEMENTS, clients=[2]) as members:
            group = group_of(members[:2], fractions=[0.7, 0.3], senders=[0, 1], epoch=41)
            results = await run_all(members[:2], group, vectors=[vector(1), vector(2)], weights=[1, 2], codec="8bit")
            late = members[2].exchange
            for donor in members[:2]:
                average, digest = await late.fetch_last(donor.name, kind="gradients", epoch=41, limits=LIMITS)
                assert digest == results[0].digest
                assert results[0].average is not None and torch.equal(average, results[0].average)
                for kind, epoch in (("gradients", 40), ("gradients", 42), ("state", 41)):
                    with pytest.raises(StateUnavailable):
                        await late.fetch_last(donor.name, kind=kind, epoch=epoch, limits=LIMITS)  # type: ignore[arg-type]

    net.run(test())


def test_exchange_that_is_cancelled_leaves_nothing_and_the_others_learn_of_it(net: Loopback) -> None:
    limits = replace(LIMITS, request_seconds=2.0, chunk_seconds=2.0, round_seconds=30.0)

    async def test() -> None:
        async with net.peers(4, num_elements=NUM_ELEMENTS, strangers=[3]) as members:
            group = group_of(members, fractions=[0.3, 0.3, 0.4, 0.0], senders=[0, 1, 2, 3], limits=limits)
            before = asyncio.all_tasks()
            leaver = asyncio.create_task(run_all(members[2:3], group, vectors=[vector(3)], weights=[1]))
            others = asyncio.create_task(run_all(members[:2], group, vectors=[vector(1), vector(2)], weights=[1, 1]))
            await asyncio.sleep(1.0)  # sleep: the fourth never comes, so that all wait
            leaver.cancel()
            await asyncio.gather(leaver, return_exceptions=True)
            assert leaver.cancelled()
            results = await others
            await eventually(lambda: asyncio.all_tasks() == before)
            assert [result.outcome for result in results] == ["partial"] * 2
            assert results[0].missing_fraction == pytest.approx(0.4, abs=0.03)
            assert max(result.seconds for result in results) < limits.round_seconds / 2

    net.run(test())


def test_exchange_of_fifty_rounds_keeps_no_task_and_no_file_open(
    net: Loopback, caplog: pytest.LogCaptureFixture
) -> None:
    def num_open() -> tuple[int, int]:
        return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))

    async def test() -> None:
        num_elements = 1000
        async with net.peers(3, num_elements=num_elements) as members:
            num_tasks = num_files = 0
            for number in range(50):
                group = group_of(members, fractions=[0.3, 0.3, 0.4], senders=[0, 1], epoch=number)
                vectors = [random_vector(1, num_elements), random_vector(2, num_elements), None]
                if number % 5 == 4:  # every fifth is cancelled
                    task = asyncio.create_task(run_all(members, group, vectors=vectors, weights=[1, 1, 0]))
                    await asyncio.sleep(0.01)  # sleep: into the middle of the round
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                else:
                    results = await run_all(members, group, vectors=vectors, weights=[1, 1, 0])
                    assert all(result.is_true for result in results), results
                await asyncio.sleep(0.05)  # sleep: sockets close on the next turns
                if number == 0:
                    num_tasks, num_files = num_open()
            await eventually(lambda: num_open()[0] <= num_tasks and num_open()[1] <= num_files + 2)
            # A round's buffers go when nobody needs them any more, not when its time is over.
            await eventually(lambda: not any(member.exchange._rounds.begun for member in members))

    net.run(test())
    gc.collect()
    assert "never retrieved" not in caplog.text, "a cancelled round leaves no noise in the log"


@pytest.mark.parametrize("is_fed_back", [True, False])
def test_exchange_in_8_bits_loses_nothing_in_the_long_run_thanks_to_feedback(net: Loopback, is_fed_back: bool) -> None:
    """Gradients of which most are too small for their block's scale, and shares that change from round to round."""
    num_elements, num_rounds, weights = 6000, 50, [3.0, 5.0]
    signal = torch.full((num_elements,), 1e-3)
    signal[::512] = 1.0

    async def test() -> list[float]:
        errors = []
        async with net.peers(2, num_elements=num_elements) as members:
            true, given = torch.zeros(num_elements).double(), torch.zeros(num_elements).double()
            owed: list[torch.Tensor] = [torch.zeros(num_elements)] * 2
            for number in range(num_rounds):
                if not is_fed_back:
                    for member in members:
                        member.exchange._carried.clear()
                gradients = [signal * (1 + 0.5 * torch.rand(num_elements)) for _ in members]
                vectors = [g + (o / w if is_fed_back else 0) for g, o, w in zip(gradients, owed, weights, strict=True)]
                share = 0.2 + 0.6 * (number % 7) / 6
                group = group_of(members, fractions=[share, 1 - share], senders=[0, 1], epoch=number)
                results = await run_all(members, group, vectors=vectors, weights=weights, codec="8bit")
                average = results[0].average
                assert all(result.is_true and result.digest == results[0].digest for result in results)
                assert average is not None
                owed = [result.residual for result in results if result.residual is not None]
                true += weighted_mean(gradients, weights)
                given += average
                errors.append(float((true - given).abs().max()))
        return errors

    errors = net.run(test())
    if is_fed_back:
        assert max(errors) < 0.03 and max(errors[25:]) < 1.5 * max(errors[:25])
    else:
        assert errors[-1] > 0.9 * num_rounds * 1e-3, "small gradients never arrive"
