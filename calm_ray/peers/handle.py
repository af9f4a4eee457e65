"""Start one peer process and hold its lease. Used by the Ray actor and by tests; knows neither Ray nor torch."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from calm_ray.errors import CalmRayError
from calm_ray.peers.control import ControlClient
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus

START_SECONDS = 30.0


class PeerHandle:
    """One watchdog process that this process started. Lose the handle, lose the peer: its lease ends."""

    def __init__(self, spec: PeerSpec, *, environment: dict[str, str] | None = None) -> None:
        self.spec = spec.model_copy(update={"has_lease": True})
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._control: ControlClient | None = None
        self._last = PeerStatus(role=spec.role)

    def start(self) -> None:
        """Start the process and take the lease; CalmRayError with the end of its output if it does not come up."""
        self.spec.folder.mkdir(parents=True, exist_ok=True)
        output = self.spec.folder / "watchdog.log"
        with output.open("wb") as file:  # a file, not a pipe: an orphan that holds a pipe would hang its reader
            self._process = subprocess.Popen(
                [sys.executable, "-m", "calm_ray", "peer", "--spec", self.spec.model_dump_json()],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment},
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                control = ControlClient(self.spec.folder)
                try:
                    control.call("hold")
                except OSError:
                    control.close()
                    raise
                self._control = control
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise CalmRayError(f"peer in {self.spec.folder} did not start: {_tail(output)}")
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        assert self._process is not None, "start() first"
        return self._process.pid

    def status(self) -> PeerStatus:
        """The peer's last word; after it has left, what it said then."""
        assert self._control is not None and self._process is not None, "start() first"
        with contextlib.suppress(OSError):
            self._last = self._control.call("status")
            return self._last
        code = self._process.wait(timeout=5)
        error = self._last.error or (_tail(self.spec.folder / "watchdog.log") if code else "")
        return self._last.model_copy(update={"state": "left", "exit_code": code, "error": error})

    def abandon(self) -> None:
        """Let go of the lease without a word, as if this process had died. The peer leaves by itself."""
        if self._control is not None:
            self._control.close()
            self._control = None

    def request_stop(self) -> None:
        """Ask the peer to leave, without waiting."""
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.call("stop")

    def stop(self, *, timeout_seconds: float = 12.0) -> int:
        """Leave and wait; the exit code, -9 if the watchdog itself had to be killed."""
        self.request_stop()
        self.abandon()
        if self._process is None:
            return 0
        try:
            return self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _tail(path: Path, *, num_bytes: int = 2000) -> str:
    data = path.read_bytes()[-num_bytes:] if path.exists() else b""
    return data.decode(errors="replace").strip() or "it printed nothing"
