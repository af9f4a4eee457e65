"""Gradients between two rounds: sums over samples in one flat buffer, taken whole when a group begins.

Two buffers change places: while one is averaged, the computing thread fills the other. Sums, not means: what lossy
compression left out, and what a failed round gives back, are then simply added.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from calm_ray.swarm.holder import views_of


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one peer brings to a round."""

    vector: torch.Tensor
    """Mean gradient over `num_samples`: flat, fp32, on the CPU."""
    num_samples: int


class Accumulator:
    """Adds micro-batches of one computing thread; `take` and `give_back` may come from another."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = list(parameters)
        size, device = sum(p.numel() for p in parameters), parameters[0].device
        self._buffers = [torch.zeros(size, device=device) for _ in range(2)]
        self._views = [views_of(buffer, parameters) for buffer in self._buffers]
        self._active = 0
        self._extra: torch.Tensor | None = None
        self._lock = threading.Lock()
        self.num_samples = 0

    @torch.no_grad()
    def add(self, num_samples: int) -> None:
        """Add the parameters' `.grad`, a mean over `num_samples`; parameters without one count as zero."""
        with self._lock:
            pairs = [(v, p.grad) for v, p in zip(self._views[self._active], self._parameters, strict=True)]
            views, gradients = [v for v, g in pairs if g is not None], [g for _, g in pairs if g is not None]
            torch._foreach_add_(views, gradients, alpha=float(num_samples))
            self.num_samples += num_samples

    @torch.no_grad()
    def take(self) -> Contribution | None:
        """Hand over what has been added since the last take; None if that is nothing."""
        with self._lock:
            if not self.num_samples:
                return None
            taken, num_samples, extra = self._buffers[self._active], self.num_samples, self._extra
            self._active = 1 - self._active
            self._buffers[self._active].zero_()
            self.num_samples, self._extra = 0, None
        vector = taken.to("cpu", copy=True)
        if extra is not None:
            vector += extra
        return Contribution(vector=vector.div_(num_samples), num_samples=num_samples)

    @torch.no_grad()
    def give_back(self, contribution: Contribution) -> None:
        """Undo a `take`: the round failed, the samples are still good."""
        with self._lock:
            total = contribution.vector.to(self._buffers[0].device) * contribution.num_samples
            self._buffers[self._active].add_(total)
            self.num_samples += contribution.num_samples

    def carry(self, residual: torch.Tensor) -> None:
        """Add what compression left out (times its weight) to the next contribution: error feedback."""
        with self._lock:
            self._extra = residual if self._extra is None else self._extra + residual

    def clear(self, *, is_residual_kept: bool = False) -> int:
        """Forget all gradients, and after loading another state the residual too; the number of samples lost."""
        with self._lock:
            lost, self.num_samples = self.num_samples, 0
            self._extra = self._extra if is_residual_kept else None
            self._buffers[self._active].zero_()
            return lost
