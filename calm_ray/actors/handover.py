"""Bring the run's bundle to an actor whose machine lacks it, as often as it takes: calls get lost, disks fill up."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from calm_ray.actors.creation import in_a_line

RETRY_SECONDS = 10.0


@dataclass
class Handover:
    """To one actor. `num_tried` may be used to ask another source each time."""

    num_tried: int = 0
    _call: Any = None
    _due_at: float = 0.0
    """Monotonic."""
    _told: str = ""

    def go_on(self, actor: Any, parts: Callable[[], Any]) -> str:
        """To be called again and again while the actor says that it needs the bundle; never blocks. `parts()`: the
        bundle, or a reference to it, or None if nobody has it. Returns what is wrong, once."""
        if self._call is None:
            return self._begin(actor, parts) if time.monotonic() >= self._due_at else ""
        ready, _ = ray.wait([self._call], timeout=0)
        if not ready:
            return ""
        call, self._call = self._call, None
        try:
            return self._tell(ray.get(call))
        except ray.exceptions.RayError as exc:
            return self._tell(in_a_line(exc))

    def _begin(self, actor: Any, parts: Callable[[], Any]) -> str:
        self._due_at = time.monotonic() + RETRY_SECONDS
        found = parts()
        if found is None:
            return self._tell("nobody who is up has it, and the machine that the run began on is gone")
        self.num_tried += 1
        self._call = actor.take_bundle.remote(found)
        return ""

    def _tell(self, why: str) -> str:
        is_news, self._told = why != self._told, why
        return why if is_news else ""
