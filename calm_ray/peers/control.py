"""The watchdog's control socket: a Unix socket of the owner's, one JSON line per request and per answer.

    {"op": "status"}   answers the last PeerStatus
    {"op": "hold"}     the same, and this connection is now a lease: when it closes, a leased peer leaves
    {"op": "stop"}     the same, and the peer leaves

Sockets live in a private folder under the temporary directory: a Unix socket's path may have 107 bytes at most.
"""

import contextlib
import hashlib
import json
import os
import socket
import tempfile
from pathlib import Path

from calm_ray.errors import CalmRayError
from calm_ray.peers.status import PeerStatus

MAX_LINE_BYTES = 1 << 20
MAX_SOCKET_PATH_BYTES = 103
"""macOS's limit; Linux allows four more."""
CALL_TIMEOUT_SECONDS = 10.0


def socket_path(folder: Path) -> Path:
    """Where the peer in `folder` listens. Creates the private parent folder; refuses one that is somebody else's."""
    parent = Path(tempfile.gettempdir()) / f"calm-ray-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    info = parent.lstat()
    if info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise CalmRayError(f"{parent}: is not private to you; remove it or set TMPDIR to another folder")
    path = parent / (hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24] + ".sock")
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise CalmRayError(f"{parent}: too long a path for a socket; set TMPDIR to a shorter one, such as /tmp")
    return path


class ControlClient:
    """A connection to one watchdog. Keep it open to hold the lease."""

    def __init__(self, folder: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(CALL_TIMEOUT_SECONDS)
        try:
            self._socket.connect(str(socket_path(folder)))
        except OSError:
            self._socket.close()
            raise
        self._file = self._socket.makefile("rwb")

    def call(self, op: str) -> PeerStatus:
        """Send one request and return the peer's status. OSError if the watchdog is gone."""
        self._file.write(json.dumps({"op": op}).encode() + b"\n")
        self._file.flush()
        line = self._file.readline(MAX_LINE_BYTES)
        if not line:
            raise ConnectionResetError("the peer's watchdog is gone")
        return PeerStatus.model_validate_json(line)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._socket.close()
