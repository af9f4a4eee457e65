import time

import pytest

from calm_ray.training.pace import Pace, busy_clock


@pytest.mark.parametrize(("duty_cycle", "rest"), [(1.0, 0.0), (0.5, 1.5), (0.25, 5.5)])
def test_rest_makes_the_share(duty_cycle: float, rest: float) -> None:
    pace = Pace(duty_cycle)
    pace.note(2.0)
    assert pace.rest_after(2.5) == pytest.approx(rest)


def test_who_is_late_rests_no_more() -> None:
    pace = Pace(0.5)
    pace.note(1.0)
    assert pace.rest_after(30.0) == 0.0


def test_one_slow_micro_batch_does_not_lengthen_the_rest() -> None:
    pace = Pace(0.5)
    for seconds in (1.0, 1.0, 1.0, 1.0, 30.0):
        pace.note(seconds)
    assert pace.rest_after(1.0) == pytest.approx(1.0)


def test_lasting_change_is_followed() -> None:
    pace = Pace(0.5)
    for seconds in (*[1.0] * 16, *[3.0] * 9):
        pace.note(seconds)
    assert pace.rest_after(3.0) == pytest.approx(3.0)


def test_time_that_a_thread_did_not_get_is_not_counted_on_a_cpu() -> None:
    clocks = {device: busy_clock(device) for device in ("cpu", "cuda:0")}
    began = {device: clock() for device, clock in clocks.items()}
    time.sleep(0.1)  # sleep: it is what is measured
    taken = {device: clock() - began[device] for device, clock in clocks.items()}
    assert taken["cpu"] < 0.05
    assert taken["cuda:0"] >= 0.1
