"""What is goodput, what is lost and to what, and what one fault costs, on rounds made by hand."""

import pytest

from benchmarks.fault_account import (
    BACK_OFF,
    DOWNLOAD,
    LOST_WORK,
    SLOWER,
    TRAINING,
    Hold,
    Round,
    Span,
    cost_of,
    goodput,
    missing_epochs,
    rate_of,
    spans_of,
)

ALL = {"a": 100.0, "b": 100.0}


def _rounds(*at: float) -> list[Round]:
    return [Round(at=t, epoch=i, samples=ALL) for i, t in enumerate(at)]


def test_goodput_of_a_swarm_that_loses_nothing_is_one() -> None:
    found = goodput(_rounds(0, 10, 20), spans=[], holds=[], computed=400, solo_rate=10, num_trainers=2)
    assert found.share == 1.0
    assert found.useful_samples == 400, "the round that starts the clock does not count"
    assert (found.num_rounds, found.seconds) == (2, 20)
    assert set(found.lost.values()) == {0.0}


def test_goodput_and_what_is_lost_add_up_to_one() -> None:
    spans = [
        Span(name="a", start=-5, end=2, phase=BACK_OFF), Span(name="b", start=10, end=14, phase=DOWNLOAD),
        Span(name="b", start=14, end=60, phase=TRAINING),
    ]  # fmt: skip
    found = goodput(_rounds(0, 20, 40), spans=spans, holds=[], computed=440, solo_rate=10, num_trainers=2)
    assert found.share == 0.5
    assert found.lost[BACK_OFF] == pytest.approx(2 / 80)
    assert found.lost[DOWNLOAD] == pytest.approx(4 / 80)
    assert found.lost[LOST_WORK] == pytest.approx(40 / 800)
    assert found.share + sum(found.lost.values()) == pytest.approx(1.0)
    assert found.lost[SLOWER] > 0


def test_goodput_excuses_only_what_the_schedule_holds_down() -> None:
    holds = [Hold(name="a", start=5, end=15), Hold(name="a", start=-20, end=-5)]
    spans = [Span(name="a", start=5, end=18, phase=BACK_OFF)]
    found = goodput(_rounds(0, 20), spans=spans, holds=holds, computed=200, solo_rate=10, num_trainers=2)
    assert found.held_seconds == 10
    assert found.share == pytest.approx(200 / (10 * 30))
    assert found.lost[BACK_OFF] == pytest.approx(3 / 30), "the restart that it led to is ours"


def test_time_without_a_round_counts_until_the_given_end() -> None:
    found = goodput(_rounds(0, 10, 20), spans=[], holds=[], computed=400, solo_rate=10, num_trainers=2, end=40)
    assert (found.share, found.seconds) == (0.5, 40)


def test_goodput_without_two_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        goodput(_rounds(0), spans=[], holds=[], computed=0, solo_rate=10, num_trainers=2)


def test_fault_that_changed_nothing_costs_nothing() -> None:
    cost = cost_of(_rounds(0, 10, 20, 30), fault_at=12, back_at=20, rate=20, held_samples=0, target=200)
    assert (cost.samples, cost.epochs) == (0, 0)


def test_fault_costs_what_the_rate_had_promised_less_what_came_and_what_is_excused() -> None:
    cost = cost_of(_rounds(0, 10, 30), fault_at=12, back_at=29, rate=20, held_samples=50, target=200)
    assert cost.samples == 20 * 20 - 200 - 50
    assert cost.epochs == cost.samples / 200


def test_fault_that_nobody_comes_back_from_costs_all_until_the_limit() -> None:
    assert cost_of(_rounds(0, 10), fault_at=10, back_at=40, rate=20, held_samples=0, target=200).samples == 600


def test_rate_is_that_of_the_last_rounds_before() -> None:
    assert rate_of(_rounds(0, 100, 110, 120, 130, 999), until=131) == 20
    with pytest.raises(ValueError, match="no rate"):
        rate_of(_rounds(0, 10), until=5)


def test_changes_become_spans_until_the_end() -> None:
    spans = spans_of({"a": [(0, "x"), (5, "y")]}, end=9)
    assert [(s.start, s.end, s.phase) for s in spans] == [(0, 5, "x"), (5, 9, "y")]


def test_epochs_of_a_feed_are_each_there_once() -> None:
    assert missing_epochs([0, 1, 2], first=0, last=2) == ([], [])
    assert missing_epochs([0, 2, 2, 5], first=0, last=3) == ([1, 3], [2])
