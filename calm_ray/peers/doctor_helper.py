"""The doctor's helper process, which loads torch and hivemind, seen from the doctor: start, listen, end.

In a process of its own, because a wrong build of torch ends its process by a signal, a sick GPU driver hangs it, and
neither may keep the doctor from saying so. It tells line by line, so that what it found before a hang counts.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import ValidationError

from calm_ray.config import PeerTable
from calm_ray.peers.doctor_peer import DeviceFacts, ended_by
from calm_ray.swarm.clock_offset import ClockOffset
from calm_ray.swarm.probing import AddressFacts, ReachFacts
from calm_ray.tables import Table

END_SECONDS = 3.0
MAX_LINE_BYTES = 1 << 16


class Task(Table):
    """What the helper is asked to look at."""

    peer: PeerTable
    identity: Path | None = None
    """A file, if there is one already."""
    listen: str
    """Free, as far as one can tell."""
    invite: str | None = None
    addresses: tuple[AddressFacts, ...] = ()
    """Of the invite, those that TCP has reached."""
    should_dial_back: bool = True
    limit_seconds: float


class Networking(Table):
    """Whether libp2p's daemon starts here."""

    problem: str = ""
    start_seconds: float = 0.0


class Line(Table):
    """What the helper says at a time: one of these."""

    doing: str = ""
    device: DeviceFacts | None = None
    identity_problem: str | None = None
    networking: Networking | None = None
    address: AddressFacts | None = None
    clock: ClockOffset | None = None
    reach: ReachFacts | None = None


class Findings:
    """All that a helper has said. `ended` tells how it ended, if not well."""

    def __init__(self, *, ended: str = "") -> None:
        self.device: DeviceFacts | None = None
        self.identity_problem: str | None = None
        self.networking: Networking | None = None
        self.addresses: dict[str, AddressFacts] = {}
        self.clock: ClockOffset | None = None
        self.reach: ReachFacts | None = None
        self.ended = ended

    def add(self, line: Line) -> None:
        self.device = line.device or self.device
        self.networking = line.networking or self.networking
        self.clock = line.clock or self.clock
        self.reach = line.reach or self.reach
        if line.identity_problem is not None:
            self.identity_problem = line.identity_problem
        if line.address is not None:
            self.addresses[line.address.text] = line.address


def run_helper(task: Task, *, on_doing: Callable[[str], None]) -> Findings:
    """Start the helper, collect what it says for `task.limit_seconds` at most, and leave nothing of it behind."""
    findings, lines = Findings(), queue.SimpleQueue[bytes]()
    deadline = time.monotonic() + task.limit_seconds
    with _child(task) as (child, read_end):
        threading.Thread(target=_read, args=(read_end, lines), daemon=True).start()
        while True:
            try:
                data = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                findings.ended = f"it took over {task.limit_seconds:.0f} s"
                return findings
            if not data:
                break
            try:
                line = Line.model_validate_json(data)
            except ValidationError:
                continue  # a line cut short by its end
            findings.add(line)
            if line.doing:
                on_doing(line.doing)
        with contextlib.suppress(subprocess.TimeoutExpired):
            if code := child.wait(timeout=END_SECONDS):
                findings.ended = ended_by(code)
    return findings


@contextlib.contextmanager
def _child(task: Task) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    read_end, write_end = os.pipe()
    argv = [sys.executable, "-W", "ignore", "-m", "calm_ray.peers.doctor_child", str(write_end), task.model_dump_json()]
    child = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(write_end,),
        start_new_session=True,
    )  # fmt: skip
    os.close(write_end)
    try:
        yield child, read_end
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)  # and the libp2p daemons that it started
        child.wait()


def _read(read_end: int, lines: "queue.SimpleQueue[bytes]") -> None:
    """Put each line, and an empty one at the end. Ends when the helper's side of the pipe is closed."""
    with os.fdopen(read_end, "rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            lines.put(line)
    lines.put(b"")
