"""Compute only a share of the time: for heat, noise, or whoever else uses the machine."""

import time
from collections import deque
from collections.abc import Callable
from statistics import median

WINDOW = 16
"""Micro-batches. Their median is what one takes: an outlier is not paid for."""


def busy_clock(device: str) -> Callable[[], float]:
    """Counts the seconds in which `device` computes for the thread that asks. On a CPU those are the thread's own: a
    micro-batch that others kept from the cores has computed no longer for it, and needs no longer a rest."""
    return time.thread_time if device == "cpu" else time.monotonic


class Pace:
    """Tells when the next micro-batch is due."""

    def __init__(self, duty_cycle: float) -> None:
        """`duty_cycle`: share of the time to compute, above 0 and up to 1."""
        self._duty_cycle = duty_cycle
        self._durations: deque[float] = deque(maxlen=WINDOW)

    def note(self, busy_seconds: float) -> None:
        """So long has a micro-batch computed."""
        self._durations.append(busy_seconds)

    def rest_after(self, seconds: float) -> float:
        """Seconds to rest, `seconds` after the last micro-batch began: whatever came after it was a rest as well."""
        if self._duty_cycle == 1 or not self._durations:
            return 0.0
        return max(0.0, median(self._durations) / self._duty_cycle - seconds)
