"""All peers hold the same parameters, bit for bit; and the right ones."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.swarm_lab import Lab
from benchmarks.swarm_tasks import TinyLanguage, parameters_of, stepper
from calm_ray.swarm.holder import single_threaded
from calm_ray.swarm.sketch import TOLERANCE
from calm_ray.tables import AveragingTable
from tests.integration.lab_checks import (
    assert_equal_parameters,
    assert_every_change_is_a_true_round,
    batches_by_round,
    of_kind,
    true_rounds,
)
from tests.integration.lab_swarm import MICRO_BATCH_SIZE, SmallSwarm

NUM_EPOCHS = 6
PRESETS = [
    pytest.param(codec, staleness, offload, id=f"{codec}-staleness{staleness}-{'offload' if offload else 'in-place'}")
    for codec, (staleness, offload) in itertools.product(
        ("none", "fp16", "8bit"), ((0, True), (0, False), (1, True))
    )
]  # fmt: skip
"""Every preset that the config allows: without offloading there is one set of parameters, so nothing can be stale."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as started:
        yield started


@pytest.fixture
def swarm_of(lab: Lab, tmp_path: Path) -> Iterator[Any]:
    yield lambda **values: SmallSwarm(lab=lab, folder=tmp_path, **values)
    lab.stop_all()


@pytest.mark.slow(shard=2)
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("codec", "staleness", "offload"), PRESETS)
def test_parameters_after_every_epoch_are_bit_equal_on_all_peers(
    swarm_of: Any, codec: Any, staleness: Any, offload: bool
) -> None:
    table = AveragingTable(network="lan", compression=codec, max_staleness=staleness, offload_optimizer=offload)
    swarm = swarm_of(averaging=table, num_epochs=NUM_EPOCHS)
    swarm.start_all(3)
    swarm.wait_for_end()
    swarm.wait_for_epoch("aux", NUM_EPOCHS)
    journals = {name: peer.events() for name, peer in swarm.peers.items()}
    digests = assert_equal_parameters(journals)
    assert_every_change_is_a_true_round(journals)
    assert digests.keys() >= set(range(1, NUM_EPOCHS + 1))
    assert len(set(digests.values())) == len(digests), "an epoch without a step"
    for peer in swarm.trainers():  # the model itself, not only what the rounds thread holds
        end = of_kind(peer.events(), "end")[0]
        assert end["digest"] == digests[end["epoch"]]


@pytest.mark.slow(shard=2)
@pytest.mark.timeout(240)
def test_fp32_without_delay_equals_one_process_stepping_on_the_union_of_the_batches(swarm_of: Any) -> None:
    table = AveragingTable(network="lan", compression="none", max_staleness=0)
    swarm = swarm_of(averaging=table, num_epochs=NUM_EPOCHS)
    swarm.start_all(3)
    swarm.wait_for_end()
    journals = {peer.spec.name: peer.events() for peer in swarm.trainers()}
    rounds = true_rounds(journals.values())
    assert rounds.keys() >= set(range(NUM_EPOCHS)), {name: of_kind(j, "round") for name, j in journals.items()}

    alone = TinyLanguage(seed=0, model_seed=0, batch_size=MICRO_BATCH_SIZE)
    optimizer, schedule = stepper(alone)
    used = {
        swarm.peers[name].spec.seed: batches_by_round(
            journal, peer_id=of_kind(journal, "ready")[0]["peer_id"], rounds=rounds
        )
        for name, journal in journals.items()
    }
    with single_threaded():
        for epoch in range(NUM_EPOCHS):
            optimizer.zero_grad()
            union = [(seed, batch) for seed, batches in used.items() for batch in batches[epoch]]
            for seed, batch in union:
                alone.add_gradient(seed=seed, batch=batch, batch_size=MICRO_BATCH_SIZE)
            assert len(union) * MICRO_BATCH_SIZE == rounds[epoch]["total_weight"]
            for parameter in parameters_of(alone):
                assert parameter.grad is not None
                parameter.grad /= len(union)
            optimizer.step()
            schedule.step()
    expected = torch.cat([p.detach().flatten() for p in parameters_of(alone)])
    for peer in swarm.trainers():
        found = torch.load(peer.spec.folder / "parameters.pt")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


NUM_UNLIKE_EPOCHS = 105
"""State is averaged every 10 epochs, which makes all bits equal: this looks when they have drifted for 5."""


@pytest.mark.slow(shard=2)
@pytest.mark.timeout(600)
def test_trainer_with_other_cpu_instructions_stays_within_tolerance_without_a_resync(swarm_of: Any) -> None:
    """The same gradient on other vector units gives other last bits; averaging the state removes them."""
    table = AveragingTable(network="lan", compression="fp16", max_staleness=1)
    swarm = swarm_of(averaging=table, num_epochs=NUM_UNLIKE_EPOCHS, target_batch_size=128)
    swarm.start_all(2, t1={"env": {"ATEN_CPU_CAPABILITY": "default"}})
    swarm.wait_for_end()
    vectors = [torch.load(peer.spec.folder / "parameters.pt") for peer in swarm.trainers()]
    distance = float((vectors[0] - vectors[1]).norm() / vectors[0].norm())
    assert distance <= TOLERANCE
    swarm.lab.stop_all()
    tallies = {name: of_kind(peer.events(), "tally")[0] for name, peer in swarm.peers.items()}
    assert {name: tally["resyncs"] for name, tally in tallies.items()} == dict.fromkeys(tallies, 0)
    digests = [
        {e["epoch"]: e["digest"] for e in of_kind(peer.events(), "parameters")} for peer in swarm.trainers()
    ]  # fmt: skip
    num_unlike = sum(digests[0][epoch] != digests[1].get(epoch) for epoch in digests[0])
    assert num_unlike, "this machine's instructions make no difference: nothing was shown"
    print(f"distance={distance:.2e} tolerance={TOLERANCE:.2e} epochs with other bits: {num_unlike}")
