"""The run's output folder: what is where, one job at a time, and no job throws away what another has reached."""

import contextlib
import fcntl
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from calm_ray.checkpoint.manifest import folders
from calm_ray.errors import ConfigError

KEY, BUNDLE, CHECKPOINTS, PEERS = "organiser.key", "bundle", "checkpoints", "peers"
LEAVE_SECONDS = 20.0
"""Peers leave within ten seconds after whoever holds them has died; a busy machine needs a little longer."""

Start = Literal["new", "fresh", "resume"]


@contextlib.contextmanager
def claim_output(out: Path, *, start: Start) -> Iterator[Path | None]:
    """Lock `out` for one job; yield where its former content went, if it had any.

    `resume` leaves it as it is, once the peers of a job that was killed have left. `new` and `fresh` give an empty
    one: what was there becomes `out.previous`, and what was *that* is deleted. `new` refuses to if it holds progress.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = out.with_name(out.name + ".lock").open("a+")
    except OSError as exc:
        raise ConfigError(f"{out}: {exc.strerror or exc} ({exc.filename}); choose another --out") from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{out}: another job is writing there; wait for it, or choose another --out") from None
        previous = out.with_name(out.name + ".previous")
        epoch = newest_epoch(out)
        if start == "new" and epoch:
            raise ConfigError(
                f"{out}: holds a checkpoint of epoch {epoch}: go on from there with --resume, or begin anew with "
                f"--fresh, which moves it to {previous.name}"
            )
        moved_to: Path | None = None
        if start == "resume":
            _wait_until_left(out / PEERS)
        elif out.exists():
            shutil.rmtree(previous, ignore_errors=True)
            moved_to = out.rename(previous)
        out.mkdir(exist_ok=True)
        yield moved_to


def newest_epoch(out: Path) -> int:
    """Of the checkpoints in `out`, whole or not; 0 if there is none, or only the initial one."""
    return max((epoch for epoch, _ in folders(out / CHECKPOINTS)), default=0)


def _wait_until_left(peers: Path) -> None:
    deadline = time.monotonic() + LEAVE_SECONDS
    for path in sorted(peers.glob("*/lock")):
        with path.open("a+") as file:
            while not _is_free(file.fileno()):
                if time.monotonic() > deadline:
                    raise ConfigError(f"{path.parent}: a peer of an earlier job still runs there; stop it first")
                time.sleep(0.2)


def _is_free(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
