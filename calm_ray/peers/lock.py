"""One peer to a folder: two processes with one identity are undefined behaviour in libp2p."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from calm_ray.errors import ConfigError

FILE_NAME = "lock"
UNKNOWN = "unknown"
"""Stands for the process id of a holder that has not written it."""


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder; the kernel lets go of it when we die. ConfigError if another peer has it, or OSError."""
    with (folder / FILE_NAME).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"{folder}: another peer runs here (process {file.read().strip() or UNKNOWN}); stop it, or choose "
                "another --folder"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def holder(folder: Path) -> str:
    """Who holds the folder: a process id, or UNKNOWN, or empty for nobody. Takes nothing, and needs no answer.

    Empty as well if it cannot be told, as in a folder that we may not read: who then starts a peer there is told why.
    """
    try:
        with (folder / FILE_NAME).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look do not see each other
            except BlockingIOError:
                return file.read(20).strip() or UNKNOWN
    except OSError:
        pass
    return ""
