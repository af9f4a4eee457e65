"""Where the computing thread and the rounds thread meet: gradients in, parameters out, one waiting if it must.

Each micro-batch counts towards the epoch in which it arrives, or towards the next if a round is on, provided that it
was computed with parameters at most `max_staleness` epochs old by then. With 0, the computing thread waits meanwhile.
"""

import math
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
        self._should_park = self._is_parked = self._is_closed = self._is_in_round = False
        self.epoch = 0
        """Of the swarm's state as we last published it."""
        self._model_epoch = 0
        """Of the parameters in the model."""
        self._oldest = self._oldest_taken = math.inf
        """Epoch of the oldest parameters behind what is in the accumulator, and behind what is in a round."""
        self._num_published = self._num_copied = 0
        self.num_dropped = 0

    # --- the computing thread ----------------------------------------------------------------------------------------

    def add(self, num_samples: int) -> None:
        """Count what stands in `.grad`, a mean over `num_samples`, or drop it if it is too old."""
        with self._changed:
            if self.epoch + self._is_in_round - self._model_epoch <= self._max_staleness:
                self._accumulator.add(num_samples)
                self._oldest = min(self._oldest, self._model_epoch)
            else:
                self.num_dropped += num_samples
            if not self._is_in_round:  # during a round, our record goes on saying what we bring to it
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

    @property
    def is_waited_for(self) -> bool:
        """Whether the computing thread stands still in `wait_while_parked`."""
        return self._is_parked

    def refresh_model(self) -> None:
        """Give the model the newest parameters."""
        if self._num_copied != self._num_published:
            with self._holder.lock:
                self._num_copied = self._num_published
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
            self._taken, self._is_in_round = self._accumulator.take(), True
            self._oldest_taken, self._oldest = self._oldest, math.inf
            if self._taken is None:
                return None
            return self._taken.vector, float(self._taken.num_samples)

    def settle(self, *, is_used: bool, residual: torch.Tensor | None = None) -> None:
        """The round is over: its gradient is in the average, or goes back; `residual` goes into the next one."""
        with self._changed:
            if self._taken is not None and not is_used:
                self._accumulator.give_back(self._taken)
                self._oldest = min(self._oldest, self._oldest_taken)
            if residual is not None:
                self._accumulator.carry(residual)
            self._taken, self._is_in_round = None, is_used  # until the step is done

    def drop(self) -> None:
        """What has been accumulated, and the micro-batch under way, belong to other parameters."""
        with self._changed:
            self.num_dropped += self._accumulator.clear()
            self._oldest, self._model_epoch = math.inf, -1 - self._max_staleness

    def begin_epoch(self, epoch: int) -> None:
        """The holder has the state of `epoch`: count towards it, and let the computing thread fetch it."""
        with self._changed:
            self.epoch, self._is_in_round = epoch, False
            self._num_published += 1
            if epoch - self._oldest > self._max_staleness:  # it came back from a round that failed
                self.num_dropped += self._accumulator.clear(is_residual_kept=True)
                self._oldest = math.inf
            num_samples = self._accumulator.num_samples
        # Not under our lock: the tracker's own is held while it reads the DHT, and the computing thread must not wait.
        self._tracker.begin_epoch(epoch, samples_accumulated=num_samples)
