"""The watchdog's control socket: a Unix socket of the owner's, one JSON line per request and per answer.

    {"op": "status"}   answers the last PeerStatus
    {"op": "hold"}     the same, and this connection is now a lease: when it closes, a leased peer leaves
    {"op": "stop"}     the same, and the peer leaves

Sockets live in a private folder under the temporary directory: a Unix socket's path may have 107 bytes at most. It is
not `tempfile.gettempdir()`, which tries each place by writing, and so would look elsewhere while a disk is full.
"""

import contextlib
import hashlib
import json
import os
import socket
from pathlib import Path

from calm_ray.errors import CalmRayError
from calm_ray.peers.status import PeerStatus, read_status

MAX_LINE_BYTES = 1 << 20
MAX_SOCKET_PATH_BYTES = 103
"""macOS's limit; Linux allows four more."""
CALL_TIMEOUT_SECONDS = 10.0


def socket_path(folder: Path) -> Path:
    """Where the peer in `folder` listens. Creates the private parent folder; refuses one that is somebody else's.

    OSError if it cannot be made.
    """
    parent = temporary_folder() / f"calm-ray-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    info = parent.lstat()
    if info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise CalmRayError(f"{parent}: is not private to you; remove it or set TMPDIR to another folder")
    path = parent / (hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24] + ".sock")
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise CalmRayError(f"{parent}: too long a path for a socket; set TMPDIR to a shorter one, such as /tmp")
    return path


def temporary_folder() -> Path:
    """$TMPDIR if it is a folder, else /tmp."""
    chosen = os.environ.get("TMPDIR", "")
    return Path(chosen) if os.path.isdir(chosen) else Path("/tmp")


def ask(folder: Path, op: str = "status") -> PeerStatus | None:
    """What the peer in `folder` answers; None if nobody does, or nobody in time.

    One of another version is understood as far as it goes, and can be told to stop: `PeerStatus.is_other_version`.
    CalmRayError if the folder of sockets is not ours alone.
    """
    with contextlib.suppress(OSError), contextlib.closing(ControlClient(folder)) as client:
        return client.call(op)
    return None


class ControlClient:
    """A connection to one watchdog. Keep it open to hold the lease."""

    def __init__(self, folder: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(CALL_TIMEOUT_SECONDS)
        try:
            self._socket.connect(str(socket_path(folder)))
        except BaseException:
            self._socket.close()
            raise
        self._file = self._socket.makefile("rwb")

    def call(self, op: str) -> PeerStatus:
        """Send one request and return the peer's status. OSError if the watchdog is gone, or is no watchdog."""
        self._file.write(json.dumps({"op": op}).encode() + b"\n")
        self._file.flush()
        line = self._file.readline(MAX_LINE_BYTES)
        if not line:
            raise ConnectionResetError("the peer's watchdog is gone")
        try:
            return read_status(line)
        except ValueError as exc:
            raise ConnectionError("whoever answers there is no peer of any version that we know") from exc

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._socket.close()


class LineBuffer:
    """Complete lines out of chunks; drops a line that never ends."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            self._rest = b""
        return [line for line in lines if line]
