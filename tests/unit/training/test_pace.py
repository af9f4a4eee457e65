import pytest

from calm_ray.training.pace import Pace


@pytest.mark.parametrize(("duty_cycle", "rest"), [(1.0, 0.0), (0.5, 2.0), (0.25, 6.0)])
def test_rest_makes_the_share(duty_cycle: float, rest: float) -> None:
    assert Pace(duty_cycle).rest_after(2.0) == pytest.approx(rest)


def test_one_slow_micro_batch_does_not_lengthen_the_rest() -> None:
    pace = Pace(0.5)
    for _ in range(5):
        pace.rest_after(1.0)
    assert pace.rest_after(30.0) == pytest.approx(1.0)


def test_lasting_change_is_followed() -> None:
    pace = Pace(0.5)
    for _ in range(16):
        pace.rest_after(1.0)
    assert [pace.rest_after(3.0) for _ in range(9)][-1] == pytest.approx(3.0)
