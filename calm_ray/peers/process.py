"""The child process that does a peer's work, as its watchdog handles it: start, listen, dump, end, reap."""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import IO

from calm_ray.parent import death_signal
from calm_ray.peers.control import LineBuffer
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.vitals import marked

DUMP_SIGNAL = signal.SIGUSR1
"""The child writes the stacks of all its threads to its log: `faulthandler`, which needs no working interpreter."""
READ_BYTES = 65536


class ChildProcess:
    """One child, the leader of a session of its own; it dies with us (PDEATHSIG), and its session with it."""

    def __init__(
        self, spec: PeerSpec, selector: selectors.BaseSelector, *, on_output: Callable[[bytes], None],
        on_line: Callable[[bytes], None],
    ) -> None:  # fmt: skip
        """`on_output` gets what it prints, `on_line` each line of its status pipe."""
        self._selector = selector
        read_end, write_end = os.pipe()
        argv = [sys.executable, "-m", "calm_ray.peers.child", str(write_end), spec.model_dump_json()]
        try:
            self._popen = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                pass_fds=(write_end,), start_new_session=True, preexec_fn=death_signal(), env=marked(spec.folder),
            )  # fmt: skip
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        assert self._popen.stdout is not None
        self._files: tuple[IO[bytes], IO[bytes]] = (self._popen.stdout, os.fdopen(read_end, "rb"))
        lines = LineBuffer()
        self._register(self._files[0], on_output)

        def read_lines(data: bytes) -> None:
            for line in lines.feed(data):
                on_line(line)

        self._register(self._files[1], read_lines)

    @property
    def pid(self) -> int:
        """Also the id of its session."""
        return self._popen.pid

    @property
    def has_ended(self) -> bool:
        return self._popen.poll() is not None

    def ask_to_leave(self) -> None:
        self._popen.send_signal(signal.SIGTERM)

    def dump_stacks(self) -> None:
        self._popen.send_signal(DUMP_SIGNAL)

    def kill(self) -> None:
        """The whole group: hivemind's helpers outlive a parent that was killed."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)

    def reap(self) -> int:
        """Kill what is left, read what it has still said, and return its exit code."""
        self.kill()
        code = self._popen.wait()
        for file in self._files:
            key = self._selector.get_map().get(file.fileno())
            if key is not None:
                while key.data():
                    pass
                if file.fileno() in self._selector.get_map():
                    self._selector.unregister(file)
            file.close()
        return code

    def _register(self, file: IO[bytes], on_data: Callable[[bytes], object]) -> None:
        os.set_blocking(file.fileno(), False)

        def read() -> bool:
            try:
                data = os.read(file.fileno(), READ_BYTES)
            except BlockingIOError:
                return False
            if data:
                on_data(data)
            else:
                self._selector.unregister(file)
            return bool(data)

        self._selector.register(file, selectors.EVENT_READ, read)
