"""What levels off, and what does not."""

import random

import pytest

from benchmarks.soak_fit import fit


def _fit(values: list[float], *, every: float = 10.0, share: float = 0.05, tolerated: float = 1.0):
    return fit([(every * i, value) for i, value in enumerate(values)], tolerated_share=share, tolerated=tolerated)


def test_growth_without_end_is_found_through_noise() -> None:
    rng = random.Random(0)
    found = _fit([100 + i * 0.1 + rng.uniform(-1, 1) for i in range(270)])  # 0.1 in 10 s
    assert not found.does_level_off
    assert found.per_hour == pytest.approx(36, rel=0.1)


def test_what_fills_up_at_first_and_then_stays_levels_off() -> None:
    found = _fit([min(i, 100) for i in range(270)])
    assert found.does_level_off
    assert found.per_hour == 0
    assert found.last == 100


def test_spikes_and_a_rotated_log_do_not_count() -> None:
    assert _fit([900.0 if i in (150, 200, 268, 269) else 100.0 for i in range(270)]).does_level_off
    assert _fit([float(i % 50) for i in range(270)], tolerated=20).does_level_off


def test_what_shrinks_levels_off() -> None:
    assert _fit([300.0 - i for i in range(270)]).does_level_off


def test_a_little_growth_is_tolerated_by_share_or_by_amount() -> None:
    values = [1000 + i * 0.1 for i in range(270)]
    assert _fit(values, share=0.05).does_level_off
    assert not _fit(values, share=0.01, tolerated=1).does_level_off
    assert _fit(values, share=0.0, tolerated=40).does_level_off


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="sample for longer"):
        _fit([1.0, 2.0, 3.0])
