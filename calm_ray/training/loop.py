"""One micro-batch: forward, backward, and the gradient added to `.grad` only if every number in it is finite.

hivemind averages whatever stands in `.grad`, and one NaN from one peer turns the whole swarm's model into NaN in a
single round. So the gradient is computed beside `.grad`, looked at, and only then added. That costs one more copy of
the gradient (72 MB for ALBERT-large), and makes refusing exact: a refused micro-batch leaves no trace.
"""

import logging
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import AlbertForPreTraining

from calm_ray.training.batch import Batch
from calm_ray.training.compute import Compute
from calm_ray.training.model import enable_gradient_checkpointing, pretraining_losses
from calm_ray.training.optim import gradient_norm

log = logging.getLogger(__name__)

INITIAL_SCALE, MIN_SCALE, MAX_SCALE = 2.0**16, 1.0, 2.0**24
GROWTH_STEPS = 2000
"""torch.amp.GradScaler's constants. Its class is of no use here: it wants to own the optimizer's step."""


class Batches(Protocol):
    """Where micro-batches come from; `stream.TrainingBatches` is one."""

    def __next__(self) -> Batch: ...
    def set_epoch(self, epoch: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class MicroStep:
    """What one micro-batch gave. Means are over that micro-batch, in nats."""

    num_samples: int
    """Samples whose gradient was added; 0 if it was refused. Pass it to the swarm as the batch size."""

    mean_mlm_loss: float
    mean_sop_loss: float
    grad_norm: float
    """Of this micro-batch's gradient, unscaled and not clipped."""

    is_finite: bool


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """fp16 underflows below 6e-8; the loss is multiplied by this before the backward pass."""

    value: float
    num_good_steps: int = 0

    def after(self, *, is_finite: bool) -> "LossScale":
        """Halve after an overflow, double after a long run without one. Pure."""
        if not is_finite:
            return LossScale(value=max(MIN_SCALE, self.value / 2))
        if self.num_good_steps + 1 < GROWTH_STEPS:
            return LossScale(value=self.value, num_good_steps=self.num_good_steps + 1)
        return LossScale(value=min(MAX_SCALE, self.value * 2))


class GradientSource:
    """Computes gradients for whoever steps: add micro-batches into `.grad`, never touch the parameters.

    The caller, each time: `result = source.step(epoch=local_epoch)`, then, if `result.is_finite`,
    `optimizer.step(batch_size=result.num_samples)` and `optimizer.zero_grad()`. `.grad` then holds the mean over the
    micro-batch; without `zero_grad` between them, the means of several are summed.

    An fp16 overflow now and then is normal while the loss scale settles. Refusals in a row are counted in
    `num_refused_in_a_row`: more than about 30 mean that the model itself, or the machine, is broken.
    """

    def __init__(self, model: AlbertForPreTraining, *, batches: Batches, compute: Compute) -> None:
        self._model = nn.Module.to(model, compute.device).train()
        self._batches = batches
        self._compute = compute
        self._scale = LossScale(value=INITIAL_SCALE if compute.precision == "fp16" else 1.0)
        self._is_scaled = compute.precision == "fp16"
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.num_refused_in_a_row = 0
        if compute.gradient_checkpointing:
            enable_gradient_checkpointing(model)

    @property
    def device(self) -> str:
        return self._compute.device

    def step(self, *, epoch: int) -> MicroStep:
        """Run one micro-batch. Raise what the stream raises, StopIteration if it ends, torch's errors as they are."""
        self._batches.set_epoch(epoch)
        batch = next(self._batches)
        on_device = batch.to(self._compute.device)
        with self._compute.autocast():
            mlm_loss, sop_loss, _ = pretraining_losses(self._model, on_device)
        gradients = torch.autograd.grad((mlm_loss + sop_loss) * self._scale.value, self._parameters)
        norm = gradient_norm(gradients) / self._scale.value
        losses = (float(mlm_loss.detach()), float(sop_loss.detach()))
        is_finite = math.isfinite(norm) and all(map(math.isfinite, losses))
        if is_finite:
            self._add(gradients)
            self.num_refused_in_a_row = 0
        else:
            self.num_refused_in_a_row += 1
            log.warning(
                "micro_batch=refused mlm_loss=%s sop_loss=%s grad_norm=%s scale=%s in_a_row=%d",
                *losses,
                norm,
                self._scale.value,
                self.num_refused_in_a_row,
            )
        if self._is_scaled:
            self._scale = self._scale.after(is_finite=is_finite)
        return MicroStep(
            num_samples=batch.num_samples if is_finite else 0,
            mean_mlm_loss=losses[0],
            mean_sop_loss=losses[1],
            grad_norm=norm,
            is_finite=is_finite,
        )

    @torch.no_grad()
    def _add(self, gradients: tuple[torch.Tensor, ...]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(gradient, alpha=1.0 / self._scale.value)
