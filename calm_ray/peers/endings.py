"""How a peer's process ended, in words; and what its folder remembers of it when nobody answers there any more."""

import contextlib
import errno
import signal
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from calm_ray.errors import (
    CheckpointRejected,
    ConfigError,
    DiskTrouble,
    Moved,
    StateUnavailable,
    SwarmUnreachable,
    VersionMismatch,
)
from calm_ray.peers.budget import Cause, write_atomically
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus

STATUS_FILE, PARKED_LOG = "status.json", "parked.log"
NUM_LAST_LINES = 50
READ_BYTES = 64 << 10
_CAUSES: dict[int, Cause] = {
    ConfigError.exit_code: "mistake",
    VersionMismatch.exit_code: "mistake",
    CheckpointRejected.exit_code: "mistake",
    SwarmUnreachable.exit_code: "unreachable",
    StateUnavailable.exit_code: "no-state",
    DiskTrouble.exit_code: "disk",
    Moved.exit_code: "moved",
}


@dataclass(frozen=True, kw_only=True)
class Ending:
    """`cause` is None if the peer was done, or left because it was asked to."""

    exit_code: int
    cause: Cause | None
    why: str = ""


def ending_of(code: int, *, error: str, verdict: tuple[Cause, str] | None, num_oom_kills: int) -> Ending:
    """`code`: as `Popen.returncode`; `error`: the child's last word; `verdict`: why the watchdog ended it, if it did;
    `num_oom_kills`: on this machine while it ran."""
    if verdict is not None:
        return Ending(exit_code=1, cause=verdict[0], why=verdict[1])
    if code == 0:
        return Ending(exit_code=0, cause=None)
    if code > 0:
        return Ending(exit_code=code, cause=_CAUSES.get(code, "crashed"), why=error or f"ended with code {code}")
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    why = f"killed by {name}"
    if code == -signal.SIGKILL and num_oom_kills:
        why = (
            "killed by the kernel: the machine ran out of memory (close other programs, or lower [peer] "
            "micro_batch_size)"
        )
    return Ending(exit_code=128 - code, cause="killed", why=why)


_DISK_WORDS = {
    errno.ENOSPC: "the disk is full: free some space, or choose another --folder",
    errno.EDQUOT: "your quota on this disk is used up: free some space, or choose another --folder",
    errno.EROFS: "the disk is read-only: choose another --folder",
}


def disk_words(exc: OSError) -> str:
    """What happened on a disk, and what to do about it."""
    where = f" ({exc.filename})" if exc.filename else ""
    return _DISK_WORDS.get(exc.errno or 0, f"{exc.strerror or exc}{where}; choose another --folder, which you own")


def is_disk_trouble(exc: OSError) -> bool:
    """Whether the same will work once somebody has made room."""
    return exc.errno in _DISK_WORDS


def remember(folder: Path, status: PeerStatus) -> None:
    """Write a peer's last status, for those who ask when it has gone."""
    write_atomically(folder / STATUS_FILE, status.model_copy(update={"summary": None}).model_dump_json())


def forget(folder: Path) -> None:
    """A new peer begins here."""
    for name in (STATUS_FILE, PARKED_LOG):
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def last_status(folder: Path) -> PeerStatus | None:
    """What the peer in `folder` said last, if it has left."""
    try:
        return PeerStatus.model_validate_json((folder / STATUS_FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def keep_last_lines(spec: PeerSpec) -> None:
    """The log goes on rotating; the end that explains why a peer is parked stays."""
    lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
    for path in (spec.log_path.with_name(spec.log_path.name + ".1"), spec.log_path):
        with contextlib.suppress(OSError):
            lines.extend(path.read_bytes()[-READ_BYTES:].decode(errors="replace").splitlines())
    write_atomically(spec.folder / PARKED_LOG, "\n".join(lines) + "\n")
