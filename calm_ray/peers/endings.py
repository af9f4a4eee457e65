"""How a peer's process ended, in words; and what its folder remembers of it when nobody answers there any more."""

import contextlib
import errno
import signal
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from calm_ray.errors import (
    CalmRayError,
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
from calm_ray.peers.status import PeerStatus, read_status

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


def cause_of(exit_code: int) -> Cause:
    """Of a peer that ended by itself with an error, or of a CalmRayError by its `exit_code`."""
    return _CAUSES.get(exit_code, "crashed")


def ending_of(code: int, *, error: str, verdict: tuple[Cause, str] | None, num_oom_kills: int) -> Ending:
    """`code`: as `Popen.returncode`; `error`: the child's last word; `verdict`: why the watchdog ended it, if it did;
    `num_oom_kills`: on this machine while it ran."""
    if verdict is not None:
        return Ending(exit_code=1, cause=verdict[0], why=verdict[1])
    if code == 0:
        return Ending(exit_code=0, cause=None)
    if code > 0:
        return Ending(exit_code=code, cause=cause_of(code), why=error or f"ended with code {code}")
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    why = f"killed by {name}"
    if code == -signal.SIGKILL and num_oom_kills:
        why = (
            "killed by the kernel: the machine ran out of memory (close other programs, or lower [peer] "
            "micro_batch_size)"
        )
    return Ending(exit_code=128 - code, cause="killed", why=why)


DISK_TROUBLE: Mapping[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", "delete what you no longer need"),
    errno.EDQUOT: ("your quota is used up", "delete what you no longer need"),
    errno.EROFS: ("the disk is read-only", "mount it writable"),
}
"""What happened, and what to do: the same will work once that is done."""


def is_disk_trouble(exc: OSError) -> bool:
    """Whether the same will work once somebody has made room."""
    return exc.errno in DISK_TROUBLE


def disk_words(exc: OSError, *, elsewhere: str = "choose another --folder") -> str:
    """What happened on a disk, and what to do about it."""
    what, cure = DISK_TROUBLE.get(exc.errno or 0, ("", ""))
    if what:
        return f"{what}; {cure}, or {elsewhere}"
    where = f" ({exc.filename})" if exc.filename else ""
    return f"{exc.strerror or exc}{where}; {elsewhere}, which you own"


def disk_error(exc: OSError, *, where: Path, elsewhere: str = "choose another --folder") -> CalmRayError:
    """One of ours for what a disk did: it is waited out, or a person has to choose another place."""
    kind = DiskTrouble if is_disk_trouble(exc) else ConfigError
    return kind(f"{where}: {disk_words(exc, elsewhere=elsewhere)}")


def process_words(exc: OSError) -> str:
    """Why the system gave us no new process, and what to do about it."""
    return f"this machine gives no new process: {exc.strerror or exc}; close other programs, or raise `ulimit -u`"


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
        return read_status((folder / STATUS_FILE).read_bytes())
    except (OSError, ValueError):
        return None


def keep_last_lines(spec: PeerSpec) -> None:
    """The log goes on rotating; the end that explains why a peer is parked stays."""
    lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
    for path in (spec.log_path.with_name(spec.log_path.name + ".1"), spec.log_path):
        with contextlib.suppress(OSError):
            lines.extend(path.read_bytes()[-READ_BYTES:].decode(errors="replace").splitlines())
    write_atomically(spec.folder / PARKED_LOG, "\n".join(lines) + "\n")
