"""The clock of strangers: what a median makes of liars, and what is refused. Real desks are asked in test_doctor.py."""

import asyncio
from types import SimpleNamespace

import pytest

from calm_ray.swarm.clock_offset import ClockOffset, ClockReading, combine, parse_time, read_clock


def reading(offset: float, error: float = 0.01) -> ClockReading:
    return ClockReading(offset_seconds=offset, error_seconds=error)


def test_median_of_three_is_not_moved_by_one_liar() -> None:
    found = combine([reading(0.02), reading(1e9), reading(0.05, 0.2)])
    assert found == ClockOffset(offset_seconds=0.05, error_seconds=0.2, num_desks=3, num_agreeing=2)
    assert found.is_agreed


@pytest.mark.parametrize("order", [(0.0, 10.0), (10.0, 0.0)])
def test_two_that_contradict_each_other_do_not_agree(order: tuple[float, float]) -> None:
    found = combine([reading(offset) for offset in order])
    assert found is not None
    assert found.offset_seconds == 5.0
    assert not found.is_agreed


def test_two_that_agree_give_their_mean_and_the_larger_error() -> None:
    found = combine([reading(-4.0, 0.1), reading(-4.2, 0.3)])
    assert found is not None
    assert found.offset_seconds == pytest.approx(-4.1)
    assert found.error_seconds == 0.3
    assert found.is_agreed


def test_one_alone_agrees_with_itself_and_none_give_nothing() -> None:
    alone = combine([reading(7.0)])
    assert alone is not None and alone.is_agreed
    assert combine([]) is None


@pytest.mark.parametrize(
    ("offset", "error", "exceeds"), [(3.2, 0.1, True), (-3.2, 0.1, True), (3.2, 0.5, False), (2.9, 0.0, False)]
)
def test_offset_exceeds_a_limit_only_beyond_its_error(offset: float, error: float, exceeds: bool) -> None:
    found = combine([reading(offset, error)])
    assert found is not None
    assert found.exceeds(3.0) is exceeds


@pytest.mark.parametrize("answer", ["1790000000", "1790000000.5", "1790000000.123456"])
def test_time_is_read(answer: str) -> None:
    assert parse_time(answer) == float(answer)


@pytest.mark.parametrize(
    "answer", ["", "now", "nan", "inf", "-1790000000", "1e9", "1" * 400, "1790000000.", " 1790000000", "١٧٩٠٠٠٠٠٠٠"]
)
def test_what_is_no_time_is_refused(answer: str) -> None:
    with pytest.raises(ValueError, match="not a time"):
        parse_time(answer)


def test_quickest_of_a_few_answers_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round trips of 4, 0.2 and 1 s; the desk is 2 s ahead, and only the second answer comes the same way back."""
    clock = {"now": 0.0}
    trips = iter([(3.9, 0.1), (0.1, 0.1), (0.9, 0.1)])
    faked = SimpleNamespace(monotonic=lambda: clock["now"], time=lambda: 1_790_000_000 + clock["now"])
    monkeypatch.setattr("calm_ray.swarm.clock_offset.time", faked)

    async def ask() -> str:
        there, back = next(trips)
        clock["now"] += there
        answer = f"{1_790_000_002 + clock['now']:.6f}"
        clock["now"] += back
        return answer

    found = asyncio.run(read_clock(ask))
    assert found.offset_seconds == pytest.approx(-2.0, abs=1e-5)
    assert found.error_seconds == pytest.approx(0.1)
