"""Start one peer process, or adopt the one that runs, and hold its lease. Knows neither Ray nor torch."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from calm_ray.code import code_hash
from calm_ray.errors import CalmRayError
from calm_ray.peers.control import ControlClient, ask
from calm_ray.peers.endings import disk_error, last_status, process_words
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus

START_SECONDS = 30.0
STOP_SECONDS = 12.0
POLL_SECONDS = 0.05
KILLED_CODE = -9
"""The exit code of a watchdog that left no word: it was killed, or its machine was."""


class PeerHandle:
    """One watchdog. It is not our child, so it outlives us: what becomes of it then is said by its spec."""

    def __init__(self, spec: PeerSpec, *, environment: dict[str, str] | None = None) -> None:
        self.spec = spec.model_copy(update={"has_lease": True})
        self._environment = environment or {}
        self._control: ControlClient | None = None
        self._process: psutil.Process | None = None
        self._last = PeerStatus(role=spec.role)
        self.is_adopted = False

    def start(self, *, config_hash: str = "") -> None:
        """Take the lease of the peer that runs in this folder, or start one. `config_hash`: of the run, if known.

        CalmRayError with the end of its output if it does not come up, and with its exit code; or with the difference
        if what runs there is another role, code or run. DiskTrouble or ConfigError if its folder cannot be written.
        """
        self.is_adopted = False
        if (there := ask(self.spec.folder)) is not None:
            self._require_ours(there, config_hash)  # before we hold it: an orphan of others keeps its hour
            if self._hold():
                self.is_adopted = True
                return
        self._try_folder()
        pid = self._launch()
        deadline = time.monotonic() + START_SECONDS
        while not self._hold():
            if not _is_there(pid) or time.monotonic() > deadline:
                raise self._did_not_start(pid)
            time.sleep(POLL_SECONDS)

    def _require_ours(self, there: PeerStatus, config_hash: str) -> None:
        spec = self.spec
        differences = [
            f"{name}: {runs}, wanted {wanted}"
            for name, runs, wanted in (
                ("role", there.role, spec.role), ("code", there.code_hash, code_hash()),
                ("config", there.config_hash or config_hash, config_hash or there.config_hash),
            ) if runs != wanted
        ]  # fmt: skip
        if differences:
            raise CalmRayError(f"{spec.folder}: another peer runs there (pid {there.pid}): {', '.join(differences)}")

    def _try_folder(self) -> None:
        """Say here what a watchdog could only say into this folder."""
        try:
            self.spec.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.spec.folder, buffering=0) as file:
                file.write(b"x")
        except OSError as exc:
            raise disk_error(exc, where=self.spec.folder) from exc

    def _did_not_start(self, pid: int) -> CalmRayError:
        last = last_status(self.spec.folder)
        if last is None or last.pid != pid:  # of an earlier one
            return CalmRayError(f"peer in {self.spec.folder} did not start: {_tail(self._output)}")
        error = CalmRayError(f"peer in {self.spec.folder} did not start: {last.error or _tail(self._output)}")
        error.exit_code = last.exit_code or error.exit_code
        return error

    @property
    def _output(self) -> Path:
        return self.spec.folder / "watchdog.log"

    def _launch(self) -> int:
        argv = [
            sys.executable, "-m", "calm_ray.peers.launch", str(self._output), "peer",
            "--spec", self.spec.model_dump_json(),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
                env={**os.environ, **self._environment},
            )  # fmt: skip
        except OSError as exc:  # no memory, or no process left
            raise CalmRayError(f"peer in {self.spec.folder} did not start: {process_words(exc)}") from exc
        if done.returncode:
            raise CalmRayError(f"peer in {self.spec.folder} did not start: {done.stderr.strip()[-500:]}")
        return int(done.stdout)

    def _hold(self) -> bool:
        """Connect and take the lease; False if nobody answers there."""
        try:
            control = ControlClient(self.spec.folder)
        except OSError:
            return False
        try:
            self._last = control.call("hold")
            self._process = psutil.Process(self._last.pid)
        except (OSError, psutil.Error):
            control.close()
            return False
        self._control = control
        return True

    @property
    def pid(self) -> int:
        assert self._process is not None, "start() first"
        return self._process.pid

    @property
    def is_held(self) -> bool:
        """Whether we have the lease, as far as we know."""
        return self._control is not None

    def status(self) -> PeerStatus:
        """The peer's last word; after it has left, what it said then."""
        assert self._process is not None, "start() first"
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._last = self._control.call("status")
                return self._last
            self.abandon()
        if is_running(self._process):  # on its way out, or too busy to answer
            return self._last
        return self._what_was_left()

    def _what_was_left(self) -> PeerStatus:
        assert self._process is not None
        last = last_status(self.spec.folder)
        if last is not None and last.pid == self._process.pid and last.exit_code is not None:
            return last
        error = _tail(self._output, default="")
        return self._last.model_copy(
            update={"state": "left", "exit_code": KILLED_CODE, "error": error or "its watchdog was killed"}
        )

    def abandon(self) -> None:
        """Let go of the lease without a word, as if this process had died."""
        if self._control is not None:
            self._control.close()
            self._control = None

    def request_stop(self) -> None:
        """Ask the peer to leave, without waiting."""
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.call("stop")

    def stop(self, *, timeout_seconds: float = STOP_SECONDS) -> int:
        """Leave and wait; the exit code, -9 if the watchdog itself had to be killed."""
        self.request_stop()
        self.abandon()
        if self._process is None:
            return 0
        deadline = time.monotonic() + timeout_seconds
        while is_running(self._process):
            if time.monotonic() > deadline:
                with contextlib.suppress(psutil.Error):
                    self._process.send_signal(signal.SIGKILL)
                return KILLED_CODE
            time.sleep(POLL_SECONDS)
        return self._what_was_left().exit_code or 0


def is_running(process: psutil.Process) -> bool:
    """Not ended, nor a zombie that nobody has asked for yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _is_there(pid: int) -> bool:
    try:
        return is_running(psutil.Process(pid))
    except psutil.Error:
        return False


def _tail(path: Path, *, num_bytes: int = 2000, default: str = "it printed nothing") -> str:
    data = b""
    with contextlib.suppress(OSError):
        data = path.read_bytes()[-num_bytes:]
    return data.decode(errors="replace").strip() or default
