"""`calm-ray peer`: start one child that does the work, watch it, restart it, and leave nothing behind.

This process imports neither torch nor hivemind and runs one thread: it must survive whatever happens to its child. The
child leads a process group of its own and dies with us (PDEATHSIG); after it ends, the whole group is killed, because
hivemind's helpers outlive a parent that was killed.

Judging progress rather than life, and budgets kept on disk, come with the issue on robustness.
"""

import contextlib
import ctypes
import fcntl
import json
import logging
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from calm_ray.errors import ConfigError
from calm_ray.peers.control import MAX_LINE_BYTES, socket_path
from calm_ray.peers.log import RotatingLog
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus

logger = logging.getLogger(__name__)

LEAVE_SECONDS = 9.0
"""From the request to leave until the child's group is killed; users are promised ten."""
FIRST_LEASE_SECONDS = 30.0
MAX_RESTARTS = 10
BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 2.0, 60.0
MAX_EQUAL_FAILURES = 3
"""The same unexpected error so often in a row will not get better by waiting: say it and stop."""
FINAL_EXIT_CODES = frozenset({0, 2, 5, 6})
"""Not restarted: finished, a mistake that only the user can mend (ConfigError), a version that does not fit, a damaged
checkpoint."""


class Watchdog:
    """One peer. `run()` blocks until it has left for good and returns an exit code."""

    def __init__(
        self, spec: PeerSpec, *, on_status: Callable[[PeerStatus], None] = lambda status: None,
        preflight: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`preflight` is called once, when the folder is ours; it may raise CalmRayError to call the start off."""
        self._spec = spec
        self._on_status, self._preflight = on_status, preflight
        self.status = PeerStatus(role=spec.role)
        self._selector = selectors.DefaultSelector()
        self._child: subprocess.Popen[bytes] | None = None
        self._leave_at: float | None = None
        self._holders: set[socket.socket] = set()
        self._num_restarts = 0

    def run(self) -> int:
        with contextlib.ExitStack() as stack:
            try:
                self._spec.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_exclusive(self._spec.folder))
                self._log = stack.enter_context(RotatingLog(self._spec.log_path))
            except OSError as exc:
                problem = f"{exc.strerror or exc} ({exc.filename})"
                raise ConfigError(f"{self._spec.folder}: {problem}; choose another --folder, which you own") from exc
            self._preflight()
            stack.enter_context(self._listening())
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, lambda *_: self.leave())
            self._lease_deadline = time.monotonic() + FIRST_LEASE_SECONDS if self._spec.has_lease else None
            return self._run_until_left()

    def leave(self) -> None:
        """Ask the child to go; it is killed if it has not gone in LEAVE_SECONDS."""
        if self._leave_at is None:
            self._leave_at = time.monotonic()
            if self._child is not None and self._child.poll() is None:
                self._child.send_signal(signal.SIGTERM)

    def _run_until_left(self) -> int:
        errors: list[str] = []
        while True:
            code = self._run_child()
            errors.append(self.status.error)
            is_hopeless = (
                code in FINAL_EXIT_CODES
                or self._num_restarts >= MAX_RESTARTS
                or (code == 1 and errors[-MAX_EQUAL_FAILURES:] == [errors[-1]] * MAX_EQUAL_FAILURES)
            )
            if self._leave_at is not None or is_hopeless:
                self._update(self.status.model_copy(update={"state": "left", "exit_code": code}))
                return 0 if self._leave_at is not None else code
            self._num_restarts += 1
            pause = min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2 ** (self._num_restarts - 1)) * random.uniform(0.5, 1.0)
            reason = self.status.error or f"the process ended with code {code}"
            detail = f"{reason}; trying again in {pause:.0f} s, log: {self._spec.log_path}"
            self._update(
                PeerStatus(role=self._spec.role, state="restarting", detail=detail, num_restarts=self._num_restarts)
            )
            self._pause(pause)
            if self._leave_at is not None:
                return 0

    def _run_child(self) -> int:
        read_end, write_end = os.pipe()
        argv = [sys.executable, "-m", "calm_ray.peers.child", str(write_end), self._spec.model_dump_json()]
        child = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=(write_end,),
            start_new_session=True, preexec_fn=_die_with_parent(),
        )  # fmt: skip
        os.close(write_end)
        self._child = child
        assert child.stdout is not None
        status_file = os.fdopen(read_end, "rb")
        lines = _LineBuffer()
        self._register(child.stdout, lambda data: self._log.write(data))
        self._register(status_file, lambda data: self._on_lines(lines.feed(data)))
        try:
            self._serve(until=lambda: child.poll() is not None)
        finally:
            _kill_group(child.pid)
            child.wait()
            for file in (child.stdout, status_file):
                self._drain(file)
                file.close()
        return child.returncode

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._serve(until=lambda: time.monotonic() >= deadline or self._leave_at)

    def _serve(self, *, until: Callable[[], object]) -> None:
        """Handle output, status, control requests and deadlines until `until()`."""
        while not until():
            for key, _ in self._selector.select(timeout=0.2):
                key.data()
            now = time.monotonic()
            if self._lease_deadline is not None and not self._holders and now > self._lease_deadline:
                self.leave()
            if self._leave_at is not None and now > self._leave_at + LEAVE_SECONDS and self._child is not None:
                _kill_group(self._child.pid)

    def _register(self, file: IO[bytes], on_data: Callable[[bytes], object]) -> None:
        os.set_blocking(file.fileno(), False)

        def read() -> bool:
            try:
                data = os.read(file.fileno(), 65536)
            except BlockingIOError:
                return False
            if data:
                on_data(data)
            else:
                self._selector.unregister(file)
            return bool(data)

        self._selector.register(file, selectors.EVENT_READ, read)

    def _drain(self, file: IO[bytes]) -> None:
        key = self._selector.get_map().get(file.fileno())
        if key is not None:
            while key.data():
                pass
            if file.fileno() in self._selector.get_map():
                self._selector.unregister(file)

    def _on_lines(self, lines: Sequence[bytes]) -> None:
        for line in lines:
            try:
                status = PeerStatus.model_validate_json(line)
            except ValidationError:
                logger.exception("status line of the child is not one of ours")
            else:
                self._update(status.model_copy(update={"num_restarts": self._num_restarts}))

    def _update(self, status: PeerStatus) -> None:
        self.status = status
        self._on_status(status)

    # --- control socket ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        path = socket_path(self._spec.folder)
        path.unlink(missing_ok=True)  # we hold the folder's lock: whoever listened there is dead
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen(16)
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                for key in list(self._selector.get_map().values()):
                    if isinstance(key.fileobj, socket.socket) and key.fileobj is not listener:
                        key.fileobj.close()

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.setblocking(False)
        lines = _LineBuffer()

        def read() -> None:
            try:
                data = connection.recv(4096)
                for line in lines.feed(data):
                    self._answer(connection, line)
            except (BlockingIOError, InterruptedError):
                return
            except (OSError, ValueError, AttributeError):  # it is gone, or what it says is no request
                data = b""
            if not data:
                self._hang_up(connection)

        self._selector.register(connection, selectors.EVENT_READ, read)

    def _answer(self, connection: socket.socket, line: bytes) -> None:
        op = json.loads(line).get("op")
        if op == "hold":
            self._holders.add(connection)
            self._lease_deadline = None
        elif op == "stop":
            self.leave()
        connection.setblocking(True)
        connection.settimeout(1.0)  # our owner's own tools: a reader that hangs loses its answer, we lose a second
        connection.sendall(self.status.model_dump_json().encode() + b"\n")
        connection.setblocking(False)

    def _hang_up(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()
        if connection in self._holders:
            self._holders.discard(connection)
            if self._spec.has_lease and not self._holders:
                self.leave()


class _LineBuffer:
    """Complete lines out of chunks; drops a line that never ends."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            self._rest = b""
        return [line for line in lines if line]


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: two processes with one identity are undefined behaviour in libp2p."""
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip()
            raise ConfigError(
                f"{folder}: another peer runs here (process {owner or 'unknown'}); stop it, or choose another --folder"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _die_with_parent() -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
