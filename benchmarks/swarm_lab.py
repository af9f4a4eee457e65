"""Start, watch and end the processes of a measured or tested swarm.

A process is ended by its id, with its process group; the ids are those that were started here. Importing torch and
hivemind takes seconds, so peers that come and go by the dozen are forked from a nursery that has imported them.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.swarm_spec import JournalReader, ProcessSpec

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.05
POLITE_SECONDS = 15.0
DUMP_SECONDS = 0.5


@dataclass(kw_only=True)
class PeerProcess:
    """One started process. Its id stays ours until it has ended: `pidfd` names this process and no later one."""

    spec: ProcessSpec
    pid: int
    pidfd: int
    first_event: int
    """Number of events in the journal from before it was started: an earlier life of the same peer."""
    reader: JournalReader

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """What this life has written so far."""
        found = self.reader.read()[self.first_event :]
        return [event for event in found if kind in (None, event["event"])]

    def all_events(self) -> list[dict[str, Any]]:
        """What all lives of this peer have written."""
        return list(self.reader.read())

    def is_running(self) -> bool:
        return not select.select([self.pidfd], [], [], 0)[0]

    def wait_for(
        self, what: str, predicate: Callable[[dict[str, Any]], object] = lambda _: True, *, timeout_seconds: float
    ) -> dict[str, Any]:
        """Wait for the first event `what` that satisfies `predicate`; RuntimeError with the log if it never comes."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            was_running = self.is_running()
            for event in self.events(what):
                if predicate(event):
                    return event
            if not was_running or time.monotonic() > deadline:
                why = "timed out" if was_running else "it has ended"
                self.dump_stacks()
                raise RuntimeError(f"{self.spec.name}: no {what!r}, {why}\n{self.log()[-3000:]}")
            time.sleep(POLL_SECONDS)

    def dump_stacks(self) -> None:
        """Have every thread's stack written into the log."""
        self.signal(signal.SIGUSR1)
        self.wait_until_ended(timeout_seconds=DUMP_SECONDS)

    def log(self) -> str:
        path = self.spec.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def signal(self, number: signal.Signals) -> None:
        if self.is_running():
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        """SIGKILL to it alone, as when a machine loses power; what it forked ends by itself."""
        self.signal(signal.SIGKILL)
        self.wait_until_ended(timeout_seconds=POLITE_SECONDS)

    def wait_until_ended(self, *, timeout_seconds: float) -> bool:
        return bool(select.select([self.pidfd], [], [], timeout_seconds)[0])

    def end_group(self) -> None:
        """SIGKILL to whatever is left of its process group."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


@dataclass(kw_only=True)
class Lab:
    """All processes of one measurement or test; all end with the context."""

    started: list[PeerProcess] = field(default_factory=list)
    _children: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _nursery: subprocess.Popen[bytes] | None = None

    def start(self, spec: ProcessSpec, *, env: Mapping[str, str] | None = None) -> PeerProcess:
        """Start a fresh interpreter for `spec`; `env` is added to ours."""
        path, first_event = _write(spec)
        with (spec.folder / "log").open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.swarm_process", str(path)], cwd=ROOT, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **(env or {})},
            )  # fmt: skip
        self._children.append(child)
        return self._adopt(spec, child.pid, first_event)

    def fork(self, spec: ProcessSpec) -> PeerProcess:
        """Start `spec` from the nursery: some hundredths of a second instead of seconds."""
        path, first_event = _write(spec)
        if self._nursery is None:
            self._nursery = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.swarm_nursery"], cwd=ROOT, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        assert self._nursery.stdin is not None and self._nursery.stdout is not None
        self._nursery.stdin.write(f"{path}\n".encode())
        self._nursery.stdin.flush()
        answer = self._nursery.stdout.readline()
        if not answer:
            raise RuntimeError(f"the nursery has ended with {self._nursery.wait(5)}")
        return self._adopt(spec, int(answer), first_event)

    def _adopt(self, spec: ProcessSpec, pid: int, first_event: int) -> PeerProcess:
        process = PeerProcess(
            spec=spec, pid=pid, pidfd=os.pidfd_open(pid), first_event=first_event, reader=JournalReader(spec.journal)
        )
        self.started.append(process)
        return process

    def stop_all(self) -> None:
        """SIGTERM to all, latest first; SIGKILL to those that have not left in time."""
        running = [process for process in reversed(self.started) if process.is_running()]
        for process in running:
            process.signal(signal.SIGTERM)
        deadline = time.monotonic() + POLITE_SECONDS
        for process in running:
            process.wait_until_ended(timeout_seconds=max(0.0, deadline - time.monotonic()))
        for process in self.started:
            process.end_group()
            os.close(process.pidfd)
        self.started.clear()
        for child in self._children:
            child.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_all()
        if self._nursery is not None and self._nursery.stdin is not None:
            self._nursery.stdin.close()  # it ends with its input
            self._nursery.wait(POLITE_SECONDS)
            if self._nursery.stdout is not None:
                self._nursery.stdout.close()


def _write(spec: ProcessSpec) -> tuple[Path, int]:
    """Where the spec lies now, and how many events an earlier life of this peer has left."""
    spec.folder.mkdir(parents=True, exist_ok=True)
    path = spec.folder / "spec.json"
    path.write_text(spec.model_dump_json())
    return path, len(JournalReader(spec.journal).read())
