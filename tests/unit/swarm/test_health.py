"""Rules of thumb by code: times grow when groups fall apart, shrink when all is well, give up what does not help."""

import random
from typing import Any

import pytest

from calm_ray.swarm.health import MAX_FACTOR, MIN_ROUNDS, WINDOW, Patience, RoundFact, RoundHealth, after_round


def fact(**changes: Any) -> RoundFact:
    values: dict[str, Any] = {"outcome": "averaged", "group_size": 5, "num_live": 5}
    return RoundFact(**(values | changes))


GOOD, SMALL, SLOW = fact(), fact(group_size=3), fact(outcome="timeout")


def after(*facts: RoundFact, start: RoundHealth | None = None) -> RoundHealth:
    health = start or RoundHealth()
    for one in facts:
        health = after_round(health, one)
    return health


@pytest.mark.parametrize(
    ("group_size", "num_live", "is_small"),
    [(9, 10, False), (8, 10, True), (1, 2, True), (2, 2, False), (0, 2, True), (3, 2, False)],
)
def test_group_is_small_below_nine_tenths_of_the_live_peers(group_size: int, num_live: int, is_small: bool) -> None:
    assert fact(group_size=group_size, num_live=num_live).is_small == is_small


def test_round_is_slow_when_time_was_up_for_it_or_for_a_tenth_of_its_members() -> None:
    assert fact(outcome="partial").is_slow
    assert fact(group_size=5, num_too_slow=1).is_slow
    assert not fact(group_size=20, num_live=20, num_too_slow=1).is_slow
    assert not fact(outcome="non_finite").is_slow, "more time does not make numbers finite"


def test_health_of_good_rounds_changes_nothing() -> None:
    health = after(*[GOOD] * 100)
    assert (health.matchmaking, health.averaging, health.advice) == (Patience(), Patience(), "")
    assert len(health.recent) == WINDOW


def test_health_of_few_bad_rounds_waits_for_more() -> None:
    assert after(*[SMALL] * (MIN_ROUNDS - 1)).matchmaking == Patience()


def test_health_when_a_quarter_of_the_groups_are_small_gives_matchmaking_more_time_and_says_why() -> None:
    health = after(*[GOOD, GOOD, GOOD, SMALL] * 2)
    assert (health.matchmaking.factor, health.averaging.factor) == (1.5, 1.0)
    assert health.advice == (
        "groups had less than 90% of the live peers in 2 of 8 rounds (about 3 of 5): "
        "matchmaking gets 1.5 times its usual time, 1 times before"
    )
    assert health.recent == (), "what was seen under the old times says nothing of the new ones"


def test_health_when_less_than_a_quarter_is_small_changes_nothing() -> None:
    assert after(*[GOOD, GOOD, GOOD, GOOD, SMALL] * 20).matchmaking == Patience()


def test_health_when_time_is_often_up_gives_averaging_more_time() -> None:
    health = after(*[GOOD, GOOD, GOOD, SLOW] * 2)
    assert (health.matchmaking.factor, health.averaging.factor) == (1.0, 1.5)
    assert "time was up for members in 2 of 8 rounds: averaging gets 1.5 times" in health.advice


def test_health_of_rounds_small_and_slow_mends_the_groups_first() -> None:
    health = after(*[fact(group_size=2, outcome="timeout")] * MIN_ROUNDS)
    assert (health.matchmaking.factor, health.averaging.factor) == (1.5, 1.0)


def test_health_after_whole_good_windows_returns_step_by_step_to_the_usual_times() -> None:
    health = after(*[SMALL] * MIN_ROUNDS * 2)
    assert health.matchmaking.factor == 2.25
    factors = []
    while health.matchmaking.factor > 1:
        health = after(*[GOOD] * WINDOW, start=health)
        factors.append(health.matchmaking.factor)
    assert factors == pytest.approx([1.8, 1.44, 1.152, 1.0])
    assert "matchmaking gets 1 times its usual time" in health.advice
    assert after(*[GOOD] * WINDOW, start=health).advice == ""


def test_health_when_the_longest_time_did_not_help_returns_to_the_usual_one() -> None:
    """One peer that is listed and cannot be reached must not cost everyone four times the grace for ever."""
    factors = [(health := after(*[SMALL] * MIN_ROUNDS * n)).matchmaking.factor for n in range(1, 7)]
    assert factors == [1.5, 2.25, 3.375, 4.0, 1.0, 1.0]
    assert health.matchmaking.is_exhausted
    assert "did not help" in health.advice
    assert after(*[SMALL] * 200, start=health).matchmaking.factor == 1.0


def test_health_after_giving_up_tries_again_once_things_were_well() -> None:
    given_up = after(*[SLOW] * MIN_ROUNDS * 5)
    assert given_up.averaging.is_exhausted
    well = after(*[GOOD] * 2 * WINDOW, start=given_up)
    assert well.averaging == Patience()
    assert after(*[SLOW] * MIN_ROUNDS, start=well).averaging.factor == 1.5


def test_health_of_a_peer_that_knows_of_nobody_else_learns_nothing() -> None:
    assert after(*[fact(outcome="alone", group_size=0, num_live=1)] * 50) == RoundHealth()


@pytest.mark.parametrize("seed", range(20))
def test_health_under_any_weather_stays_within_its_bounds(seed: int) -> None:
    rng, health = random.Random(seed), RoundHealth()
    for _ in range(400):
        health = after_round(health, rng.choice([GOOD, GOOD, GOOD, SMALL, SLOW, fact(num_too_slow=1)]))
        assert 1.0 <= health.matchmaking.factor <= MAX_FACTOR
        assert 1.0 <= health.averaging.factor <= MAX_FACTOR
        assert len(health.recent) <= WINDOW
