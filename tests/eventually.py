"""Wait for something to become true, and start processes that cannot outlive their test.

The only place in the tests that sleeps. A test that sleeps a fixed time is slow on a fast machine and fails on a slow
one; `eventually` is neither. `Children` ends what a test started, by process id: a name would hit a stranger's process.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")


def eventually(
    predicate: Callable[[], T], timeout: float = 10.0, message: str | Callable[[], str] = "", *, interval: float = 0.05
) -> T:
    """Call `predicate` until it returns something true, and return that.

    An AssertionError in it counts as "not yet", so it may hold several asserts and should then return True. Any other
    exception ends the wait at once: it will not get better. After `timeout` seconds it raises AssertionError with
    `message` (text, or a callable asked only then, such as the tail of a log) and what was seen last.
    """
    deadline = time.monotonic() + timeout
    while True:
        is_last = time.monotonic() >= deadline
        reason: AssertionError | None = None
        value: T | None = None
        try:
            value = predicate()
            if value:
                return value
        except AssertionError as exc:
            reason = exc
        if is_last:
            said = message() if callable(message) else message
            seen = str(reason) if reason is not None else repr(value)
            raise AssertionError(f"not within {timeout:g} s: {said or predicate}; last seen: {seen}") from reason
        time.sleep(min(interval, max(0.0, deadline - time.monotonic())))


@dataclass
class Child:
    """A process that a test started, and the file that holds all it printed."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def is_running(self) -> bool:
        return self.process.poll() is None

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def tail(self, num_lines: int = 30) -> str:
        return "\n".join(self.output().splitlines()[-num_lines:])

    def wait(self, timeout: float = 30.0) -> int:
        """Its exit code, negative if a signal ended it; raise AssertionError with its output if it stays."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"pid {self.pid} still runs after {timeout:g} s; it printed:\n{self.tail()}") from None

    def says(self, text: str, timeout: float = 30.0) -> None:
        """Wait until `text` is in its output; raise AssertionError at once if it ends without having said it."""

        def said() -> bool:
            has_ended = not self.is_running()
            if text in self.output():
                return True
            if has_ended:
                raise RuntimeError(f"exit code {self.process.returncode} without {text!r}; it printed:\n{self.tail()}")
            return False

        eventually(said, timeout, lambda: f"{text!r} in the output of pid {self.pid}, which is:\n{self.tail()}")

    def signal_group(self, number: int) -> None:
        """Send a signal to it and its descendants in its process group (it leads one of its own)."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return


@dataclass
class Children:
    """The processes of one test. Use the fixture `children`, which ends them all after the test."""

    folder: Path
    started: list[Child] = field(default_factory=list)

    def start(
        self, argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> Child:
        """Start `argv` in a process group of its own; `env` is added to ours. What it prints goes to a file."""
        log = self.folder / f"child-{len(self.started)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [str(part) for part in argv],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                start_new_session=True,
            )
        child = Child(process, log)
        self.started.append(child)
        return child

    def stop(self, child: Child, *, grace_seconds: float = 10.0) -> int:
        """SIGTERM, then SIGKILL to its whole group; return the exit code. Harmless if it has ended."""
        if child.is_running():
            child.signal_group(signal.SIGTERM)
            try:
                child.process.wait(grace_seconds)
            except subprocess.TimeoutExpired:
                pass
        # Also when the child itself left politely: it may have left descendants behind.
        child.signal_group(signal.SIGKILL)
        return child.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in reversed(self.started):
            self.stop(child)
