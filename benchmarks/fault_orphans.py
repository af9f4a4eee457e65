"""Does anything outlive its owner? Processes of a run's peers that no living watchdog is above of."""

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from calm_ray.peers.vitals import MARK

LIMIT_SECONDS = 10.0
LOOK_SECONDS = 2.0


class Orphans:
    """`look()` often; `overdue` has a line for each process that was seen without its owner for LIMIT_SECONDS."""

    def __init__(self, peers: Path) -> None:
        self._peers = str(peers.resolve())
        self._seen: dict[tuple[int, float], float] = {}
        self._looked_at = 0.0
        self.overdue: dict[tuple[int, float], str] = {}
        self.longest = 0.0
        """Seconds that any of them lived on, as far as it was seen."""

    def look(self, watchdogs: Iterable[int]) -> None:
        """`watchdogs`: those that live. At most every LOOK_SECONDS, for it reads every process's environment."""
        now = time.monotonic()
        if now < self._looked_at + LOOK_SECONDS:
            return
        self._looked_at, owners = now, set(watchdogs)
        found: dict[tuple[int, float], float] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if not process.environ().get(MARK, "").startswith(self._peers):
                    continue
                if owners.isdisjoint(p.pid for p in process.parents()):
                    place = (process.pid, process.create_time())
                    found[place] = self._seen.get(place, now)
                    alone = now - found[place]
                    self.longest = max(self.longest, alone)
                    if alone > LIMIT_SECONDS:
                        self.overdue[place] = f"{process.name()} ({process.pid}) of {process.environ()[MARK]}"
        self._seen = found
