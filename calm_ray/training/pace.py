"""Compute only a share of the time: for heat, noise, or whoever else uses the machine."""

from collections import deque
from statistics import median

WINDOW = 16
"""Micro-batches. The rest follows from their median: one that was slow for others' sake is not paid for twice."""


class Pace:
    """Tells how long to rest after each micro-batch."""

    def __init__(self, duty_cycle: float) -> None:
        """`duty_cycle`: share of the time to compute, above 0 and up to 1."""
        self._rest_per_second = 1.0 / duty_cycle - 1.0
        self._durations: deque[float] = deque(maxlen=WINDOW)

    def rest_after(self, seconds: float) -> float:
        """Seconds to rest after a micro-batch that took `seconds`."""
        self._durations.append(seconds)
        return self._rest_per_second * median(self._durations)
