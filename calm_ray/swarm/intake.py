"""Where the computing thread and the rounds thread meet: gradients in, parameters out, one waiting if it must.

Each micro-batch counts towards the epoch in which it arrives, if it was computed with parameters at most
`max_staleness` epochs old. With 0, the computing thread waits while a round is on.
"""

import threading
import time

import torch

from calm_ray.swarm.accumulator import Accumulator, Contribution
from calm_ray.swarm.holder import StateHolder
from calm_ray.swarm.progress import ProgressTracker

PARK_SECONDS = 5.0
"""With max_staleness = 0, how long a round waits for the micro-batch under way. One that comes later is dropped."""


class Intake:
    """`add` and `wait_while_parked` are the computing thread's; the rest belongs to the rounds thread."""

    def __init__(self, holder: StateHolder, tracker: ProgressTracker, *, max_staleness: int) -> None:
        self._holder, self._tracker, self._max_staleness = holder, tracker, max_staleness
        self._accumulator = Accumulator(holder.model_parameters)
        self._taken: Contribution | None = None
        self._changed = threading.Condition()
        self._should_park = self._is_parked = self._is_closed = False
        self.epoch = self._model_epoch = 0
        """Of the swarm's state as we last published it; `_model_epoch` of the parameters in the model."""
        self.num_dropped = 0

    # --- the computing thread ----------------------------------------------------------------------------------------

    def add(self, num_samples: int) -> None:
        """Count what stands in `.grad`, a mean over `num_samples`, or drop it if it is too old."""
        with self._changed:
            if self.epoch - self._model_epoch <= self._max_staleness:
                self._accumulator.add(num_samples)
            else:
                self.num_dropped += num_samples
            if self._taken is None:  # during a round, our record goes on saying what we bring to it
                self._tracker.report(epoch=self.epoch, samples_accumulated=self._accumulator.num_samples)

    def wait_while_parked(self) -> None:
        if not self._should_park:
            return
        with self._changed:
            self._is_parked = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._should_park or self._is_closed)
            self._is_parked = False
        self._tracker.performance_ema.reset_timer()  # waiting is not computing slowly

    def refresh_model(self) -> None:
        """Give the model the newest parameters."""
        if self._model_epoch != self.epoch:
            with self._holder.lock:
                self._holder.copy_to_model()
                self._model_epoch = self._holder.epoch

    # --- the rounds thread -------------------------------------------------------------------------------------------

    @property
    def num_samples_taken(self) -> int:
        return self._taken.num_samples if self._taken is not None else 0

    def park(self) -> None:
        """Ask the computing thread to wait after its micro-batch, if staleness is not allowed."""
        self._should_park = self._max_staleness == 0 and not self._is_closed

    def unpark(self) -> None:
        with self._changed:
            self._should_park = False
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._is_closed, self._should_park = True, False
            self._changed.notify_all()

    def take(self) -> tuple[torch.Tensor, float] | None:
        """(mean gradient, samples) for a round, or None if there is nothing. `settle` afterwards."""
        deadline = time.monotonic() + PARK_SECONDS
        with self._changed:
            while self._should_park and not self._is_parked and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            self._taken = self._accumulator.take()
            if self._taken is None:
                return None
            return self._taken.vector, float(self._taken.num_samples)

    def settle(self, *, is_used: bool, residual: torch.Tensor | None = None) -> None:
        """The round is over: its gradient is in the average, or goes back; `residual` goes into the next one."""
        with self._changed:
            if self._taken is not None and not is_used:
                self._accumulator.give_back(self._taken)
            if residual is not None:
                self._accumulator.carry(residual)
            self._taken = None

    def drop(self) -> None:
        """What has been accumulated belongs to other parameters."""
        with self._changed:
            self.num_dropped += self._accumulator.clear()

    def begin_epoch(self, epoch: int) -> None:
        """The holder has the state of `epoch`: count towards it, and let the computing thread fetch it."""
        with self._changed:
            self.epoch = epoch
            self._tracker.begin_epoch(epoch, samples_accumulated=self._accumulator.num_samples)
