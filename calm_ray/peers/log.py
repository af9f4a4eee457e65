"""A peer's log file, bounded: two files of MAX_BYTES each, whatever the child prints."""

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self

MAX_BYTES = 8 * 1024 * 1024


class RotatingLog:
    """Append bytes; when full, the file becomes `NAME.1` and a new one begins. A full disk never stops the peer."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self._path, self._max_bytes = path, max_bytes

    def __enter__(self) -> Self:
        self._file = self._path.open("ab", buffering=0)  # nothing is held back that a later close could fail on
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # lines are lost, the training is not
            if self._file.tell() + len(data) > self._max_bytes:
                self._rotate()
            self._file.write(data)

    def _rotate(self) -> None:
        """Raises OSError and goes on with the full file if the folder does not allow a new one."""
        self._path.replace(self._path.with_name(self._path.name + ".1"))
        fresh = self._path.open("ab", buffering=0)
        self._file.close()
        self._file = fresh
