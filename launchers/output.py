"""The run's output folder: what is where, one job at a time, and no job throws away what another has reached."""

import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from calm_ray.bundle import RUN
from calm_ray.checkpoint.manifest import folders
from calm_ray.config import RunTable, parse_table
from calm_ray.errors import CalmRayError, ConfigError
from calm_ray.peers.control import ask
from calm_ray.peers.endings import disk_error, is_disk_trouble
from calm_ray.peers.lock import FILE_NAME, holder
from calm_ray.peers.status import PeerStatus
from launchers.begin import Found

KEY, BUNDLE, CHECKPOINTS, PEERS = "organiser.key", "bundle", "checkpoints", "peers"
ELSEWHERE = "choose another --out"
LEAVE_SECONDS = 20.0
"""Peers leave within ten seconds after they were told to, or lost their lease; a busy machine needs a little longer."""


@contextlib.contextmanager
def lock_output(out: Path) -> Iterator[None]:
    """One job at a time. The lock is beside the folder, which may be moved."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = out.with_name(out.name + ".lock").open("a+")
    except OSError as exc:
        raise disk_error(exc, where=out, elsewhere=ELSEWHERE) from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{out}: another job is writing there; wait for it, end it, or {ELSEWHERE}") from None
        except OSError as exc:  # a file system without locks
            raise disk_error(exc, where=out, elsewhere=ELSEWHERE) from exc
        yield


def disk_trouble(exc: OSError) -> CalmRayError:
    """What a disk did, as one of ours. Raises what is anything else: it is a bug."""
    if not (is_disk_trouble(exc) or isinstance(exc, PermissionError)):
        raise exc
    return disk_error(exc, where=Path(exc.filename or "output folder"), elsewhere=ELSEWHERE)


def survey(out: Path) -> Found:
    """What is there. Waits for trainers whose job has died: they leave by themselves."""
    _wait_until(lambda: not _of_role(live_peers(out), "trainer"))
    live = live_peers(out)
    if name := next(iter(_of_role(live, "trainer")), ""):
        raise ConfigError(
            f"{out / PEERS / name}: a trainer of another job still runs there (process {live[name].pid}); if that job "
            "is on a Ray cluster, set RAY_ADDRESS"
        )
    return Found(live=live, newest_epoch=newest_epoch(out), run=run_of(out))


def set_aside(out: Path) -> Path | None:
    """Make `out` an empty folder. What was there becomes `out.previous`, in the place of what was *that*; or it is
    deleted, if it holds no progress and `out.previous` does. Returns where it went."""
    previous = out.with_name(out.name + ".previous")
    moved_to: Path | None = None
    if out.exists():
        _wait_until_left(out / PEERS)
        if newest_epoch(previous) and not newest_epoch(out):
            shutil.rmtree(out)
        else:
            shutil.rmtree(previous, ignore_errors=True)
            moved_to = out.rename(previous)
    out.mkdir(exist_ok=True)
    return moved_to


def newest_epoch(out: Path) -> int:
    """Of the checkpoints in `out`, whole or not; 0 if there is none, or only the initial one."""
    return max((epoch for epoch, _ in folders(out / CHECKPOINTS)), default=0)


def live_peers(out: Path) -> dict[str, PeerStatus]:
    """Name -> what it says, of the peers on this machine that answer in their folders."""
    asked = {folder.name: ask(folder) for folder in _folders(out / PEERS)}
    return {name: status for name, status in asked.items() if status is not None}


def end_peers(out: Path) -> list[str]:
    """Tell every peer that answers in `out` to leave, trainers first, and wait; a line for each that is still there."""
    for roles in (("trainer",), ("monitor",), ("auxiliary",)):
        for name, status in live_peers(out).items():
            if status.role in roles:
                ask(out / PEERS / name, "stop")
        _wait_until(lambda roles=roles: not any(_of_role(live_peers(out), role) for role in roles))  # type: ignore[misc]
    _wait_until(lambda: not _taken(out / PEERS))
    return [f"{folder} (process {holder(folder)})" for folder in _taken(out / PEERS)]


def run_of(out: Path) -> RunTable | None:
    """`[run]` of the bundle in `out`, if it can be read."""
    path = out / BUNDLE / RUN
    try:
        return parse_table(RunTable, json.loads(path.read_bytes()), where=str(path))
    except (OSError, ValueError, ConfigError):
        return None


def _of_role(live: Mapping[str, PeerStatus], role: str) -> list[str]:
    return [name for name, status in live.items() if status.role == role]


def _wait_until_left(peers: Path) -> None:
    if not _wait_until(lambda: not _taken(peers)):
        raise ConfigError(f"{_taken(peers)[0]}: a peer of an earlier job still runs there; stop it first")


def _wait_until(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + LEAVE_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _taken(peers: Path) -> list[Path]:
    """Folders that a watchdog holds."""
    return [folder for folder in _folders(peers) if holder(folder)]


def _folders(peers: Path) -> list[Path]:
    """Where a peer has been."""
    return [path.parent for path in sorted(peers.glob(f"*/{FILE_NAME}"))]
