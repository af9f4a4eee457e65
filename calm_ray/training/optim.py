"""The global step's optimizer, its learning rate, and the clipping of the averaged gradient.

Every peer makes its own optimizer and applies the same averaged gradient, so all that happens here must be the same on
every machine: no fused kernels, no state that appears only at the first step.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from calm_ray.tables import OptimizerTable

LAMB_WEIGHT_NORM_CLAMP = 10_000.0
"""sahajBERT's value (DeDLOC, sahajbert/run_trainer.py). The LAMB paper's 10 would cut an embedding matrix's norm."""


def make_optimizer(param_groups: Iterable[dict[str, Any]], *, table: OptimizerTable) -> Optimizer:
    """Return the optimizer of `table` over `param_groups`, with its state allocated and no step taken.

    hivemind runs a step with zero gradients on an optimizer that has no state yet. That step decays the weights, moves
    Adam's step counter to 1, and the run differs from plain Adam ever after. So the state is allocated here, and the
    counters stand at 0. Parameters come back bit for bit as they were.
    """
    groups = [dict(group) for group in param_groups]
    if table.name == "adamw":
        optimizer: Optimizer = torch.optim.AdamW(
            groups,
            lr=table.learning_rate,
            betas=table.betas,
            eps=table.eps,
            weight_decay=table.weight_decay,
            foreach=False,
        )
    else:
        # weight_decouple=False adds the decay to the *update*, inside the trust ratio: LAMB, algorithm 2. It is not
        # L2 in the gradient. adam_debias=True leaves out Adam's bias correction, as the ancestors' TTT run did: the
        # trust ratio cancels any scale of the update, so "correcting" it would only make the first step 10 times lr.
        optimizer = _lamb_class()(
            groups,
            lr=table.learning_rate,
            betas=table.betas,
            eps=table.eps,
            weight_decay=table.weight_decay,
            weight_decouple=False,
            adam_debias=True,
            foreach=False,
        )
    _allocate_state(optimizer)
    return optimizer


def learning_rate_at(epoch: int, *, table: OptimizerTable) -> float:
    """Return the learning rate of the step that ends `epoch` (0 is the first).

    Linear warm-up, then linear decay to `min_learning_rate`, held after `decay_epochs`. The floor is a rate, not a
    factor: CALM took it for a factor and decayed to 2.5e-8 where 1e-5 was meant. Warm-up counts from 1, because a first
    step at rate 0 throws a whole epoch of the swarm's work away.
    """
    if epoch < table.warmup_epochs:
        return table.learning_rate * (epoch + 1) / table.warmup_epochs
    share = min(1.0, (epoch - table.warmup_epochs) / (table.decay_epochs - table.warmup_epochs))
    return table.learning_rate + share * (table.min_learning_rate - table.learning_rate)


def make_schedule(table: OptimizerTable) -> Callable[[Optimizer], LambdaLR]:
    """Return what hivemind calls to make its scheduler: it steps once per epoch, `last_epoch` is the local epoch."""

    def schedule(optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, lambda epoch: learning_rate_at(epoch, table=table) / table.learning_rate)

    return schedule


@torch.no_grad()
def clip_gradient_(gradients: Iterable[torch.Tensor], *, max_norm: float) -> float:
    """Scale `gradients` in place so that their common norm is at most `max_norm`; return the norm before.

    A norm that is not finite is returned and nothing is changed: whether to refuse the step is the caller's decision.
    """
    tensors = list(gradients)
    norm = gradient_norm(tensors)
    if max_norm < norm < float("inf"):
        torch._foreach_mul_(tensors, max_norm / norm)
    return norm


@torch.no_grad()
def gradient_norm(gradients: Iterable[torch.Tensor]) -> float:
    """Return the Euclidean norm of all `gradients` together; NaN or infinite if any element is."""
    norms = torch._foreach_norm(list(gradients))
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


@torch.no_grad()
def _allocate_state(optimizer: Optimizer) -> None:
    """Take one step at rate 0 with zero gradients and no decay, then set the counters back to 0."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept_gradients = [parameter.grad for parameter in parameters]
    kept_options = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    optimizer.step()
    for parameter, gradient in zip(parameters, kept_gradients, strict=True):
        parameter.grad = gradient
    for group, (rate, decay) in zip(optimizer.param_groups, kept_options, strict=True):
        group["lr"], group["weight_decay"] = rate, decay
        if "step" in group:
            group["step"] = 0  # LAMB counts per group
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()  # AdamW counts per parameter


@cache
def _lamb_class() -> Callable[..., Optimizer]:
    """Import late: a run with AdamW need not have the package."""
    from pytorch_optimizer import Lamb

    class StableLamb(Lamb):
        """LAMB whose state has the same shape after every step.

        The package keeps its last norms and ratio in the state, now as tensors, now as floats. State goes to
        newcomers and into checkpoints as a list of tensors, so a changing number of them would be refused.
        """

        clamp = LAMB_WEIGHT_NORM_CLAMP

        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            for state in self.state.values():
                for key in ("weight_norm", "adam_norm", "trust_ratio"):
                    state.pop(key, None)
            return loss

    return StableLamb
