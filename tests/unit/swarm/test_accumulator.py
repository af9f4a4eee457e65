"""Sums of gradients between two rounds: nothing is lost when buffers change places, nothing counts twice."""

import threading
from collections.abc import Callable

import pytest
import torch

from calm_ray.swarm.accumulator import Accumulator, Contribution

SHAPES = ((3, 4), (5,))
SIZE = 17


@pytest.fixture
def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]


def fill(parameters: list[torch.nn.Parameter], value: float) -> None:
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, value)


def test_contribution_is_the_mean_over_samples(parameters: list[torch.nn.Parameter]) -> None:
    accumulator = Accumulator(parameters)
    for value, num_samples in ((1.0, 1), (4.0, 3), (0.0, 4)):
        fill(parameters, value)
        accumulator.add(num_samples)
    assert accumulator.num_samples == 8
    taken = accumulator.take()
    assert taken is not None
    assert taken.num_samples == 8
    assert torch.equal(taken.vector, torch.full((SIZE,), 13 / 8))
    assert accumulator.num_samples == 0


def test_elements_stand_in_the_parameters_order(parameters: list[torch.nn.Parameter]) -> None:
    accumulator = Accumulator(parameters)
    flat = torch.arange(SIZE, dtype=torch.float32)
    for parameter, piece in zip(parameters, flat.split([12, 5]), strict=True):
        parameter.grad = piece.view(parameter.shape)
    accumulator.add(2)
    taken = accumulator.take()
    assert taken is not None
    assert torch.equal(taken.vector, flat)


def test_parameter_without_a_gradient_counts_as_zero(parameters: list[torch.nn.Parameter]) -> None:
    accumulator = Accumulator(parameters)
    fill(parameters, 1.0)
    parameters[0].grad = None
    accumulator.add(4)
    taken = accumulator.take()
    assert taken is not None
    assert torch.equal(taken.vector, torch.cat([torch.zeros(12), torch.ones(5)]))


def test_nothing_added_is_nothing_to_take(parameters: list[torch.nn.Parameter]) -> None:
    accumulator = Accumulator(parameters)
    assert accumulator.take() is None
    fill(parameters, 1.0)
    accumulator.add(1)
    assert accumulator.take() is not None
    assert accumulator.take() is None


def test_what_was_taken_stays_while_others_are_added(parameters: list[torch.nn.Parameter]) -> None:
    """The vector is on its way to others when the computing thread goes on."""
    accumulator = Accumulator(parameters)
    fill(parameters, 1.0)
    accumulator.add(2)
    first = accumulator.take()
    for value in (5.0, 7.0):
        fill(parameters, value)
        accumulator.add(1)
    second = accumulator.take()
    assert first is not None and second is not None
    assert torch.equal(first.vector, torch.ones(SIZE))
    assert torch.equal(second.vector, torch.full((SIZE,), 6.0)), "the buffer was empty when it came into use again"


def test_contribution_that_comes_back_counts_once_more(parameters: list[torch.nn.Parameter]) -> None:
    accumulator = Accumulator(parameters)
    fill(parameters, 1.0)
    accumulator.add(2)
    taken = accumulator.take()
    assert taken is not None
    fill(parameters, 4.0)
    accumulator.add(6)
    accumulator.give_back(taken)
    assert accumulator.num_samples == 8
    again = accumulator.take()
    assert again is not None
    assert torch.equal(again.vector, torch.full((SIZE,), 26 / 8))


def test_residual_is_added_to_the_next_contribution_in_sum_units(parameters: list[torch.nn.Parameter]) -> None:
    accumulator = Accumulator(parameters)
    accumulator.carry(torch.full((SIZE,), 3.0))
    accumulator.carry(torch.full((SIZE,), -1.0))
    assert accumulator.take() is None, "a residual alone has no weight"
    fill(parameters, 1.0)
    accumulator.add(4)
    first, second = accumulator.take(), accumulator.take()
    assert first is not None
    assert torch.equal(first.vector, torch.full((SIZE,), 1.0 + 2.0 / 4))
    assert second is None
    fill(parameters, 1.0)
    accumulator.add(4)
    third = accumulator.take()
    assert third is not None
    assert torch.equal(third.vector, torch.ones(SIZE)), "once"


def test_residual_comes_back_with_the_contribution_that_held_it(parameters: list[torch.nn.Parameter]) -> None:
    accumulator = Accumulator(parameters)
    accumulator.carry(torch.full((SIZE,), 2.0))
    fill(parameters, 1.0)
    accumulator.add(4)
    taken = accumulator.take()
    assert taken is not None
    accumulator.give_back(taken)
    again = accumulator.take()
    assert again is not None
    assert torch.equal(again.vector, taken.vector)


def test_clear_forgets_gradients_and_says_how_many(parameters: list[torch.nn.Parameter]) -> None:
    for is_residual_kept, expected in ((False, 1.0), (True, 2.0)):
        accumulator = Accumulator(parameters)
        accumulator.carry(torch.full((SIZE,), 4.0))
        fill(parameters, 9.0)
        accumulator.add(3)
        assert accumulator.clear(is_residual_kept=is_residual_kept) == 3
        assert accumulator.take() is None
        fill(parameters, 1.0)
        accumulator.add(4)
        taken = accumulator.take()
        assert taken is not None
        assert torch.equal(taken.vector, torch.full((SIZE,), expected))


def test_threads_that_take_and_give_back_lose_nothing() -> None:
    """Whole numbers: every sum is exact, so what was added can be counted."""
    size, num_batches = 4096, 3000
    parameter = torch.nn.Parameter(torch.zeros(size))
    accumulator = Accumulator([parameter])
    is_done = threading.Event()
    used: list[Contribution] = []

    def compute() -> None:
        parameter.grad = torch.ones(size)
        for number in range(num_batches):
            accumulator.add(1 + number % 2)
        is_done.set()

    def average() -> None:
        is_kept = False
        while not is_done.is_set():
            taken = accumulator.take()
            if taken is None:
                continue
            assert bool((taken.vector == taken.vector[0]).all()), "a micro-batch is in it whole or not at all"
            is_kept = not is_kept
            if is_kept:
                used.append(taken)
            else:
                accumulator.give_back(taken)

    run_together(compute, average)
    last = accumulator.take()
    used.extend([last] if last is not None else [])
    assert sum(taken.num_samples for taken in used) == num_batches * 3 // 2
    for taken in used:
        assert torch.allclose(taken.vector, torch.ones(size), rtol=1e-6)
    assert len(used) > 1


def run_together(*jobs: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as exc:  # noqa: BLE001  told in the test's own thread
            failures.append(exc)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures, failures
