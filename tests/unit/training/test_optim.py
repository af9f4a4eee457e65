"""The optimizer starts with its state in place and no step behind it; the floor of the schedule is a rate."""

from typing import Any

import pytest
import torch
from torch import nn

from calm_ray.tables import OptimizerTable
from calm_ray.training.optim import (
    LAMB_WEIGHT_NORM_CLAMP,
    clip_gradient_,
    learning_rate_at,
    make_optimizer,
    make_schedule,
)

NAMES = ["adamw", "lamb"]


def make_table(name: str) -> OptimizerTable:
    return OptimizerTable.model_validate(
        {"name": name, "learning_rate": 0.01, "decay_epochs": 100, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    )


def make_groups() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    matrix = nn.Parameter(torch.randn(4, 3, generator=generator))
    bias = nn.Parameter(torch.tensor([0.0, -0.0, 1e-30]))
    return [{"params": [matrix], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]


def parameters_of(groups: list[dict[str, Any]]) -> list[nn.Parameter]:
    return [parameter for group in groups for parameter in group["params"]]


def set_gradients(groups: list[dict[str, Any]], *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters_of(groups):
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_when_made_has_state_and_untouched_parameters(name: str) -> None:
    groups, untouched = make_groups(), make_groups()
    optimizer = make_optimizer(groups, table=make_table(name))
    for parameter, before in zip(parameters_of(groups), parameters_of(untouched), strict=True):
        assert torch.equal(parameter.view(torch.int32), before.view(torch.int32))
        assert parameter.grad is None
        assert not optimizer.state[parameter]["exp_avg"].any()
        assert not optimizer.state[parameter]["exp_avg_sq"].any()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_adamw_first_steps_equal_a_fresh_optimizers() -> None:
    ours, theirs = make_groups(), make_groups()
    table = make_table("adamw")
    optimizer = make_optimizer(ours, table=table)
    fresh = torch.optim.AdamW(theirs, lr=0.01, betas=table.betas, eps=table.eps, foreach=False)
    for seed in (1, 2):
        for groups, stepped in ((ours, optimizer), (theirs, fresh)):
            set_gradients(groups, seed=seed)
            stepped.step()
    for got, expected in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        assert torch.equal(got, expected)


def test_lamb_first_steps_equal_algorithm_2_of_the_paper() -> None:
    groups, table = make_groups(), make_table("lamb")
    expected = [parameter.detach().clone() for parameter in parameters_of(groups)]
    first = [torch.zeros_like(value) for value in expected]
    second = [torch.zeros_like(value) for value in expected]
    optimizer = make_optimizer(groups, table=table)
    for seed in (1, 2):
        set_gradients(groups, seed=seed)
        for i, (parameter, decay) in enumerate(zip(parameters_of(groups), (0.1, 0.0), strict=True)):
            assert parameter.grad is not None
            first[i] = 0.9 * first[i] + 0.1 * parameter.grad
            second[i] = 0.95 * second[i] + 0.05 * parameter.grad**2
            update = first[i] / (second[i].sqrt() + table.eps) + decay * expected[i]
            weight_norm = expected[i].norm().clamp(max=LAMB_WEIGHT_NORM_CLAMP)
            ratio = weight_norm / update.norm() if weight_norm > 0 and update.norm() > 0 else 1.0
            expected[i] = expected[i] - 0.01 * ratio * update
        optimizer.step()
        for got, value in zip(parameters_of(groups), expected, strict=True):
            torch.testing.assert_close(got.detach(), value)


def test_lamb_large_weights_are_not_clamped_to_ten() -> None:
    parameter = nn.Parameter(torch.full((100, 100), 1.0))
    optimizer = make_optimizer([{"params": [parameter], "weight_decay": 0.0}], table=make_table("lamb"))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert (1.0 - float(parameter[0, 0].detach())) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_state_has_the_same_keys_after_every_step(name: str) -> None:
    groups = make_groups()
    optimizer = make_optimizer(groups, table=make_table(name))
    keys = [sorted(state) for state in optimizer.state_dict()["state"].values()]
    for seed in (1, 2):
        set_gradients(groups, seed=seed)
        optimizer.step()
        assert [sorted(state) for state in optimizer.state_dict()["state"].values()] == keys


def test_learning_rate_warms_up_decays_and_stays_on_the_floor() -> None:
    table = OptimizerTable(
        name="lamb", learning_rate=0.0025, min_learning_rate=1e-5, warmup_epochs=3125, decay_epochs=31250
    )
    assert learning_rate_at(0, table=table) == pytest.approx(0.0025 / 3125)
    assert learning_rate_at(3124, table=table) == learning_rate_at(3125, table=table) == 0.0025
    assert learning_rate_at((3125 + 31250) // 2, table=table) == pytest.approx((0.0025 + 1e-5) / 2, rel=1e-3)
    assert learning_rate_at(31250, table=table) == learning_rate_at(10**6, table=table) == pytest.approx(1e-5)


def test_schedule_steps_once_per_epoch() -> None:
    table = OptimizerTable(name="adamw", learning_rate=0.01, min_learning_rate=0.001, warmup_epochs=2, decay_epochs=6)
    optimizer = make_optimizer(make_groups(), table=table)
    schedule = make_schedule(table)(optimizer)
    for epoch in range(8):
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(learning_rate_at(epoch, table=table))
        optimizer.step()
        schedule.step()


def test_clip_when_norm_is_larger_scales_all_together() -> None:
    gradients = [torch.tensor([3.0]), torch.tensor([[4.0]])]
    assert clip_gradient_(gradients, max_norm=1.0) == pytest.approx(5.0)
    assert float(gradients[0]) == pytest.approx(0.6)
    assert clip_gradient_(gradients, max_norm=1.1) == pytest.approx(1.0)
    assert float(gradients[1]) == pytest.approx(0.8)


def test_clip_when_gradient_is_not_finite_reports_it_and_changes_nothing() -> None:
    gradients = [torch.tensor([float("inf")]), torch.tensor([4.0])]
    assert clip_gradient_(gradients, max_norm=1.0) == float("inf")
    assert float(gradients[1]) == 4.0
