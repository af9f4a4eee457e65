"""How much a stream lets be on its way: more while parts come through quickly, less while they wait."""

import pytest

from calm_ray.swarm.exchange_window import MAX_PARTS, MIN_PARTS, TARGET_SECONDS, Window


def room_after(num_parts: int, *, waiting_seconds: float, base_seconds: float = 0.02, offset: float = 1e6) -> int:
    """Parts that a new window lets be on their way after so many came through with that wait, clocks apart."""
    window, now = Window(), 0.0
    for number in range(num_parts):
        window.on_sent(now)
        assert window.on_confirmed(now + offset + base_seconds + (waiting_seconds if number else 0.0))
        now += 0.1
    room = 0
    while window.has_room:
        window.on_sent(now)
        room += 1
    return room


def test_window_begins_small_and_takes_no_more_than_fits() -> None:
    assert room_after(0, waiting_seconds=0.0) == MIN_PARTS


def test_window_of_parts_that_do_not_wait_grows_to_its_bound() -> None:
    assert MIN_PARTS < room_after(20, waiting_seconds=0.0) < room_after(100, waiting_seconds=0.0)
    assert room_after(10_000, waiting_seconds=0.0) == MAX_PARTS


def test_window_of_parts_that_wait_too_long_shrinks_to_its_least() -> None:
    assert room_after(500, waiting_seconds=3 * TARGET_SECONDS) == MIN_PARTS


@pytest.mark.parametrize("rate", [3.0, 10.0, 30.0])
def test_window_over_a_line_that_serves_one_part_after_another_keeps_the_target(rate: float) -> None:
    """Parts per second; sent as there is room. A part that finds the line free meets no wait."""
    window, now, free_at, waits, on_the_way = Window(), 0.0, 0.0, [], []
    for _ in range(2000):
        while window.has_room:
            window.on_sent(now)
            free_at = max(free_at, now) + 1 / rate
            on_the_way.append(free_at)
            waits.append(free_at - now - 1 / rate)
        now = on_the_way.pop(0)
        assert window.on_confirmed(now)
    assert max(waits[500:]) <= max(TARGET_SECONDS, (MIN_PARTS - 1) / rate) + 1.5 / rate


def test_window_refuses_a_confirmation_of_nothing() -> None:
    assert not Window().on_confirmed(1.0)
