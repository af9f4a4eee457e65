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
from hivemind.optim.state_averager import dump_optimizer_state
from hivemind.utils import nested_flatten, nested_pack

MakeOptimizer = Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer]

MAX_EPOCH = 1_000_000
"""A stranger's state cannot claim more: the schedule goes there one epoch at a time, in some seconds."""


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

    def copy_to_model(self) -> None:
        """Give the model the held parameters. For the thread that computes with the model."""
        if not self.is_offloaded:
            return
        with self.lock, torch.no_grad():
            for ours, held in zip(self.model_parameters, self.parameters, strict=True):
                ours.copy_(held)

    @property
    def state_bytes(self) -> int:
        """Of parameters and optimizer together: what a newcomer downloads."""
        tensors = [*self.parameters, *(v for s in self.optimizer.state.values() for v in s.values())]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))

    def snapshot(self) -> HeldState:
        """Copy everything; costs the memory of the state once more."""
        with self.lock, torch.no_grad():
            metadata, tensors = dump_optimizer_state(self.optimizer)
            parameters = [p.detach().clone() for p in self.parameters]
            return HeldState(
                epoch=self.epoch, optimizer_metadata=metadata, tensors=[*parameters, *(t.clone() for t in tensors)]
            )

    def check(self, state: HeldState) -> None:
        """Raise ValueError unless `state` can be ours: same shapes and types, same optimizer, all finite."""
        self._filled_in(state)

    def load(self, state: HeldState) -> None:
        """Become a copy of `state`, or raise ValueError and stay as we are. Options and schedule are ours, not the
        donor's: of its optimizer only tensors and step counters count."""
        filled, number = self._filled_in(state), len(self.parameters)
        with self.lock, torch.no_grad():
            copies = {n: {k: v.clone() for k, v in values.items()} for n, values in filled["state"].items()}
            self.optimizer.load_state_dict({**filled, "state": copies})
            for parameter, loaded in zip(self.parameters, state.tensors[:number], strict=True):
                parameter.copy_(loaded)
            self._rewind()
            self.set_epoch(state.epoch)

    def _filled_in(self, state: HeldState) -> dict[str, Any]:
        """Our optimizer's state dict with a stranger's tensors and step counters; ValueError if they do not fit."""
        own = self.optimizer.state_dict()
        _, own_tensors = dump_optimizer_state(self.optimizer)
        expected = [(t.shape, t.dtype) for t in (*self.parameters, *own_tensors)]
        if [(t.shape, t.dtype) for t in state.tensors] != expected:
            raise ValueError(f"another model's state: {len(state.tensors)} tensors, or shapes, do not fit ours")
        if not all(bool(t.isfinite().all()) for t in state.tensors):
            raise ValueError("values are NaN or infinite")
        if not 0 <= state.epoch <= MAX_EPOCH:
            raise ValueError(f"epoch {state.epoch}, expected at most {MAX_EPOCH}")
        tensors, flat = iter(state.tensors[len(self.parameters) :]), []
        own_values = list(nested_flatten(own))
        entries = [entry if isinstance(entry, Mapping) else {} for entry in state.optimizer_metadata]
        if [entry.get("type") for entry in entries] != [_kind(value) for value in own_values]:
            raise ValueError("another optimizer's state")
        for value, entry in zip(own_values, entries, strict=True):
            flat.append(next(tensors) if isinstance(value, torch.Tensor) else entry.get("value"))
        theirs: dict[str, Any] = nested_pack(flat, structure=own)
        for ours, group in zip(own["param_groups"], theirs["param_groups"], strict=True):
            ours.update({"step": group["step"]} if "step" in ours else {})
        counters = [*own["param_groups"], *theirs["state"].values()]
        if not all(_is_count(counter["step"]) for counter in counters if "step" in counter):
            raise ValueError("a step counter that does not count")
        return {"state": theirs["state"], "param_groups": own["param_groups"]}

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


def _kind(value: Any) -> str:
    """As hivemind's metadata says it."""
    return "tensor" if isinstance(value, torch.Tensor) else "value"


def _is_count(value: Any) -> bool:
    number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    return is_number and 0 <= number <= MAX_EPOCH and number == int(number)


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
