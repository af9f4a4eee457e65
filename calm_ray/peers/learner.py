"""Model, optimizer and rules as a run's bundle defines them: the same for every peer that takes part in averaging."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from calm_ray.config import RunTable
from calm_ray.swarm.holder import StepRules
from calm_ray.training.model import build_model, parameter_groups
from calm_ray.training.optim import clip_gradient_, make_optimizer, make_schedule
from calm_ray.training.prepare import load_bundle_model_config


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What is averaged and how a step is taken."""

    model: Any
    param_groups: list[dict[str, Any]]
    rules: StepRules


def make_learner(run: RunTable, bundle: Path, *, device: str) -> Learner:
    """Build the run's model with its initial weights on `device`."""
    model = build_model(load_bundle_model_config(bundle), seed=run.model.init_seed)
    nn.Module.to(model, device)
    return Learner(
        model=model,
        param_groups=parameter_groups(model, run.optimizer),
        rules=StepRules(
            make_optimizer=lambda groups: make_optimizer(groups, table=run.optimizer),
            make_schedule=make_schedule(run.optimizer),
            before_step=lambda gradients: clip_gradient_(gradients, max_norm=run.optimizer.max_grad_norm),
        ),
    )
