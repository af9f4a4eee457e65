"""What stock hivemind 1.1.12 does to a peer outside its rounds, and what we do: the other pitfalls, by real processes.

The stock halves fail the day that hivemind mends them: then what we do about it can go. Two are elsewhere: what a
killed process leaves behind (P7) in `test_hygiene.py`, and our halves of P10 and of P12's client in `test_hostile.py`
(a peer whose libp2p died starts again) and `test_swarm.py` (a client contributes).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hivemind.optim.grad_scaler import GradScaler
from hivemind.optim.state_averager import initialize_optimizer_state_

from calm_ray.tables import OptimizerTable
from calm_ray.training.optim import make_optimizer
from tests.eventually import Children, eventually
from tests.integration.stock import Bare, start_bare
from tests.integration.stock_nodes import run_cases

slow = pytest.mark.slow(shard=1)
TARGET_BATCH_SIZE = 600
"""About two seconds of computing for two bare peers."""
MANY_TRIES = 20


@pytest.fixture(scope="module")
def dht(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_cases(
        tmp_path_factory.mktemp("dht"), "stock_dht", "ours_large_report", "ours_late_function", "ours_other_model",
        "stock_late_function", "stock_large_value",
    )  # fmt: skip


@pytest.fixture(scope="module")
def bares(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Children, list[Bare]]]:
    """Two bare optimizers that average with each other."""
    folder = tmp_path_factory.mktemp("bares")
    with Children(folder) as children:
        first = start_bare(children, folder / "0", run_id="bare", target_batch_size=TARGET_BATCH_SIZE)
        second = start_bare(
            children, folder / "1", run_id="bare", target_batch_size=TARGET_BATCH_SIZE, seed=1,
            peer=first.addresses[0], averaging_timeout=6,
        )  # fmt: skip
        eventually(lambda: second.logged("Averaged gradients with 2 peers"), 60, second.child.tail)
        yield children, [first, second]


# --- P5: what a DHT carries ------------------------------------------------------------------------------------------


@slow
def test_stock_loses_a_call_or_its_dht_by_a_large_value(dht: dict[str, Any]) -> None:
    """A message in two writes may be read in two: the process then fails, or throws the rest away."""
    assert dht["stock_large_value"]["num_stored"] < 60


@slow
def test_ours_bounds_what_it_publishes(dht: dict[str, Any]) -> None:
    found = dht["ours_large_report"]
    assert found["num_stored"] == 60 and found["is_alive"]
    assert "bounded" in found["refused"]


# --- P6: code for another process ------------------------------------------------------------------------------------


@slow
def test_stock_dht_dies_of_a_function_that_it_cannot_find(dht: dict[str, Any]) -> None:
    assert dht["stock_late_function"] == {"answer": "none", "is_alive": False}


@slow
def test_ours_calls_in_its_own_process(dht: dict[str, Any]) -> None:
    assert dht["ours_late_function"] == {"answer": True, "is_alive": True}


# --- P8: a step that nobody asked for --------------------------------------------------------------------------------


def test_stock_takes_a_step_before_the_first() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.5)
    initialize_optimizer_state_(optimizer)
    assert float(optimizer.state[parameter]["step"]) == 1
    assert bool((parameter < 1).all()), "decayed"


def test_ours_begins_at_the_beginning() -> None:
    """More of this: `tests/unit/training/test_optim.py`."""
    parameter = torch.nn.Parameter(torch.ones(4))
    table = OptimizerTable(name="adamw", learning_rate=0.1, decay_epochs=10, weight_decay=0.5)
    optimizer = make_optimizer([{"params": [parameter]}], table=table)
    assert float(optimizer.state[parameter]["step"]) == 0
    assert torch.equal(parameter, torch.ones(4))


# --- P10: alone, and none the wiser ----------------------------------------------------------------------------------


@slow
@pytest.mark.timeout(200)
def test_stock_trains_on_alone_when_its_libp2p_has_died(bares: tuple[Children, list[Bare]]) -> None:
    _, (_, victim) = bares
    processes = psutil.Process(victim.child.pid).children(recursive=True)
    next(p for p in processes if p.name() == "p2pd").kill()
    epoch, num_rounds = victim.epoch(), len(victim.logged("Averaged gradients"))
    victim.wait_for_epoch(epoch + 3, 100)
    assert victim.child.is_running() and not victim.events("raised")
    assert len(victim.logged("Averaged gradients")) <= num_rounds + 1, "a round may have been under way"
    assert victim.logged("local gradients")


# --- P11: another model ----------------------------------------------------------------------------------------------


@slow
@pytest.mark.timeout(120)
def test_stock_downloads_a_state_that_does_not_fit_for_ever(bares: tuple[Children, list[Bare]], tmp_path: Path) -> None:
    children, (donor, _) = bares
    donor.wait_for_epoch(2, 60)
    newcomer = start_bare(children, tmp_path / "other", run_id="bare", peer=donor.addresses[0], hidden=33)
    eventually(lambda: len(newcomer.logged("Failed to load state")) >= MANY_TRIES, 60, newcomer.child.tail)
    assert newcomer.epoch() == 0 and newcomer.child.is_running(), "its first step has not come back"
    children.stop(newcomer.child, grace_seconds=0.5)


@slow
def test_ours_gives_up_on_a_state_that_does_not_fit(dht: dict[str, Any]) -> None:
    """And averages with nobody of another model: tickets carry a digest of the shapes."""
    found = dht["ours_other_model"]
    assert found["num_asked"] == found["max_tries"] == 5
    assert "no peer gave us the state" in found["said"]


# --- P12: a client, and a CPU ----------------------------------------------------------------------------------------


@slow
@pytest.mark.timeout(120)
def test_stock_client_that_does_not_say_so_twice_ends_with_its_first_epoch(
    bares: tuple[Children, list[Bare]], tmp_path: Path
) -> None:
    """Its DHT is in client mode; `client_mode=None` takes that from it, by an inverted test."""
    children, (full, _) = bares
    client = start_bare(
        children, tmp_path / "client", run_id="lonely", peer=full.addresses[0], client_mode_dht=True,
        target_batch_size=64,
    )  # fmt: skip
    raised = eventually(lambda: client.events("raised"), 60, client.child.tail)
    assert "State sharing priority is unused" in raised[0]["error"]
    assert client.epoch() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it works")
@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.GradScaler is enabled, but CUDA is not available:UserWarning")
def test_stock_gradient_scaler_breaks_without_a_gpu() -> None:
    """It takes torch's, which turns itself off, and goes on to use what is not there. Ours is a number: `LossScale`."""
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    with pytest.raises(AttributeError, match="_scale"):  # what `hivemind.Optimizer.step` asks it first
        GradScaler().are_grads_finite(torch.optim.SGD([parameter], lr=0.1))
