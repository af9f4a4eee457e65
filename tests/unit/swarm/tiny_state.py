"""A training state of some hundred numbers, with the real optimizers and their real schedule."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch

from calm_ray.swarm.holder import StateHolder, StepRules
from calm_ray.tables import OptimizerTable
from calm_ray.training.optim import clip_gradient_, make_optimizer, make_schedule

SHAPES: tuple[tuple[int, ...], ...] = ((5, 7), (11,), (3, 2, 4))
NUM_ELEMENTS = 35 + 11 + 24


def table_of(name: Literal["adamw", "lamb"] = "adamw", **changes: Any) -> OptimizerTable:
    return OptimizerTable(
        **{"name": name, "learning_rate": 0.1, "warmup_epochs": 5, "decay_epochs": 50, "max_grad_norm": 1.0, **changes}
    )


def rules_of(table: OptimizerTable) -> StepRules:
    return StepRules(
        make_optimizer=partial(make_optimizer, table=table), make_schedule=make_schedule(table),
        before_step=partial(clip_gradient_, max_norm=table.max_grad_norm),
    )  # fmt: skip


def parameters(shapes: Sequence[tuple[int, ...]] = SHAPES, *, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def groups_of(model: Sequence[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups, as every model here has: matrices decay, vectors do not."""
    return [
        {"params": [p for p in model if p.ndim > 1]},
        {"params": [p for p in model if p.ndim <= 1], "weight_decay": 0.0},
    ]


def holder(
    *, table: OptimizerTable | None = None, shapes: Sequence[tuple[int, ...]] = SHAPES, should_offload: bool = True,
    seed: int = 0,
) -> StateHolder:  # fmt: skip
    return StateHolder(
        groups_of(parameters(shapes, seed=seed)), rules=rules_of(table or table_of()), should_offload=should_offload
    )


def gradient(seed: int, *, size: int = NUM_ELEMENTS) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))
