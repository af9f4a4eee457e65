"""Lines out of chunks of bytes."""

from calm_ray.peers.control import MAX_LINE_BYTES


class LineBuffer:
    """Complete lines out of chunks; drops a line that never ends."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            self._rest = b""
        return [line for line in lines if line]
