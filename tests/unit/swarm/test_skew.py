"""Ages of records when somebody's clock is wrong."""

import pytest

from calm_ray.swarm.skew import MAX_PEERS, NUM_LAGS, Skews

LAG = 0.4
"""Seconds that a record takes to be read."""
PERIOD = 5.0


def ages(offsets: list[float], *, read_seconds: float = 0.0) -> list[float]:
    """Ages that we see, record by record, of a peer whose clock is ahead of ours by `offsets`."""
    skews, found = Skews(), []
    for number, offset in enumerate(offsets):
        written = 1000 + PERIOD * number
        now = written + LAG
        found.append(now - skews.on_our_clock("a", written + offset, now=now, read_seconds=read_seconds))
    return found


@pytest.mark.parametrize("offset", [0.0, 1.0, -2.0])
def test_honest_times_are_left_alone(offset: float) -> None:
    assert ages([offset] * 5) == pytest.approx([LAG - offset] * 5)


@pytest.mark.parametrize("offset", [10.0, 3600.0, -10.0, -3600.0])
def test_peer_whose_clock_is_wrong_is_as_young_as_its_record(offset: float) -> None:
    assert ages([offset] * 5) == pytest.approx([0.0] * 5)


def test_clock_that_jumps_is_followed() -> None:
    assert ages([0.0, 0.0, 10.0, 10.0])[2:] == pytest.approx([0.0, 0.0])
    back = ages([10.0] * 4 + [0.0] * (NUM_LAGS + 2))
    assert max(back) < 15.0, "nobody is taken for dead meanwhile"
    assert back[-1] == pytest.approx(LAG)


def test_record_that_stays_the_same_grows_old() -> None:
    skews = Skews()
    seen = [now - skews.on_our_clock("a", 1010.0, now=now) for now in (1000.0, 1020.0, 1060.0)]
    assert seen == pytest.approx([0.0, 20.0, 60.0])


def test_slow_reader_blames_itself_first() -> None:
    assert ages([-15.0] * 3, read_seconds=10.0) == pytest.approx([15.0 + LAG] * 3)


def test_memory_is_bounded() -> None:
    skews = Skews()
    for number in range(3 * MAX_PEERS):
        skews.on_our_clock(str(number), 0.0, now=0.0)
    assert len(skews._lags) <= MAX_PEERS
