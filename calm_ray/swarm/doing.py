"""What the rounds thread is doing now: for the words of `calm-ray status`, and for the watchdog, which judges progress.

Written by the rounds thread, read by any other: each field is replaced at once.
"""

from dataclasses import dataclass
from enum import Enum


class Stage(Enum):
    """Where the rounds thread is."""

    ACCUMULATE = "accumulate"
    MATCH = "match"
    AVERAGE = "average"
    STEP = "step"
    CATCH_UP = "catch up"


@dataclass
class Doing:
    """One rounds thread."""

    stage: Stage = Stage.ACCUMULATE
    turns: int = 0
    """Of its loop; every chunk of a download counts as one, for a download may take an hour."""
    is_forsaken: bool = False
    """Everybody has fallen silent, and we wait for them."""
    downloaded_bytes: int | None = None
    """Of a state that is being downloaded."""
    state_bytes: int = 0
    """What that state will have, as our own has it."""

    def begin_download(self, state_bytes: int) -> None:
        self.state_bytes, self.downloaded_bytes = state_bytes, 0

    def note_downloaded(self, num_bytes: int) -> None:
        self.downloaded_bytes = num_bytes
        self.turns += 1

    def end_download(self) -> None:
        self.downloaded_bytes = None

    @property
    def percent(self) -> int | None:
        """Of a download under way; 99 at most, as the size is only expected."""
        if self.downloaded_bytes is None or not self.state_bytes:
            return None
        return min(99, 100 * self.downloaded_bytes // self.state_bytes)

    def words(self, *, num_missing: int | None) -> str:
        """A few words; empty while nothing but samples is waited for. `num_missing`: peers that our group waits for."""
        if self.percent is not None:
            return f"downloading the swarm's state, {self.percent} %"
        if self.stage is Stage.MATCH:
            if num_missing:
                return f"waiting for {num_missing} more peer{'s' if num_missing > 1 else ''} to average with"
            return "finding the others to average with"
        if self.is_forsaken:
            return "everybody else has fallen silent: waiting for them before going on alone"
        return {Stage.AVERAGE: "averaging", Stage.CATCH_UP: "others are ahead: re-syncing"}.get(self.stage, "")
