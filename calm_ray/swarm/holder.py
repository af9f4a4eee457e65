"""Who holds the training state: parameters, optimizer, schedule and epoch, in main memory, one flat vector each.

Trainers and auxiliary peers step with the same averaged gradient, and must come to the same bits. So a step runs on one
thread: torch splits sums among threads, and their number differs from machine to machine.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hivemind.optim.state_averager import dump_optimizer_state, load_optimizer_state

MakeOptimizer = Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class StepRules:
    """What the training code wants to happen around the global step. Plain callables: the swarm knows no model."""

    make_optimizer: MakeOptimizer
    make_schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
    before_step: Callable[[list[torch.Tensor]], float]
    """Gets the averaged gradients, may change them in place (clip), returns their norm. Not finite: no step."""


@dataclass(frozen=True, kw_only=True)
class HeldState:
    """A copy of the whole state at the end of one epoch: what a newcomer gets."""

    epoch: int
    optimizer_metadata: list[dict[str, Any]]
    tensors: Sequence[torch.Tensor]
    """Parameters in the optimizer's order, then the optimizer's tensors."""


class StateHolder:
    """The state of one peer. All methods but `copy_to_model` belong to one thread at a time; `lock` guards readers."""

    def __init__(self, param_groups: Iterable[dict[str, Any]], *, rules: StepRules, should_offload: bool) -> None:
        groups = [dict(group, params=list(group["params"])) for group in param_groups]
        self.model_parameters: list[torch.Tensor] = [p for group in groups for p in group["params"]]
        if not should_offload and any(p.device.type != "cpu" for p in self.model_parameters):
            raise ValueError("offload_optimizer = false needs a model on the CPU")
        self.is_offloaded = should_offload
        self.num_elements = sum(p.numel() for p in self.model_parameters)
        self.flat_parameters = torch.empty(self.num_elements)
        self._flat_gradient = torch.zeros(self.num_elements)
        self.lock = threading.RLock()
        self.epoch = 0
        self._rules = rules
        held = iter(self._adopt())
        for group in groups:
            group["params"] = [next(held) for _ in group["params"]]
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = rules.make_optimizer(groups)
        if len(self.optimizer.state) != len(self.parameters):
            raise ValueError("make_optimizer must allocate the optimizer's state: a newcomer's has to fit the swarm's")
        self._schedule = self._make_schedule()

    def _adopt(self) -> Iterator[torch.Tensor]:
        """Yield the parameters as views into one flat vector: the model's own ones if nothing is offloaded."""
        gradients = views_of(self._flat_gradient, self.model_parameters)
        parameters = views_of(self.flat_parameters, self.model_parameters)
        for ours, view, gradient in zip(self.model_parameters, parameters, gradients, strict=True):
            view.copy_(ours.detach())
            if self.is_offloaded:
                held: torch.Tensor = torch.nn.Parameter(view, requires_grad=True)
            else:
                held = ours
                held.data = view
            if self.is_offloaded:
                held.grad = gradient
            yield held

    def step(self, average: torch.Tensor) -> bool:
        """Take the step that ends this epoch with the flat `average`; whether parameters changed.

        A gradient whose norm is not finite moves nobody, and ends the epoch all the same: every member holds the same
        one, and decides alike.
        """
        with self.lock, single_threaded(), torch.no_grad():
            self._flat_gradient.copy_(average)
            gradients = views_of(self._flat_gradient, self.model_parameters)
            norm = self._rules.before_step(gradients)
            is_finite = math.isfinite(norm)
            if is_finite:
                kept = [p.grad for p in self.parameters]
                for parameter, gradient in zip(self.parameters, gradients, strict=True):
                    parameter.grad = gradient
                self.optimizer.step()
                for parameter, gradient_before in zip(self.parameters, kept, strict=True):
                    parameter.grad = gradient_before
            self.set_epoch(self.epoch + 1)
            return is_finite

    def set_epoch(self, epoch: int) -> None:
        """Move the epoch, and the learning rate with it."""
        self.epoch = epoch
        while self._schedule._step_count <= epoch:  # as hivemind's state averager counts
            self._schedule.step()

    def norm(self) -> float:
        with single_threaded():
            return float(torch.linalg.vector_norm(self.flat_parameters))

    def copy_to_model(self) -> None:
        """Give the model the held parameters. For the thread that computes with the model."""
        if not self.is_offloaded:
            return
        with self.lock, torch.no_grad():
            for ours, held in zip(self.model_parameters, self.parameters, strict=True):
                ours.copy_(held)

    def snapshot(self) -> HeldState:
        """Copy everything; costs the memory of the state once more."""
        with self.lock, torch.no_grad():
            metadata, tensors = dump_optimizer_state(self.optimizer)
            parameters = [p.detach().clone() for p in self.parameters]
            return HeldState(
                epoch=self.epoch, optimizer_metadata=metadata, tensors=[*parameters, *(t.clone() for t in tensors)]
            )

    def check(self, state: HeldState) -> None:
        """Raise ValueError unless `state` can be ours: same shapes, same optimizer, all finite."""
        own_metadata, own_tensors = dump_optimizer_state(self.optimizer)
        expected = [tuple(t.shape) for t in (*self.parameters, *own_tensors)]
        if [tuple(t.shape) for t in state.tensors] != expected:
            raise ValueError(f"another model's state: {len(state.tensors)} tensors, or shapes, do not fit ours")
        if not all(bool(t.isfinite().all()) for t in state.tensors):
            raise ValueError("values are NaN or infinite")
        kinds = [entry.get("type") for entry in state.optimizer_metadata if isinstance(entry, Mapping)]
        if kinds != [entry["type"] for entry in own_metadata]:
            raise ValueError("another optimizer's state")

    def load(self, state: HeldState) -> None:
        """Become `state`, or raise ValueError and stay as we are. The schedule is ours, not the donor's."""
        self.check(state)
        number = len(self.parameters)
        with self.lock, torch.no_grad():
            rates = [dict(group) for group in self.optimizer.param_groups]
            load_optimizer_state(self.optimizer, state.optimizer_metadata, list(state.tensors[number:]))
            for group, before in zip(self.optimizer.param_groups, rates, strict=True):
                group.update({k: v for k, v in before.items() if k not in ("params", "step")})
            for parameter, loaded in zip(self.parameters, state.tensors[:number], strict=True):
                parameter.copy_(loaded)
            self._rewind()
            self.set_epoch(state.epoch)

    def load_parameters(self, vector: torch.Tensor) -> None:
        """Replace the parameters by a flat vector; the optimizer's own state stays."""
        with self.lock, torch.no_grad():
            self.flat_parameters.copy_(vector)

    def _rewind(self) -> None:
        """Make the schedule anew, so that a state from before our epoch gets its own learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = group.pop("initial_lr", group["lr"])
        self._schedule = self._make_schedule()

    def _make_schedule(self) -> torch.optim.lr_scheduler.LRScheduler:
        schedule = self._rules.make_schedule(self.optimizer)
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # else torch warns when we catch up with an epoch
        return schedule


def views_of(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Cut a flat vector into views with the shapes of `like`, in order."""
    pieces = flat.split([t.numel() for t in like])
    return [piece.view(t.shape) for piece, t in zip(pieces, like, strict=True)]


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Let torch compute on this thread alone, so that sums come out the same whatever the machine's core count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
