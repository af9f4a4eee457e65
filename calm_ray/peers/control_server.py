"""The watchdog's side of the control socket: answers requests, and knows who holds the lease."""

import contextlib
import json
import selectors
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from calm_ray.peers.control import LineBuffer, socket_path, temporary_folder
from calm_ray.peers.endings import disk_error

MAX_CONNECTIONS = 64
SEND_SECONDS = 1.0
"""Our owner's own tools: a reader that hangs loses its answer, we lose a second."""


class ControlServer:
    """Serve one folder's socket from the watchdog's selector. `on_stop`: somebody asks the peer to leave."""

    def __init__(
        self, selector: selectors.BaseSelector, *, answer: Callable[[], bytes], on_stop: Callable[[], None]
    ) -> None:
        self._selector, self._answer_now, self._on_stop = selector, answer, on_stop
        self._connections: set[socket.socket] = set()
        self._holders: set[socket.socket] = set()

    @property
    def is_held(self) -> bool:
        return bool(self._holders)

    @contextlib.contextmanager
    def listening(self, folder: Path) -> Iterator[None]:
        """The caller holds the folder's lock, so whoever listened there is dead. DiskTrouble, ConfigError."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            path = _bind(listener, folder)
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # a disk that has become read-only keeps its name, and nobody there
                    path.unlink()
                self._selector.unregister(listener)
                for connection in list(self._connections):
                    self._hang_up(connection)

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        if len(self._connections) >= MAX_CONNECTIONS:
            connection.close()
            return
        connection.setblocking(False)
        self._connections.add(connection)
        lines = LineBuffer()

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
        elif op == "stop":
            self._on_stop()
        connection.setblocking(True)
        connection.settimeout(SEND_SECONDS)
        connection.sendall(self._answer_now() + b"\n")
        connection.setblocking(False)

    def _hang_up(self, connection: socket.socket) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection)
        connection.close()
        self._connections.discard(connection)
        self._holders.discard(connection)


def _bind(listener: socket.socket, folder: Path) -> Path:
    path: Path | None = None
    try:
        path = socket_path(folder)
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen(16)
    except OSError as exc:
        where = path.parent if path is not None else temporary_folder()
        raise disk_error(exc, where=where, elsewhere="set TMPDIR to another folder") from exc
    return path
