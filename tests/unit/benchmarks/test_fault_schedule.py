"""When what breaks, in the benchmarks of faults."""

from collections import Counter

import pytest

from benchmarks.fault_kinds import BOOTSTRAP, KINDS, MONITOR, TRAINERS, bare_target, in_turn, schedule

MAX_FAILURES = 10
"""As `calm_ray.peers.budget` allows in an hour; the eleventh parks the peer."""


def test_schedule_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    first = schedule(KINDS, number=60, seed=1, duration=2000)
    assert first == schedule(KINDS, number=60, seed=1, duration=2000)
    assert first != schedule(KINDS, number=60, seed=2, duration=2000)


@pytest.mark.parametrize("seed", range(20))
def test_schedule_has_each_kind_often_enough_and_nobody_too_often(seed: int) -> None:
    found = schedule(KINDS, number=60, seed=seed, duration=2000)
    assert len(found) == 60
    assert min(Counter(fault.kind.name for fault in found).values()) >= 4
    assert set(Counter(fault.kind.name for fault in found)) == {kind.name for kind in KINDS}
    assert max(Counter(fault.target for fault in found if fault.kind.how != "worker").values()) <= MAX_FAILURES
    assert all(fault.target in fault.kind.targets for fault in found)


def test_schedule_is_in_order_and_fills_its_time() -> None:
    at = [fault.at for fault in schedule(KINDS, number=60, seed=3, duration=600)]
    assert at == sorted(at)
    assert 0 <= at[0] < 10
    assert 590 <= at[-1] < 600


def test_schedule_of_fewer_faults_than_kinds_is_refused() -> None:
    with pytest.raises(ValueError, match="3 faults cannot show"):
        schedule(KINDS, number=3, seed=1, duration=60)


def test_each_kind_comes_in_turn_once_for_each_role() -> None:
    found = in_turn(KINDS)
    assert {fault.kind.name for fault in found} == {kind.name for kind in KINDS}
    workers = [fault.target for fault in found if fault.kind.how == "worker"]
    assert workers == [TRAINERS[1], BOOTSTRAP, MONITOR]


def test_bare_swarm_is_hurt_only_where_it_has_something() -> None:
    targets = {fault.target: bare_target(fault) for fault in schedule(KINDS, number=60, seed=4, duration=60)}
    assert targets[MONITOR] is None
    assert targets[BOOTSTRAP] == TRAINERS[0]
    assert [targets[name] for name in TRAINERS] == list(TRAINERS)
