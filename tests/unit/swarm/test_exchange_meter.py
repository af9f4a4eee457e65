"""What a peer takes its own line for."""

import pytest

from calm_ray.swarm.exchange_meter import NUM_ROUNDS, RateMeter


def send(meter: RateMeter, *rates: float, per_second: int = 10) -> None:
    """One round: `rates` in bytes per second, a second each, in `per_second` parts."""
    for second, rate in enumerate(rates):
        for part in range(per_second):
            meter.note(int(rate / per_second), now=100 + second + part / per_second)
    meter.end_round()


def test_nothing_is_known_before_a_round_of_three_seconds() -> None:
    meter = RateMeter()
    send(meter)
    send(meter, 1e6)
    send(meter, 1e6, 1e6)
    assert meter.bytes_per_second is None


def test_the_best_whole_second_counts_not_the_wait_for_others() -> None:
    meter = RateMeter()
    send(meter, 4e6, 25e6, 20e6, 1e5, 1e5, 1e5, 1e5)
    assert meter.bytes_per_second == pytest.approx(25e6)


def test_first_and_last_second_do_not_count() -> None:
    meter = RateMeter()
    send(meter, 90e6, 2e6, 90e6)
    assert meter.bytes_per_second == pytest.approx(2e6)


def test_a_line_that_got_slower_is_found_out() -> None:
    meter = RateMeter()
    send(meter, 1, 20e6, 1)
    for _ in range(NUM_ROUNDS):
        send(meter, 1, 5e6, 1)
    assert meter.bytes_per_second == pytest.approx(5e6)


def test_memory_is_bounded_however_long_a_round_lasts() -> None:
    meter = RateMeter()
    for second in range(10_000):
        meter.note(1000, now=float(second))
    assert len(meter._bins) <= 600
