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
from calm_ray.errors import ConfigError
from calm_ray.peers.control import ControlClient
from calm_ray.peers.status import PeerStatus
from launchers.begin import Found

KEY, BUNDLE, CHECKPOINTS, PEERS = "organiser.key", "bundle", "checkpoints", "peers"
LEAVE_SECONDS = 20.0
"""Peers leave within ten seconds after they were told to, or lost their lease; a busy machine needs a little longer."""


@contextlib.contextmanager
def lock_output(out: Path) -> Iterator[None]:
    """One job at a time. The lock is beside the folder, which may be moved."""
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
        yield


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
    asked = {path.parent.name: _call(path.parent, "status") for path in sorted((out / PEERS).glob("*/lock"))}
    return {name: status for name, status in asked.items() if status is not None}


def end_peers(out: Path) -> list[str]:
    """Tell every peer that answers in `out` to leave, trainers first, and wait; a line for each that is still there."""
    for roles in (("trainer",), ("monitor",), ("auxiliary",)):
        for name, status in live_peers(out).items():
            if status.role in roles:
                _call(out / PEERS / name, "stop")
        _wait_until(lambda roles=roles: not any(_of_role(live_peers(out), role) for role in roles))  # type: ignore[misc]
    _wait_until(lambda: not _taken(out / PEERS))
    return [f"{path} (process {path.joinpath('lock').read_text().strip()})" for path in _taken(out / PEERS)]


def run_of(out: Path) -> RunTable | None:
    """`[run]` of the bundle in `out`, if it can be read."""
    path = out / BUNDLE / RUN
    try:
        return parse_table(RunTable, json.loads(path.read_bytes()), where=str(path))
    except (OSError, ValueError, ConfigError):
        return None


def _call(folder: Path, op: str) -> PeerStatus | None:
    try:
        client = ControlClient(folder)
    except OSError:
        return None
    try:
        return client.call(op)
    except (OSError, ValueError):
        return None
    finally:
        client.close()


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
    """Folders whose lock a watchdog holds."""
    found = []
    for path in sorted(peers.glob("*/lock")):
        with path.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                found.append(path.parent)
    return found
