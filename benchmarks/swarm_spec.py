"""What one process of a measured or tested swarm is to do, and the lines that it writes about it. Light: no torch here.

Measurements and tests drive real processes. Each gets a `ProcessSpec` as JSON, and writes a journal: one JSON object a
line, with `event`, the wall clock `at` and the monotonic clock `clock` (seconds; one machine, so all processes share
both).
"""

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from calm_ray.tables import AveragingTable

Driver = Literal["ours", "bare-delayed", "bare-synchronous", "control", "solo"]
"""Who steps: our optimizer; a bare `hivemind.Optimizer`, with or without delay; everyone for himself; nobody."""


class ProcessSpec(BaseModel):
    """One peer of a swarm, in a process of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    folder: Path
    """Gets the peer's identity, `journal.jsonl` and `log`. A restarted peer keeps folder and identity."""

    run_id: str
    driver: Driver = "ours"
    role: Literal["trainer", "client", "auxiliary"] = "trainer"
    initial_peers: tuple[str, ...] = ()
    averaging: AveragingTable = AveragingTable()
    target_batch_size: int = Field(ge=1)
    num_epochs: int = Field(default=10**9, ge=1)
    """Stop training here, then serve until told to leave."""

    task: Literal["language", "albert"] = "language"
    seed: int = 0
    """Of this peer's data."""

    model_seed: int = 0
    """Of the initial weights, the same for all peers of a run."""

    micro_batch_size: int = Field(default=8, ge=1)
    pause_seconds: float = Field(default=0.0, ge=0.0)
    """Each micro-batch takes that much longer: a slower machine that costs this one nothing."""

    seconds: float | None = None
    """For `solo`: how long to compute."""

    gate: Path | None = None
    """Begin training when this file is there, so that all begin together."""

    core: int | None = None
    """Pin the process and all its children to this core."""

    niceness: int = 0
    """Of the computing thread, set after joining, as `calm_ray.peers.trainer` does."""

    should_watch: bool = False
    """Write down every change of the parameters, with their SHA-256, and how long each round took from start to end."""

    should_log_batches: bool = False
    """Write a line for every micro-batch."""

    should_count: bool = False
    """Count calls, messages and DHT reads, and write the totals at every boundary."""

    @property
    def journal(self) -> Path:
        return self.folder / "journal.jsonl"


class Journal:
    """Appends events; from any thread. Each line is flushed: the process may be killed at any time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_cut = path.exists() and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        self._file.write("\n" if is_cut else "")
        self._lock = threading.Lock()

    def write(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, "at": time.time(), "clock": time.monotonic(), **fields})
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()


class JournalReader:
    """Reads what has been written since it last looked."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self._events: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """All whole lines so far, of every life of the peer; the last line may be cut off by a kill."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._offset)
                whole = file.read().rpartition(b"\n")
            self._offset += len(whole[0]) + len(whole[1])
            for line in whole[0].split(b"\n"):
                with contextlib.suppress(ValueError):  # empty, or cut off when a life before this one was killed
                    self._events.append(json.loads(line))
        return self._events
