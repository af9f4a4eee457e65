"""How much of this machine its host gave to others meanwhile: on rented cores a ratio is only worth what both its
sides were measured under."""

import os
import time
from pathlib import Path

_STEAL = 8
"""The column of /proc/stat, see proc(5)."""


class Stolen:
    """From its construction on."""

    def __init__(self) -> None:
        self._began_at, self._began = time.monotonic(), _stolen_seconds()

    def share(self) -> float:
        """Of all cores' time; 0 where the kernel does not tell."""
        cores = os.cpu_count() or 1
        return (_stolen_seconds() - self._began) / (cores * max(1e-9, time.monotonic() - self._began_at))


def _stolen_seconds() -> float:
    try:
        return int(Path("/proc/stat").read_text().split()[_STEAL]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0
