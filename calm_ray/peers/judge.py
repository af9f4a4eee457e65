"""Is a peer making progress? Pure: what its child has said, when, and now.

A peer that hangs looks alive: its process runs, its ports answer. So the child counts what its role is for (a trainer's
micro-batches, the rounds thread's turns, a monitor's readings) and says how long each may stand still; the watchdog
compares. Rejected: limits known to the watchdog alone. A round may take seconds or an hour; only the child knows which.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

BEAT_SECONDS = 2.0
"""A child says something at least so often, whatever its other threads do."""
SILENT_SECONDS = 45.0
"""A process that is stopped, or whose interpreter hangs. Swapping and a suspended virtual machine can take as long."""
JOINING_SECONDS = 300.0
"""Between two words before it counts anything: importing torch from a slow disk, starting a libp2p daemon."""
GAP_SECONDS = 5.0
"""A watchdog that was away for longer, as in a suspended machine, has not been watching: nobody is blamed for it."""


class Pulse(BaseModel):
    """One thing that should go on."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    count: int
    """Any change is progress."""
    allowance_seconds: float = Field(gt=0)
    """It may stand still for so long."""


@dataclass
class _Seen:
    count: int
    changed_at: float


class Judge:
    """One child, from its start. All times are a monotonic clock's. Words say limits, not times, so that equal failures
    read alike."""

    def __init__(self, *, now: float) -> None:
        self._started_at = self._looked_at = now
        self._told_at = float("-inf")
        self._seen: dict[str, _Seen] = {}
        self._pulses: Mapping[str, Pulse] = {}

    def note(self, pulses: Mapping[str, Pulse], *, now: float) -> None:
        """The child has said something."""
        self._told_at = now
        self._pulses = pulses
        for name, pulse in pulses.items():
            seen = self._seen.get(name)
            if seen is None or seen.count != pulse.count:
                self._seen[name] = _Seen(pulse.count, now)
        for name in self._seen.keys() - pulses.keys():
            del self._seen[name]  # in this state nobody expects it; it begins anew when it comes back

    def verdict(self, *, now: float) -> str:
        """Why this child should be ended, or an empty string. Call it often: every second or so."""
        gap, self._looked_at = now - self._looked_at, now
        if gap > GAP_SECONDS:
            self._forgive(gap)
        limit = SILENT_SECONDS if self._pulses else JOINING_SECONDS
        if now - max(self._started_at, self._told_at) > limit:
            return f"the process has not said a word within {limit:.0f} s"
        for name, pulse in self._pulses.items():
            if now - self._seen[name].changed_at > pulse.allowance_seconds:
                return f"no progress within {pulse.allowance_seconds:.0f} s: {name}"
        return ""

    def _forgive(self, gap: float) -> None:
        self._started_at += gap
        self._told_at += gap
        for seen in self._seen.values():
            seen.changed_at += gap
