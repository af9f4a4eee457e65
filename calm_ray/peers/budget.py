"""Start a peer again, and how soon, or park it: decided from the failures of its role slot.

The failures are on disk in the slot's folder, so that a new watchdog, or one on the next day, goes on counting. Waiting
for others (nobody answers, nobody has the state) is no failure of this machine, and is tried for ever. Rejected: one
number of restarts for a peer's life, which a peer of some weeks uses up by bad luck alone.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

FILE_NAME = "restarts.json"
BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 2.0, 60.0
FIRST_SECONDS = 0.5
"""The pause of one who had worked: it will most likely work again, and its swarm waits."""
MAX_EQUAL_FAILURES = 3
"""The same failure so often in a row, with no work in between, will not get better by waiting."""
MAX_PER_HOUR = 10
"""Of failures of any kind. A peer that lasts six minutes costs its swarm more in downloads than it gives."""
HOUR_SECONDS = 3600.0
PARKED_SECONDS = 1800.0
"""Whoever starts peers without being asked by a person leaves a parked one alone for so long."""
MAX_KEPT = 64
MAX_WHY = 500

Cause = Literal["crashed", "killed", "stalled", "memory", "unreachable", "no-state", "disk", "moved", "mistake"]
"""`crashed`: an error; `killed`: by a signal from outside; `stalled`: by the watchdog, for it made no progress;
`memory`: by the watchdog, for it grew too large; `mistake`: a person has to mend config, version or checkpoint."""
PATIENT: frozenset[Cause] = frozenset({"unreachable", "no-state", "disk", "moved"})


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Failure(_Record):
    """One end that nobody had asked for."""

    at: float
    """Unix seconds."""
    cause: Cause
    why: str
    has_worked: bool
    """Whether it did what its role is for after its start: a true round, a reading of the swarm. That it ran and
    answered is no work: a device that hangs at each start does so, too."""


class Ledger(_Record):
    """What a role slot's folder remembers."""

    failures: tuple[Failure, ...] = ()
    """The newest MAX_KEPT, newest last."""
    restarts: dict[Cause, int] = {}
    """Ever, by cause."""
    parked_at: float | None = None
    parked_why: str = ""

    def with_failure(self, failure: Failure) -> "Ledger":
        failure = failure.model_copy(update={"why": failure.why[:MAX_WHY]})
        return self.model_copy(update={"failures": (*self.failures, failure)[-MAX_KEPT:]})

    def with_restart(self, cause: Cause) -> "Ledger":
        return self.model_copy(update={"restarts": self.restarts | {cause: self.restarts.get(cause, 0) + 1}})

    def parked(self, why: str, *, now: float) -> "Ledger":
        return self.model_copy(update={"parked_at": now, "parked_why": why[:MAX_WHY]})

    def pardoned(self) -> "Ledger":
        """A person starts it again, and has surely mended what was wrong."""
        return self.model_copy(update={"failures": (), "parked_at": None, "parked_why": ""})

    def is_parked(self, *, now: float) -> bool:
        return self.parked_at is not None and 0 <= now - self.parked_at < PARKED_SECONDS


@dataclass(frozen=True, kw_only=True)
class Decision:
    """`park` says why, or is empty: then start again after `pause_seconds`, less some jitter."""

    pause_seconds: float = 0.0
    park: str = ""


def decide(failures: Sequence[Failure], *, now: float) -> Decision:
    """What to do after the last of `failures`. A clock that was set back makes failures of the future; they count."""
    last = failures[-1]
    if last.cause == "mistake":
        return Decision(park=last.why)
    in_vain = _trailing(failures, lambda f: not f.has_worked)
    equal = _trailing(in_vain, lambda f: (f.cause, f.why) == (last.cause, last.why))
    if last.cause not in PATIENT:
        if len(equal) >= MAX_EQUAL_FAILURES:
            return Decision(park=f"{last.why} ({len(equal)} times in a row)")
        counted = [f for f in failures if f.cause not in PATIENT and now - f.at < HOUR_SECONDS]
        if len(counted) > MAX_PER_HOUR:
            return Decision(park=f"{len(counted)} failures within an hour, the last: {last.why}")
    return Decision(pause_seconds=backoff_seconds(len(in_vain)) if in_vain else FIRST_SECONDS)


def backoff_seconds(num_failures: int) -> float:
    """The pause after so many failures, one or more: twice as long each time, up to a limit."""
    return min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2.0 ** min(10, num_failures - 1))


def _trailing(failures: Sequence[Failure], holds: Callable[[Failure], bool]) -> list[Failure]:
    """The longest end of `failures` for which all hold."""
    found: list[Failure] = []
    for failure in reversed(failures):
        if not holds(failure):
            break
        found.append(failure)
    return found[::-1]


@dataclass
class LedgerFile:
    """A ledger in its folder. A disk that is full or read-only costs the memory of failures, never the peer."""

    folder: Path
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = read_ledger(self.folder)

    def keep(self, ledger: Ledger) -> None:
        if ledger == self.ledger:
            return
        self.ledger = ledger
        write_atomically(self.folder / FILE_NAME, ledger.model_dump_json())

    def record(self, failure: Failure, *, now: float) -> Decision:
        """Count a failure, decide what becomes of the peer, and keep both."""
        ledger = self.ledger.with_failure(failure)
        decision = decide(ledger.failures, now=now)
        self.keep(ledger.parked(decision.park, now=now) if decision.park else ledger.with_restart(failure.cause))
        return decision


def read_ledger(folder: Path) -> Ledger:
    """What is there; an empty one if there is nothing, or nothing that can be read."""
    try:
        return Ledger.model_validate_json((folder / FILE_NAME).read_bytes())
    except (OSError, ValidationError):
        return Ledger()


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` as a whole, or leave it; a disk that is full or read-only is no error here."""
    partial = path.with_name(path.name + ".partial")
    with contextlib.suppress(OSError):
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
