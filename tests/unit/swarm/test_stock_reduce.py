"""What our reducer on hivemind's wire counts, and what it refuses; stock's own beside it. No sockets."""

import asyncio
import math
from collections.abc import Awaitable
from typing import Any

import pytest
import torch
from hivemind.averaging.partition import BannedException, TensorPartReducer

from calm_ray.swarm.stock_reduce import MAX_MAGNITUDE, CheckedContainer, CheckedReducer, ReduceReport, flaw_of

SHAPE = torch.Size([4])
MAX_WEIGHT = 1000.0


def reducer(num_senders: int = 2, num_parts: int = 1) -> CheckedReducer:
    return CheckedReducer((SHAPE,) * num_parts, num_senders, max_weight=MAX_WEIGHT)


async def soon(*steps: Awaitable[Any]) -> list[Any]:
    """What each gave or raised; TimeoutError if they wait for each other in vain."""
    async with asyncio.timeout(5):
        return await asyncio.gather(*steps, return_exceptions=True)


def full(value: float) -> torch.Tensor:
    return torch.full(SHAPE, value)


@pytest.mark.parametrize(
    ("part", "weight", "reason"),
    [
        (full(math.nan), 1.0, "not finite"),
        (full(-math.inf), 1.0, "not finite"),
        (full(2 * MAX_MAGNITUDE), 1.0, "as large as"),
        (full(1.0), math.nan, "weight nan"),
        (full(1.0), -1.0, "weight -1"),
        (full(1.0), 2 * MAX_WEIGHT, "weight 2000"),
        (torch.ones(1), 1.0, "part of"),
        (torch.ones(3), 1.0, "part of"),
        (torch.ones(2, 2), 1.0, "part of"),
        (torch.ones(SHAPE, dtype=torch.float64), 1.0, "float64"),
        (torch.ones(SHAPE, dtype=torch.int64), 1.0, "int64"),
    ],
)
def test_part_that_cannot_be_right_is_refused_before_it_counts(part: torch.Tensor, weight: float, reason: str) -> None:
    async def test() -> None:
        ours = reducer()
        honest = asyncio.create_task(ours.accumulate_part(0, 0, full(3.0), weight=2.0))
        (refused,) = await soon(ours.accumulate_part(1, 0, part, weight=weight))
        assert isinstance(refused, BannedException) and reason in ours.violations[1]
        ours.on_sender_failed(1)
        assert torch.equal(await honest, full(3.0))
        assert ours.weights == {0: 2.0}

    asyncio.run(test())


def test_stock_counts_one_element_for_a_whole_part() -> None:
    """Torch broadcasts it: one number shifts thousands. Fails the day hivemind mends it."""

    async def test() -> None:
        stock = TensorPartReducer((SHAPE,), 2)
        averages = await soon(stock.accumulate_part(0, 0, full(1.0)), stock.accumulate_part(1, 0, torch.full((1,), 99)))
        assert all(torch.equal(average, full(50.0)) for average in averages)

    asyncio.run(test())


def test_sender_that_changes_its_weight_is_refused_from_there_on() -> None:
    async def test() -> None:
        ours = reducer(num_parts=2)
        first = await soon(ours.accumulate_part(0, 0, full(1.0), weight=1.0), ours.accumulate_part(1, 0, full(3.0)))
        assert all(torch.equal(average, full(2.0)) for average in first)
        (refused,) = await soon(ours.accumulate_part(1, 1, full(3.0), weight=9.0))
        assert isinstance(refused, BannedException)
        ours.on_sender_failed(1)
        assert torch.equal((await soon(ours.accumulate_part(0, 1, full(1.0))))[0], full(1.0))

    asyncio.run(test())


def test_reader_gets_the_average_for_one_zero() -> None:
    async def test() -> None:
        ours = reducer(3)
        averages = await soon(
            ours.accumulate_part(0, 0, full(1.0), weight=1.0), ours.accumulate_part(1, 0, torch.zeros(1), weight=0.0),
            ours.accumulate_part(2, 0, full(5.0), weight=3.0),
        )  # fmt: skip
        assert all(torch.equal(average, full(4.0)) for average in averages)

    asyncio.run(test())


def test_stock_divides_by_a_total_weight_of_zero() -> None:
    async def test() -> None:
        stock = TensorPartReducer((SHAPE,), 2)
        averages = await soon(*(stock.accumulate_part(n, 0, full(1.0), weight=0.0) for n in range(2)))
        assert all(average.isnan().all() for average in averages)

    asyncio.run(test())


def test_without_any_weight_bare_peers_keep_what_they_have_and_readers_are_told() -> None:
    async def test() -> None:
        ours = reducer()
        bare, reader = await soon(
            ours.accumulate_part(0, 0, full(7.0), weight=0.0), ours.accumulate_part(1, 0, torch.zeros(1), weight=0.0)
        )
        assert torch.equal(bare, full(7.0)) and reader.isnan().all() and ours.is_weightless

    asyncio.run(test())


@pytest.mark.parametrize("is_ours", [False, True], ids=["stock", "ours"])
def test_sender_that_dies_while_all_wait_for_another(is_ours: bool) -> None:
    """Stock lets the one who dies cancel what the others wait for: they fail with it."""

    async def test() -> None:
        tested = reducer(3) if is_ours else TensorPartReducer((SHAPE,), 3)
        waiting = asyncio.create_task(tested.accumulate_part(0, 0, full(1.0)))
        dying = asyncio.create_task(tested.accumulate_part(1, 0, full(3.0)))
        await asyncio.sleep(0)  # sleep: lets both begin
        dying.cancel()
        await asyncio.wait({dying})
        last = (await soon(tested.accumulate_part(2, 0, full(5.0))))[0]
        found = (await soon(waiting))[0]
        if is_ours:
            assert torch.equal(found, full(3.0)) and torch.equal(last, full(3.0))
        else:
            assert isinstance(found, asyncio.CancelledError)

    asyncio.run(test())


@pytest.mark.parametrize("is_ours", [False, True], ids=["stock", "ours"])
def test_sender_that_dies_before_its_turn(is_ours: bool) -> None:
    """It has sent its second part, and others not their first: stock waits for what it had only received, for ever."""

    async def test() -> None:
        tested = reducer(2, 2) if is_ours else TensorPartReducer((SHAPE,) * 2, 2)
        first = asyncio.create_task(tested.accumulate_part(1, 0, full(3.0)))
        early = asyncio.create_task(tested.accumulate_part(1, 1, full(3.0)))
        await asyncio.sleep(0)  # sleep: lets both begin
        early.cancel()
        await asyncio.wait({early})
        tested.on_sender_failed(1)
        await tested.accumulate_part(0, 0, full(1.0))
        assert torch.equal(await first, full(2.0))
        second = asyncio.create_task(tested.accumulate_part(0, 1, full(1.0)))
        await asyncio.wait({second}, timeout=0.2)
        assert second.done() == is_ours
        assert not is_ours or torch.equal(await second, full(1.0))
        second.cancel()

    asyncio.run(test())


@pytest.mark.parametrize(
    "answer", [full(math.nan), full(1e30), torch.ones(3), torch.ones(1), torch.ones(SHAPE, dtype=torch.float64)]
)
def test_average_that_cannot_be_right_counts_as_missing(answer: torch.Tensor) -> None:
    async def test() -> None:
        container = CheckedContainer([full(1.0)], [1.0])
        with pytest.raises(ValueError, match="average"):
            container.register_processed_part(0, 0, answer)
        container.register_failed_reducer(0)
        assert container.failed_size == container.total_size
        assert container.is_foul == (answer.shape == SHAPE and answer.dtype == torch.float32)

    asyncio.run(test())


def report(**values: Any) -> ReduceReport:
    usual: dict[str, Any] = {
        "is_weightless": False, "is_foul": False, "missing_fraction": 0.0, "failures": {}, "banned": {},
        "weights": {"a": 1.0, "b": 2.0}, "num_senders": 2,
    }  # fmt: skip
    return ReduceReport(**{**usual, **values})


@pytest.mark.parametrize(
    ("values", "outcome"),
    [
        ({}, "averaged"),
        ({"weights": {}}, "averaged"),  # we reduced nothing: nothing is known
        ({"num_senders": 4}, "averaged"),
        ({"num_senders": 5}, "partial"),
        ({"missing_fraction": 0.01}, "partial"),
        ({"missing_fraction": 0.5, "is_foul": True}, "non_finite"),
        ({"is_weightless": True, "missing_fraction": 0.5, "is_foul": True}, "zero_weight"),
    ],
)
def test_outcome_is_named_by_its_worst_cause(values: dict[str, Any], outcome: str) -> None:
    assert report(**values).judge()[0] == outcome


def test_flaw_of_an_empty_tensor_is_none() -> None:
    assert flaw_of(torch.empty(0)) == ""
