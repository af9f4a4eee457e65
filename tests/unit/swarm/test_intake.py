"""Gradients in, parameters out: which micro-batches count, and when the computing thread waits."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from calm_ray.swarm import intake as module
from calm_ray.swarm.holder import StateHolder
from calm_ray.swarm.intake import Intake
from calm_ray.swarm.progress import ProgressTracker
from tests.eventually import eventually
from tests.unit.swarm.tiny_state import NUM_ELEMENTS, gradient, holder

WAIT_SECONDS = 30.0


class Tracker:
    """What the intake tells the tracker."""

    def __init__(self) -> None:
        self.reports: list[tuple[int, int]] = []
        self.epochs: list[tuple[int, int]] = []
        self.performance_ema = SimpleNamespace(reset_timer=lambda: None)

    def report(self, *, epoch: int, samples_accumulated: int) -> None:
        self.reports.append((epoch, samples_accumulated))

    def begin_epoch(self, epoch: int, *, samples_accumulated: int) -> None:
        self.epochs.append((epoch, samples_accumulated))


class Peer:
    """One peer's two threads, each move by hand."""

    def __init__(self, *, max_staleness: int, should_offload: bool = True) -> None:
        self.holder: StateHolder = holder(should_offload=should_offload)
        self.tracker = Tracker()
        self.intake = Intake(self.holder, cast(ProgressTracker, self.tracker), max_staleness=max_staleness)

    def compute(self, value: float = 1.0, *, num_samples: int = 4) -> None:
        """A micro-batch ends: its gradients count, and the model gets what is new."""
        self.arrive(value, num_samples=num_samples)
        self.intake.refresh_model()

    def arrive(self, value: float = 1.0, *, num_samples: int = 4) -> None:
        for parameter in self.holder.model_parameters:
            parameter.grad = torch.full_like(parameter, value)
        self.intake.add(num_samples)

    def step(self, *, is_used: bool = True) -> None:
        """The round that `take` began ends with an average."""
        self.intake.settle(is_used=is_used)
        self.holder.step(gradient(self.holder.epoch))
        self.intake.begin_epoch(self.holder.epoch)

    def taken(self) -> tuple[float, float]:
        """(value, samples) of what is taken."""
        found = self.intake.take()
        assert found is not None
        vector, weight = found
        assert bool((vector == vector[0]).all())
        return float(vector[0]), weight


@pytest.fixture(params=[0, 1])
def peer(request: pytest.FixtureRequest) -> Peer:
    return Peer(max_staleness=request.param)


@pytest.fixture
def late() -> Peer:
    """A peer that goes on computing while others average."""
    return Peer(max_staleness=1)


@pytest.fixture
def sync() -> Peer:
    return Peer(max_staleness=0)


# --- what counts -----------------------------------------------------------------------------------------------------


def test_samples_of_one_epoch_are_taken_once(peer: Peer) -> None:
    peer.compute(1.0, num_samples=4)
    peer.compute(3.0, num_samples=4)
    assert peer.tracker.reports == [(0, 4), (0, 8)]
    assert peer.taken() == (2.0, 8.0)
    assert peer.intake.num_samples_taken == 8
    peer.step()
    assert peer.intake.num_samples_taken == 0
    assert peer.intake.take() is None


def test_nothing_computed_is_nothing_taken(peer: Peer) -> None:
    assert peer.intake.take() is None
    peer.step()
    assert peer.tracker.epochs == [(1, 0)]


def test_samples_of_a_round_on_its_way_count_towards_the_next_epoch(late: Peer) -> None:
    late.compute(1.0)
    late.taken()
    late.compute(2.0)
    assert late.tracker.reports == [(0, 4)], "the record goes on saying what we bring to this round"
    late.step()
    assert late.tracker.epochs == [(1, 4)]
    late.compute(2.0)
    assert late.taken() == (2.0, 8.0)
    assert late.intake.num_dropped == 0


def test_failed_round_gives_its_samples_back(peer: Peer) -> None:
    peer.compute(1.0)
    assert peer.taken() == (1.0, 4.0)
    peer.intake.settle(is_used=False)
    peer.compute(3.0)
    assert peer.taken() == (2.0, 8.0)
    assert peer.intake.num_dropped == 0


def test_residual_goes_into_the_next_round(peer: Peer) -> None:
    peer.compute(1.0)
    peer.taken()
    peer.intake.settle(is_used=True, residual=torch.full((NUM_ELEMENTS,), 8.0))
    peer.holder.step(gradient(0))
    peer.intake.begin_epoch(1)
    peer.compute(1.0)  # with the parameters of epoch 0 if nothing may be stale: dropped
    peer.compute(1.0)
    value, weight = peer.taken()
    assert value == 1.0 + 8.0 / weight


# --- staleness -------------------------------------------------------------------------------------------------------


def test_sync_peer_drops_what_was_computed_before_the_step(sync: Peer) -> None:
    sync.compute()
    sync.taken()
    sync.step()
    sync.arrive(9.0, num_samples=5)  # computed with epoch 0's parameters
    sync.intake.refresh_model()
    assert sync.intake.num_dropped == 5
    sync.compute(2.0)
    assert sync.taken() == (2.0, 4.0)


def test_sync_peer_drops_what_comes_too_late_for_the_round(sync: Peer) -> None:
    """It would be averaged one epoch later, into a gradient of other parameters."""
    sync.compute()
    sync.taken()
    sync.arrive(9.0, num_samples=5)
    sync.step()
    assert sync.intake.num_dropped == 5
    assert sync.tracker.epochs == [(1, 0)]


def test_late_peer_may_be_one_epoch_late_and_no_more(late: Peer) -> None:
    late.compute()
    late.taken()
    late.step()
    late.arrive(2.0)  # of epoch 0, in epoch 1
    assert late.taken() == (2.0, 4.0)
    late.step()
    late.arrive(9.0, num_samples=5)  # of epoch 0, in epoch 2
    assert late.intake.num_dropped == 5
    late.intake.refresh_model()
    late.compute(3.0)
    assert late.taken() == (3.0, 4.0)


def test_micro_batch_that_misses_two_rounds_is_dropped_and_its_neighbours_are_not(late: Peer) -> None:
    """Of epoch 0, it arrives while epoch 1 is averaged: it could only count in epoch 2."""
    late.compute()
    late.taken()
    late.step()
    late.intake.take()
    late.arrive(9.0, num_samples=5)
    assert late.intake.num_dropped == 5
    late.intake.refresh_model()
    late.compute(2.0)
    late.step()
    assert late.taken() == (2.0, 4.0)


def test_micro_batch_between_average_and_step_belongs_to_the_next_epoch(late: Peer) -> None:
    """The average is there, the step is not done yet: parameters may be averaged in between, for seconds."""
    late.compute()
    late.taken()
    late.step()
    late.compute()
    late.taken()
    late.intake.settle(is_used=True)
    late.compute(2.0)
    late.holder.step(gradient(1))
    late.intake.begin_epoch(2)
    assert late.intake.num_dropped == 0
    assert late.taken() == (2.0, 4.0)


def test_gradient_that_came_back_is_not_used_two_epochs_later(late: Peer) -> None:
    """The round failed here and was true elsewhere: its average is read from others, and ours has had its time."""
    late.compute()
    late.taken()
    late.step()
    late.arrive(9.0, num_samples=5)  # of epoch 0
    late.intake.refresh_model()
    late.taken()
    late.step(is_used=False)
    assert late.intake.num_dropped == 5
    assert late.intake.take() is None


def test_gradient_that_came_back_in_time_counts(late: Peer) -> None:
    late.compute(1.0)
    late.taken()
    late.step(is_used=False)
    assert late.intake.num_dropped == 0
    assert late.taken() == (1.0, 4.0)


def test_sync_peer_forgets_what_came_back_when_the_epoch_ends_without_it(sync: Peer) -> None:
    sync.compute()
    sync.taken()
    sync.step(is_used=False)
    assert sync.intake.num_dropped == 4
    assert sync.intake.take() is None


# --- parameters out --------------------------------------------------------------------------------------------------


def model_of(peer: Peer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in peer.holder.model_parameters])


def test_model_gets_the_step_when_it_is_published(peer: Peer) -> None:
    before = model_of(peer)
    peer.compute()
    peer.taken()
    peer.intake.settle(is_used=True)
    peer.intake.refresh_model()
    assert torch.equal(model_of(peer), before)
    peer.holder.step(gradient(0))
    peer.intake.begin_epoch(1)
    peer.intake.refresh_model()
    assert torch.equal(model_of(peer), peer.holder.flat_parameters)
    assert not torch.equal(model_of(peer), before)


def test_state_of_our_own_epoch_reaches_the_model(peer: Peer) -> None:
    """Parameters out of step are replaced by the swarm's at the same epoch; so is a newcomer's first state."""
    other = holder(seed=1)
    peer.compute(num_samples=7)
    peer.holder.load(other.snapshot())
    peer.intake.drop()
    peer.intake.begin_epoch(0)
    peer.arrive(9.0, num_samples=5)  # was under way, with the wrong parameters
    assert peer.intake.num_dropped == 7 + 5
    peer.intake.refresh_model()
    assert torch.equal(model_of(peer), other.flat_parameters)
    peer.compute(2.0)
    assert peer.taken() == (2.0, 4.0)


def test_parameters_averaged_after_the_model_took_the_step_reach_it_too(late: Peer) -> None:
    late.compute()
    late.taken()
    late.step()
    late.holder.step(gradient(1))
    late.intake.refresh_model()  # of epoch 1, and finds epoch 2
    late.holder.load_parameters(torch.ones(NUM_ELEMENTS))
    late.intake.begin_epoch(2)
    late.intake.refresh_model()
    assert torch.equal(model_of(late), torch.ones(NUM_ELEMENTS))


def test_model_in_place_of_a_copy_is_never_stale_after_refresh() -> None:
    peer = Peer(max_staleness=0, should_offload=False)
    peer.compute()
    peer.taken()
    peer.step()
    peer.intake.refresh_model()
    peer.compute(3.0)
    assert peer.taken() == (3.0, 4.0)
    assert peer.intake.num_dropped == 0


# --- who waits -------------------------------------------------------------------------------------------------------


def in_thread(job: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=job, daemon=True)
    thread.start()
    return thread


def test_sync_peer_waits_from_its_micro_batch_until_the_step(sync: Peer) -> None:
    sync.intake.park()
    computing = in_thread(sync.intake.wait_while_parked)
    sync.arrive()
    assert sync.taken() == (1.0, 4.0), "at once: nobody computes"
    assert computing.is_alive()
    sync.step()
    sync.intake.unpark()
    computing.join(WAIT_SECONDS)
    assert not computing.is_alive()


def test_round_waits_for_the_micro_batch_under_way(sync: Peer) -> None:
    sync.intake.park()
    found: list[tuple[float, float]] = []
    averaging = in_thread(lambda: found.append(sync.taken()))

    def compute() -> None:
        sync.arrive()
        sync.intake.wait_while_parked()

    computing = in_thread(compute)
    averaging.join(WAIT_SECONDS)
    assert found == [(1.0, 4.0)]
    sync.intake.unpark()
    computing.join(WAIT_SECONDS)
    assert not computing.is_alive()


def test_round_does_not_wait_for_ever_for_a_micro_batch(sync: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PARK_SECONDS", 0.2)
    sync.intake.park()
    assert sync.intake.take() is None


def test_late_peer_never_waits(late: Peer) -> None:
    late.intake.park()
    late.intake.wait_while_parked()
    late.compute()
    assert late.taken() == (1.0, 4.0)


def test_nobody_waits_any_more_after_the_end(sync: Peer) -> None:
    sync.intake.park()
    computing = in_thread(sync.intake.wait_while_parked)
    eventually(lambda: sync.intake._is_parked, WAIT_SECONDS)
    sync.intake.close()
    computing.join(WAIT_SECONDS)
    assert not computing.is_alive()
    sync.intake.park()
    sync.intake.wait_while_parked()


def test_threads_that_compute_and_average_lose_no_sample(late: Peer) -> None:
    """Every sample is in an average, or counted as dropped, or still there at the end."""
    is_over = threading.Event()
    num_computed = 0

    def compute() -> None:
        nonlocal num_computed
        while not is_over.is_set():
            late.compute(num_samples=3)
            num_computed += 3

    computing, num_averaged = in_thread(compute), 0.0
    for number in range(60):
        taken = late.intake.take()
        is_used = number % 3 != 0
        num_averaged += taken[1] if taken is not None and is_used else 0.0
        late.intake.settle(is_used=is_used)
        if is_used:
            late.holder.step(gradient(number))
            late.intake.begin_epoch(late.holder.epoch)
    is_over.set()
    computing.join(WAIT_SECONDS)
    rest = late.intake.take()
    assert num_averaged + late.intake.num_dropped + (rest[1] if rest else 0.0) == num_computed
    assert num_averaged > 0
