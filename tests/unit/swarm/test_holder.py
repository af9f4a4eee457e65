"""The training state of one peer: the same bits from the same averages, nothing of a stranger's that does not fit."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from calm_ray.swarm.holder import MAX_EPOCH, HeldState, StateHolder
from calm_ray.training.optim import learning_rate_at, make_optimizer
from tests.unit.swarm.tiny_state import SHAPES, gradient, groups_of, holder, parameters, rules_of, table_of

NAMES: tuple[Literal["adamw", "lamb"], ...] = ("adamw", "lamb")
BIG = ((200, 400), (500,))
"""Large enough for torch to share a sum among threads."""


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> Literal["adamw", "lamb"]:
    found: Literal["adamw", "lamb"] = request.param
    return found


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def bits(held: StateHolder) -> bytes:
    """Everything that a step may change."""
    state = held.snapshot()
    return b"".join(t.numpy().tobytes() for t in state.tensors) + repr((held.epoch, rate(held))).encode()


def rate(held: StateHolder) -> float:
    return float(held.optimizer.param_groups[0]["lr"])


def steps(held: StateHolder, count: int) -> StateHolder:
    for _ in range(count):
        assert held.step(gradient(held.epoch, size=held.num_elements))
    return held


# --- steps -----------------------------------------------------------------------------------------------------------


def test_step_gives_equal_bits_with_any_number_of_threads(name: Any, threads: Callable[[int], None]) -> None:
    """torch shares a sum among its threads, and then adds in another order."""

    def before_step(gradients: list[torch.Tensor]) -> float:
        scale = torch.stack([g.sum() for g in gradients]).sum()
        torch._foreach_mul_(gradients, scale)
        return float(scale)

    rules = replace(rules_of(table_of(name)), before_step=before_step)
    found, sums = set(), set()
    for number in (1, 2, 4):
        threads(number)
        held = StateHolder(groups_of(parameters(BIG)), rules=rules, should_offload=True)
        found.add(bits(steps(held, 2)))
        sums.add(float(gradient(0, size=held.num_elements).sum()))
        assert torch.get_num_threads() == number, "other threads' number is as it was"
    assert len(found) == 1
    assert len(sums) > 1, "if this fails one day, torch sums alike with any number of threads: steps could use them"


def test_first_step_is_the_optimizers_own(name: Any) -> None:
    """hivemind takes a phantom step with zero gradients first, which decays weights and moves Adam's counter."""
    table = table_of(name, max_grad_norm=1e9)
    model = parameters()
    alone = make_optimizer(groups_of(model), table=table)
    held = holder(table=table)
    for epoch in range(3):
        flat = gradient(epoch)
        ordered = [p for group in groups_of(model) for p in group["params"]]
        for parameter, piece in zip(ordered, flat.split([p.numel() for p in ordered]), strict=True):
            parameter.grad = piece.view(parameter.shape).clone()
        for group in alone.param_groups:
            group["lr"] = learning_rate_at(epoch, table=table)
        alone.step()
        held.step(flat)
        torch.testing.assert_close(held.flat_parameters, torch.cat([p.detach().flatten() for p in ordered]))


def test_parameters_before_the_first_step_are_the_models(name: Any) -> None:
    held = holder(table=table_of(name))
    ordered = [p for group in groups_of(parameters()) for p in group["params"]]
    assert torch.equal(held.flat_parameters, torch.cat([p.detach().flatten() for p in ordered]))
    assert held.num_elements == held.flat_parameters.numel()
    assert held.epoch == 0


def test_average_is_clipped_once_and_stays_as_it_was() -> None:
    average = 100 * gradient(0)
    kept = average.clone()
    seen: list[float] = []
    table = table_of("adamw")

    def before_step(gradients: list[torch.Tensor]) -> float:
        norm = rules_of(table).before_step(gradients)
        seen.append(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))))
        return norm

    held = StateHolder(
        groups_of(parameters()), rules=replace(rules_of(table), before_step=before_step), should_offload=True
    )
    held.step(average)
    assert torch.equal(average, kept), "others may still fetch it from us"
    assert seen == [pytest.approx(1.0)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradient_that_is_not_finite_moves_nobody_and_ends_the_epoch(name: Any, bad: float) -> None:
    held = steps(holder(table=table_of(name)), 2)
    before = held.snapshot()
    poison = gradient(9)
    poison[3] = bad
    assert not held.step(poison)
    after = held.snapshot()
    assert all(torch.equal(a, b) for a, b in zip(before.tensors, after.tensors, strict=True))
    assert held.epoch == 3
    assert rate(held) == pytest.approx(learning_rate_at(3, table=table_of(name)))
    assert held.step(gradient(3)), "and the next one is a step like any other"


def test_offloaded_model_changes_when_it_is_told_to_and_keeps_its_gradients() -> None:
    held = holder()
    model = held.model_parameters
    before = [p.detach().clone() for p in model]
    for parameter in model:
        parameter.grad = torch.full_like(parameter, 7.0)
    steps(held, 1)
    assert all(torch.equal(p, b) for p, b in zip(model, before, strict=True))
    held.copy_to_model()
    assert torch.equal(torch.cat([p.detach().flatten() for p in model]), held.flat_parameters)
    assert all(p.grad is not None and bool((p.grad == 7.0).all()) for p in model)


def test_model_that_is_not_offloaded_is_the_state_itself() -> None:
    held, copy = holder(should_offload=False), holder()
    for parameter in held.model_parameters:
        parameter.grad = torch.full_like(parameter, 7.0)
    steps(held, 3)
    steps(copy, 3)
    assert bits(held) == bits(copy)
    assert torch.equal(torch.cat([p.detach().flatten() for p in held.model_parameters]), held.flat_parameters)
    assert all(p.grad is not None and bool((p.grad == 7.0).all()) for p in held.model_parameters)


def test_schedule_follows_the_epoch(name: Any) -> None:
    table = table_of(name)
    held = holder(table=table)
    for epoch in range(60):
        assert rate(held) == pytest.approx(learning_rate_at(epoch, table=table)), epoch
        held.step(gradient(epoch))


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [(7, 0), (7, 3), (0, 7), (3, 7), (7, 7), (0, 60)])
def test_state_of_any_epoch_can_be_loaded(name: Any, epochs: tuple[int, int]) -> None:
    """Earlier or later than ours; after a cold start, the swarm's epoch may be before our own."""
    ours, theirs = epochs
    table = table_of(name)
    donor = steps(holder(table=table), theirs)
    held = steps(holder(table=table, seed=5), ours)
    held.load(donor.snapshot())
    assert bits(held) == bits(donor)
    assert rate(held) == pytest.approx(learning_rate_at(theirs, table=table))
    assert bits(steps(held, 3)) == bits(steps(donor, 3)), "and goes on alike"


def test_snapshot_is_a_copy_and_so_is_what_was_loaded(name: Any) -> None:
    donor = steps(holder(table=table_of(name)), 2)
    state, before = donor.snapshot(), bits(donor)
    kept = [t.clone() for t in state.tensors]
    held = holder(table=table_of(name), seed=5)
    held.load(state)
    steps(held, 2)
    steps(donor, 2)
    assert all(torch.equal(a, b) for a, b in zip(kept, state.tensors, strict=True))
    held.load(state)
    assert bits(held) == before


def test_options_of_the_donor_do_not_count(name: Any) -> None:
    donor = holder(table=table_of(name, learning_rate=5.0, weight_decay=0.5, betas=(0.1, 0.2), eps=1.0))
    held = holder(table=table_of(name))
    options = [{k: v for k, v in group.items() if k != "params"} for group in held.optimizer.param_groups]
    held.load(donor.snapshot())
    assert [{k: v for k, v in group.items() if k != "params"} for group in held.optimizer.param_groups] == options


Change = Callable[[HeldState], HeldState]


def with_tensor(index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def changed(state: HeldState) -> HeldState:
        tensors = list(state.tensors)
        tensors[index] = change(tensors[index])
        return replace(state, tensors=tensors)

    return changed


def with_value(index: int, value: torch.Tensor) -> Change:
    return with_tensor(index, lambda tensor: value.expand_as(tensor).to(tensor.dtype).contiguous())


def with_metadata(change: Callable[[list[Any]], list[Any]]) -> Change:
    return lambda state: replace(state, optimizer_metadata=change([dict(e) for e in state.optimizer_metadata]))


REFUSED: dict[str, Change] = {
    "no tensors": lambda state: replace(state, tensors=[]),
    "one tensor less": lambda state: replace(state, tensors=state.tensors[:-1]),
    "one tensor more": lambda state: replace(state, tensors=[*state.tensors, torch.ones(1)]),
    "another shape": with_tensor(0, lambda tensor: tensor.T.contiguous()),
    "another shape of the optimizer's": with_tensor(len(SHAPES), lambda tensor: tensor.flatten()),
    "another type": with_tensor(0, lambda tensor: tensor.double()),
    "numbers for bits": with_tensor(0, lambda tensor: tensor > 0),
    "NaN": with_tensor(1, lambda tensor: tensor * math.nan),
    "infinite": with_tensor(len(SHAPES), lambda tensor: tensor + math.inf),
    "negative epoch": lambda state: replace(state, epoch=-1),
    "epoch beyond all": lambda state: replace(state, epoch=10**9),
    "no metadata": with_metadata(lambda entries: []),
    "another length": with_metadata(lambda entries: entries[:-1]),
    "rubbish for entries": lambda state: replace(state, optimizer_metadata=[1, None, "x"]),  # type: ignore[list-item]
    "tensors for values": with_metadata(lambda entries: [{"type": "tensor", "index": 0} for _ in entries]),
    "unknown types": with_metadata(lambda entries: [{"type": []} for _ in entries]),
}


@pytest.mark.parametrize("what", REFUSED, ids=lambda what: what.replace(" ", "-"))
def test_state_that_does_not_fit_is_refused_and_ours_stays(name: Any, what: str) -> None:
    held = steps(holder(table=table_of(name)), 2)
    state, before = REFUSED[what](steps(holder(table=table_of(name)), 5).snapshot()), bits(held)
    for refuse in (held.check, held.load):
        with pytest.raises(ValueError, match=r"fit|NaN|epoch|optimizer's state"):
            refuse(state)
        assert bits(held) == before
    reference = steps(holder(table=table_of(name)), 2)
    assert bits(steps(held, 2)) == bits(steps(reference, 2))


def test_state_of_another_optimizer_is_refused() -> None:
    for ours, theirs in (NAMES, NAMES[::-1]):
        held = holder(table=table_of(ours))
        with pytest.raises(ValueError, match=r"fit|optimizer"):
            held.load(holder(table=table_of(theirs)).snapshot())


@pytest.mark.parametrize("count", [-1.0, 0.5, float(MAX_EPOCH + 1), math.nan, math.inf])
def test_step_counter_that_does_not_count_is_refused(count: float) -> None:
    """Of -1, Adam's next step would divide by zero."""
    held = steps(holder(table=table_of("adamw")), 1)
    state, before = held.snapshot(), bits(held)
    scalars = [index for index, tensor in enumerate(state.tensors) if tensor.ndim == 0]
    assert len(scalars) == len(SHAPES)
    with pytest.raises(ValueError, match=r"counter|NaN"):
        held.load(with_value(scalars[1], torch.tensor(count))(state))
    assert bits(held) == before


@pytest.mark.parametrize("count", [-1, 0.5, "1", None, [], True, MAX_EPOCH + 1, math.nan, 2**70])
def test_values_of_a_strangers_optimizer_cannot_be_anything(count: Any) -> None:
    """LAMB counts steps in its options, so that one value is taken from the donor."""
    held = steps(holder(table=table_of("lamb")), 1)
    state, before = held.snapshot(), bits(held)

    def everywhere(entries: list[Any]) -> list[Any]:
        return [{"type": "value", "value": count} if entry["type"] == "value" else entry for entry in entries]

    with pytest.raises(ValueError, match="counter"):
        held.load(with_metadata(everywhere)(state))
    assert bits(held) == before


def test_state_must_exist_before_the_first_step() -> None:
    """Or a newcomer's would not fit the swarm's; hivemind made it by a phantom step."""
    rules = replace(rules_of(table_of()), make_optimizer=lambda groups: torch.optim.AdamW(groups))
    with pytest.raises(ValueError, match="must allocate"):
        StateHolder(groups_of(parameters()), rules=rules, should_offload=True)


def test_parameters_alone_can_be_replaced(name: Any) -> None:
    held = steps(holder(table=table_of(name)), 2)
    before = held.snapshot()
    held.load_parameters(torch.ones(held.num_elements))
    assert bool((held.flat_parameters == 1).all())
    after = held.snapshot()
    number = len(SHAPES)
    assert all(bool((t == 1).all()) for t in after.tensors[:number])
    assert all(torch.equal(a, b) for a, b in zip(before.tensors[number:], after.tensors[number:], strict=True))
