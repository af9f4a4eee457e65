"""A swarm learns as much from a sample as one process does.

Three trainers and an auxiliary peer against a single process that takes as many samples at each step as the swarm's
true rounds had. Held-out loss at the end; the measure is the difference as a share of what the single process gained.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.swarm_lab import Lab
from benchmarks.swarm_spec import JournalReader
from benchmarks.swarm_tasks import TinyLanguage, parameters_of, stepper
from calm_ray.swarm.holder import single_threaded
from calm_ray.tables import AveragingTable
from tests.eventually import eventually
from tests.integration.lab_checks import assert_every_change_is_a_true_round, of_kind, true_rounds
from tests.integration.lab_swarm import EPOCH_SECONDS, MICRO_BATCH_SIZE, PAUSE_SECONDS, SmallSwarm

NUM_EPOCHS = 30
"""The loss still falls then, by almost 1 % of the whole drop per step: four lost steps would fail the test."""
NUM_SEEDS = 3
NUM_TRAINERS = 3
MIN_DROP_NATS = 2.0
MAX_DIFFERENCE = 0.02
SINGLE_SEED = 500

pytestmark = [pytest.mark.slow(shard=2), pytest.mark.timeout(600)]


def single_process(weights: Mapping[int, float], *, model_seed: int) -> tuple[float, float]:
    """(held-out loss before, after) one process has taken the same number of samples at each step."""
    alone = TinyLanguage(seed=SINGLE_SEED + model_seed, model_seed=model_seed, batch_size=MICRO_BATCH_SIZE)
    optimizer, schedule = stepper(alone)
    with single_threaded():  # on a busy machine, threads of so small a model wait for each other
        before = alone.held_out_loss()
        for epoch in sorted(weights):
            optimizer.zero_grad()
            num_batches = round(weights[epoch] / MICRO_BATCH_SIZE)
            for _ in range(num_batches):
                alone.compute()
            for parameter in parameters_of(alone):
                assert parameter.grad is not None
                parameter.grad /= num_batches
            optimizer.step()
            schedule.step()
        return before, alone.held_out_loss()


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as started:
        yield started


Disturb = Callable[[list[SmallSwarm]], None]


def measure(lab: Lab, folder: Path, table: AveragingTable, *, disturb: Disturb | None = None, **each: Any) -> float:
    """Run all seeds at once, judge each swarm, and return the median difference as a share of the drop."""
    swarms = [
        SmallSwarm(
            lab=lab, folder=folder / str(seed), averaging=table, num_epochs=NUM_EPOCHS, model_seed=seed,
            first_seed=1 + 10 * seed,
        )
        for seed in range(NUM_SEEDS)
    ]  # fmt: skip
    for swarm in swarms:
        swarm.prepare(NUM_TRAINERS, **each)
    for swarm in swarms:
        swarm.begin()
    if disturb is not None:
        disturb(swarms)
    for swarm in swarms:
        swarm.wait_for_end()
    shares = []
    for seed, swarm in enumerate(swarms):
        journals = {name: peer.all_events() for name, peer in swarm.peers.items()}
        assert_every_change_is_a_true_round(journals)
        rounds = true_rounds(journals.values())
        assert rounds.keys() >= set(range(NUM_EPOCHS))
        weights = {epoch: rounds[epoch]["total_weight"] for epoch in range(NUM_EPOCHS)}
        before, after = single_process(weights, model_seed=seed)
        ends = [of_kind(peer.events(), "end")[0] for peer in swarm.trainers()]
        assert len({end["digest"] for end in ends if end["epoch"] == NUM_EPOCHS}) == 1
        drop, difference = before - after, ends[0]["loss"] - after
        assert drop >= MIN_DROP_NATS
        shares.append(abs(difference) / drop)
        print(
            f"seed={seed} single={before:.3f}->{after:.3f} swarm={ends[0]['loss']:.3f} difference={difference:+.4f} "
            f"of_drop={difference / drop:+.2%} samples_per_round={statistics.mean(weights.values()):.0f}"
        )
    return statistics.median(shares)


def table(codec: str, staleness: int) -> AveragingTable:
    return AveragingTable.model_validate({"network": "lan", "compression": codec, "max_staleness": staleness})


def test_measure_sees_a_fifth_of_the_steps_missing() -> None:
    """What the other tests would say of a swarm that loses every fifth step without telling."""
    weights = dict.fromkeys(range(NUM_EPOCHS), 400.0)
    before, after = single_process(weights, model_seed=0)
    _, after_fewer = single_process({e: w for e, w in weights.items() if e % 5}, model_seed=0)
    assert (after_fewer - after) / (before - after) > MAX_DIFFERENCE


@pytest.mark.parametrize(
    ("codec", "staleness"),
    [
        pytest.param("fp16", 0, id="fp16"),
        pytest.param("fp16", 1, id="fp16-delayed"),
        pytest.param("8bit", 1, id="8bit-delayed"),
    ],
)
def test_loss_of_a_swarm_equals_a_single_process(lab: Lab, tmp_path: Path, codec: str, staleness: int) -> None:
    assert measure(lab, tmp_path, table(codec, staleness)) <= MAX_DIFFERENCE


def test_loss_with_a_client_equals_a_single_process(lab: Lab, tmp_path: Path) -> None:
    assert measure(lab, tmp_path, table("fp16", 1), t2={"role": "client"}) <= MAX_DIFFERENCE


def test_loss_with_a_trainer_five_times_slower_equals_a_single_process(lab: Lab, tmp_path: Path) -> None:
    assert measure(lab, tmp_path, table("fp16", 1), t2={"pause_seconds": 5 * PAUSE_SECONDS}) <= MAX_DIFFERENCE


def test_loss_with_a_trainer_killed_every_second_epoch_equals_a_single_process(lab: Lab, tmp_path: Path) -> None:
    """Epochs of about two seconds: a restarted trainer is back for about every second one."""
    slower = {"pause_seconds": 3 * PAUSE_SECONDS}
    share = measure(lab, tmp_path, table("fp16", 1), disturb=kill_every_second_epoch, t0=slower, t1=slower, t2=slower)
    assert share <= MAX_DIFFERENCE
    lives = [_lives(tmp_path / str(seed) / "t2" / "journal.jsonl") for seed in range(NUM_SEEDS)]
    contributed = [sum(len(of_kind(life, "round")) > 0 for life in peer[1:]) for peer in lives]
    print(f"lives={[len(peer) for peer in lives]} of these took part in a round after a restart={contributed}")
    assert sum(contributed) >= 2


def kill_every_second_epoch(swarms: list[SmallSwarm]) -> None:
    """SIGKILL the last trainer whenever two more epochs have passed, and start it again at once."""
    victim = "t2"
    killed_at = dict.fromkeys(range(len(swarms)), 0)
    kills: list[int] = []

    def is_over() -> bool:
        for index, swarm in enumerate(swarms):
            epoch = max((e["epoch"] for e in swarm.peers["aux"].events("boundary")), default=0)
            if epoch < killed_at[index] + 2:
                continue
            killed_at[index] = epoch
            if epoch < NUM_EPOCHS - 1:  # the last life may end in peace
                swarm.peers[victim].kill()
                swarm.restart(victim)
                kills.append(epoch)
        return all(epoch >= NUM_EPOCHS - 1 for epoch in killed_at.values())

    eventually(is_over, EPOCH_SECONDS * NUM_EPOCHS, interval=0.1)
    print(f"kills={len(kills)}")


def _lives(journal: Path) -> list[list[dict[str, Any]]]:
    """A peer's events, cut where it was started."""
    lives: list[list[dict[str, Any]]] = []
    for event in JournalReader(journal).read():
        if event["event"] == "ready":
            lives.append([])
        lives[-1].append(event)
    return lives
