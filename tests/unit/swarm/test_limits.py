"""Times of a round: short on one machine, long enough at 5 Mbit/s, and never what one peer likes them to be."""

import dataclasses
import math
import random
from typing import Any

import pytest

from calm_ray.swarm.limits import MAX_ROUND_SECONDS, NETWORKS, PART_BYTES, RoundLimits, round_limits, wire_seconds

ALBERT_LARGE_FP16 = 2 * 18_000_000


def limits(**changes: Any) -> RoundLimits:
    """Of four peers at home who average ALBERT-large in fp16."""
    values: dict[str, Any] = {"num_bytes": ALBERT_LARGE_FP16, "num_members": 4, "network": "internet"}
    return round_limits(**(values | changes))


def test_limits_of_two_million_parameters_on_one_machine_are_some_seconds() -> None:
    for num_bytes in (2_000_000, 4_000_000, 8_000_000):
        on_lan = limits(num_bytes=num_bytes, network="lan")
        assert (on_lan.matchmaking_seconds, on_lan.grace_seconds, on_lan.request_seconds) == (5.0, 1.0, 2.5)
        assert 10 <= on_lan.round_seconds <= 20
        assert 3 <= on_lan.chunk_seconds <= 5


def test_limits_at_home_leave_twice_the_time_that_the_bytes_need() -> None:
    seconds = wire_seconds(num_bytes=ALBERT_LARGE_FP16, bandwidth=2.5e6, num_members=4, num_reducers=4)
    assert seconds == pytest.approx(1.5 * 36e6 / 2.5e6)
    assert limits().round_seconds == pytest.approx(30 + 2 * seconds)


def test_limits_over_slow_lines_are_those_of_the_line() -> None:
    slow = limits(network="slow")
    assert slow.round_seconds == pytest.approx(60 + 2 * 1.5 * 36e6 / 625e3)
    assert slow.chunk_seconds > 4 * 4 * PART_BYTES / 625e3, "four streams share the uplink"
    assert slow.matchmaking_seconds > limits().matchmaking_seconds


def test_wire_seconds_with_one_reducer_grow_with_its_clients() -> None:
    """The only peer whom others can call sends the average to each of them."""
    seconds = [wire_seconds(num_bytes=1e6, bandwidth=1e6, num_members=m, num_reducers=1) for m in (2, 5, 16)]
    assert seconds == [1.0, 4.0, 15.0]
    assert limits(num_members=16, num_reducers=1).round_seconds > 3 * limits(num_members=16).round_seconds


def test_wire_seconds_alone_are_none() -> None:
    assert wire_seconds(num_bytes=1e6, bandwidth=1e6, num_members=1, num_reducers=1) == 0.0
    assert limits(num_members=1, num_reducers=0).round_seconds == 30.0


def test_limits_follow_the_slowest_members_bandwidth_either_way() -> None:
    assert limits(slowest_bandwidth=1e8).round_seconds < limits().round_seconds
    assert limits(slowest_bandwidth=1e6).round_seconds > limits().round_seconds


@pytest.mark.parametrize("claimed", [1e-300, 1.0, 1e5])
def test_limits_wait_no_longer_for_a_peer_that_claims_next_to_nothing(claimed: float) -> None:
    honest = NETWORKS["internet"].upload_bytes_per_second / 4
    assert limits(slowest_bandwidth=claimed) == limits(slowest_bandwidth=honest)


def test_limits_grow_with_measured_rounds_but_not_without_end() -> None:
    derived = limits().round_seconds
    assert limits(measured_seconds=[5.0] * 20).round_seconds == derived, "the fast do not shut the slow out"
    assert limits(measured_seconds=[60.0] * 20).round_seconds == 30 + 2 * 60
    assert limits(measured_seconds=[1e6] * 20).round_seconds == 3 * derived


def test_limits_ignore_the_slowest_tenth_of_measured_rounds() -> None:
    calm, stormy = [60.0] * 9 + [500.0], [60.0] * 8 + [500.0] * 2
    assert limits(measured_seconds=calm).round_seconds == 150.0
    assert limits(measured_seconds=stormy).round_seconds > 200.0


def test_limits_that_feed_on_their_own_rounds_stay_bounded() -> None:
    """Somebody makes every round last as long as it may."""
    derived = limits().round_seconds
    measured: list[float] = []
    for _ in range(50):
        measured.append(limits(measured_seconds=measured[-20:]).round_seconds)
    assert max(measured) <= 3 * derived


def test_limits_ignore_measurements_that_are_none() -> None:
    assert limits(measured_seconds=[math.nan, math.inf, -5.0]) == limits()


def test_explicit_times_are_kept_whatever_is_measured() -> None:
    explicit = limits(
        matchmaking_seconds=7.0, averaging_timeout_seconds=40.0, measured_seconds=[900.0] * 20,
        matchmaking_factor=4.0, averaging_factor=3.0,
    )  # fmt: skip
    assert (explicit.matchmaking_seconds, explicit.round_seconds) == (7.0, 40.0)
    assert explicit.grace_seconds == pytest.approx(1.4)
    assert explicit.request_seconds == 3.5
    assert explicit.chunk_seconds == 10.0


def test_factors_stretch_what_is_not_explicit() -> None:
    stretched = limits(matchmaking_factor=2.0, averaging_factor=1.5)
    assert stretched.matchmaking_seconds == 2 * limits().matchmaking_seconds
    assert stretched.grace_seconds == 2 * limits().grace_seconds
    assert stretched.round_seconds == 1.5 * limits().round_seconds
    assert stretched.chunk_seconds > limits().chunk_seconds


def random_case(rng: random.Random) -> dict[str, Any]:
    num_members = rng.randint(1, 256)
    return {
        "num_bytes": int(10 ** rng.uniform(0, 11)),
        "num_members": num_members,
        "num_reducers": rng.choice([None, 0, rng.randint(1, num_members)]),
        "network": rng.choice(["lan", "internet", "slow"]),
        "slowest_bandwidth": rng.choice([None, 0.0, 10 ** rng.uniform(-3, 10)]),
        "measured_seconds": [10 ** rng.uniform(-3, 5) for _ in range(rng.randint(0, 30))],
        "matchmaking_factor": rng.uniform(1, 4),
        "averaging_factor": rng.uniform(1, 3),
    }


@pytest.mark.parametrize("seed", range(200))
def test_limits_of_any_round_fit_together(seed: int) -> None:
    case = random_case(random.Random(seed))
    found = round_limits(**case)
    assert all(math.isfinite(value) and value > 0 for value in dataclasses.astuple(found))
    assert found.request_seconds <= found.matchmaking_seconds / 2
    assert found.grace_seconds < found.matchmaking_seconds
    assert found.chunk_seconds <= found.round_seconds / 4
    assert found.round_seconds <= MAX_ROUND_SECONDS
    larger = round_limits(**(case | {"num_bytes": 2 * case["num_bytes"]}))
    assert larger.round_seconds >= found.round_seconds
    assert larger.chunk_seconds >= found.chunk_seconds
