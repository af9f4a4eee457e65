"""200 epochs of a swarm in which peers are slow, join, leave and die: what holds at all times.

What happens is drawn from a seed; when, from the swarm's own epochs. Ten peers, so that a group may lack one and still
hold nine tenths of the live ones.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest

from benchmarks.swarm_lab import Lab
from calm_ray.tables import AveragingTable
from tests.eventually import eventually
from tests.integration.lab_checks import (
    assert_bounds_hold,
    assert_every_change_is_a_true_round,
    group_shares,
    of_kind,
    true_rounds,
)
from tests.integration.lab_swarm import EPOCH_SECONDS, PAUSE_SECONDS, SmallSwarm

NUM_EPOCHS = 200
NUM_TRAINERS = 9
MIN_TRAINERS = 6
EPOCHS_BETWEEN_EVENTS = 8
SEED = 3
SLACK_SECONDS = 2.0
"""A round's bound is checked against clocks of a machine that may be busy."""
MIN_GROUP_SHARE, MIN_ROUND_SHARE = 0.9, 0.9


@dataclass(kw_only=True)
class Churn:
    """Draws what happens next, and makes it happen."""

    swarm: SmallSwarm
    rng: random.Random
    next_epoch: int = EPOCHS_BETWEEN_EVENTS
    happened: list[str] = field(default_factory=list)

    def is_over(self) -> bool:
        """One look at the swarm; True when the last epoch has been reached."""
        auxiliary = self.swarm.peers["aux"]
        if not auxiliary.is_running():
            raise RuntimeError(f"the auxiliary peer has ended\n{auxiliary.log()[-3000:]}")
        epoch = max((e["epoch"] for e in auxiliary.events("boundary")), default=0)
        if epoch >= self.next_epoch:
            self.next_epoch = epoch + self.rng.randint(EPOCHS_BETWEEN_EVENTS // 2, EPOCHS_BETWEEN_EVENTS * 3 // 2)
            self.happened.append(f"{epoch}:{self._act()}")
        return epoch >= NUM_EPOCHS

    def _act(self) -> str:
        here = [peer for peer in self.swarm.trainers() if peer.is_running()]
        gone = [peer for peer in self.swarm.trainers() if not peer.is_running()]
        is_join = bool(gone) and (len(here) <= MIN_TRAINERS or self.rng.random() < 0.5)
        victim = self.rng.choice(sorted(gone if is_join else here, key=lambda peer: peer.spec.name))
        if is_join:
            self.swarm.restart(victim.spec.name)
            return f"join {victim.spec.name}"
        if self.rng.random() < 0.5:
            victim.kill()
            return f"kill {victim.spec.name}"
        victim.signal(SIGTERM)
        return f"leave {victim.spec.name}"


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as started:
        yield started


@pytest.mark.slow(shard=2)
@pytest.mark.timeout(1200)
def test_swarm_under_churn_keeps_its_rounds_true_bounded_and_whole(lab: Lab, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    table = AveragingTable(network="lan", compression="fp16", max_staleness=1)
    swarm = SmallSwarm(lab=lab, folder=tmp_path, averaging=table, target_batch_size=512, first_seed=100)
    slow = rng.sample(range(NUM_TRAINERS), 2)
    swarm.start_all(
        NUM_TRAINERS, **{f"t{index}": {"pause_seconds": rng.uniform(2.0, 5.0) * PAUSE_SECONDS} for index in slow}
    )
    churn = Churn(swarm=swarm, rng=rng)
    eventually(churn.is_over, EPOCH_SECONDS * NUM_EPOCHS, lambda: str(churn.happened), interval=0.2)
    journals = {name: peer.all_events() for name, peer in swarm.peers.items()}
    print(f"happened: {', '.join(churn.happened)}")
    _print_histogram(journals)

    longest = assert_bounds_hold(journals, slack_seconds=SLACK_SECONDS)
    num_steps = assert_every_change_is_a_true_round(journals)
    assert len(true_rounds(journals.values())) >= NUM_EPOCHS
    shares = group_shares(journals, num_epochs=NUM_EPOCHS)
    num_whole = sum(share >= MIN_GROUP_SHARE for share in shares.values())
    print(f"longest_round={longest:.1f}s steps_checked={num_steps} whole={num_whole}/{len(shares)}")
    assert num_whole >= MIN_ROUND_SHARE * len(shares), {e: round(s, 2) for e, s in shares.items() if s < 0.9}


def _print_histogram(journals: Mapping[str, list[dict[str, Any]]]) -> None:
    shares = group_shares(journals, num_epochs=NUM_EPOCHS)
    tenths = Counter(min(10, int(share * 10 + 1e-9)) for share in shares.values())
    print("group size / live peers    rounds")
    for tenth in range(10, -1, -1):
        if tenths[tenth]:
            label = "all" if tenth == 10 else f"{tenth / 10:.1f} to {(tenth + 1) / 10:.1f}"
            print(f"{label:>22} {tenths[tenth]:>8}  {'#' * (60 * tenths[tenth] // len(shares))}")
    outcomes = Counter(event["outcome"] for events in journals.values() for event in of_kind(events, "round"))
    print(f"outcomes as the peers saw them: {dict(outcomes)}")
    seconds = sorted(e["seconds"] for events in journals.values() for e in of_kind(events, "averaging"))
    marks = {f"{share:.0%}": f"{seconds[int(share * (len(seconds) - 1))]:.2f}" for share in (0.5, 0.9, 0.99, 1.0)}
    print(f"seconds of a round, from knock to average: {marks}")
