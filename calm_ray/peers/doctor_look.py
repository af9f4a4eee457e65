"""The doctor's eyes on this machine: each function looks at one thing, quickly, and judges nothing. No torch.

What Windows has not (fcntl, resource) is imported where it is used: there, the doctor must live to say so.
"""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from calm_ray.peers.control import ControlClient, socket_path
from calm_ray.peers.doctor_machine import PACKAGES, MemoryFacts, SpaceFacts, SystemFacts
from calm_ray.peers.doctor_peer import FolderFacts

TRIAL_BYTES = 1 << 20
"""Written to see whether it can be: a quota or a full disk shows itself only so."""


def look_at_system() -> SystemFacts:
    return SystemFacts(platform=sys.platform, machine=platform.machine(), kernel=platform.release())


def look_at_packages() -> dict[str, str | None]:
    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in PACKAGES}


def look_at_memory(root: Path = Path("/")) -> MemoryFacts:
    """Of the machine, or of the control group that we are in, whichever has less left."""
    memory = psutil.virtual_memory()
    facts = MemoryFacts(total_bytes=memory.total, available_bytes=memory.available)
    for limit, left in _control_groups(root):
        if limit < facts.total_bytes and left < facts.available_bytes:
            facts = MemoryFacts(total_bytes=limit, available_bytes=left, is_container=True)
    return facts


def _control_groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, what is left of it) of our control group and those above it, version 2 or 1. Cache counts as left."""
    with contextlib.suppress(OSError, ValueError):
        lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        for _, controllers, path in lines:
            if controllers not in ("", "memory"):
                continue
            top = root / "sys/fs/cgroup" / controllers
            names = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                if controllers
                else ("memory.max", "memory.current", "inactive_file")
            )
            own = top / path.strip("/")  # inside a container this may be the host's path, and not be there
            for folder in (own, *own.parents):
                if folder.is_relative_to(top):
                    with contextlib.suppress(OSError, ValueError):
                        yield _limit_and_left(folder, *names)


def _limit_and_left(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> tuple[int, int]:
    limit = int((folder / limit_name).read_text())  # "max" is no limit: ValueError
    usage = int((folder / usage_name).read_text())
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return limit, max(0, limit - usage + int(stat.get(cache_name, 0)))


def look_at_space(folder: Path) -> SpaceFacts:
    """Write a file there, as a peer would, and leave nothing: folders that had to be made for it are removed."""
    made: list[Path] = []
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir()
            made.append(path)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
        return SpaceFacts(path=str(folder), free_bytes=shutil.disk_usage(folder).free)
    except OSError as exc:
        return SpaceFacts(path=str(folder), error_code=exc.errno or 0, problem=exc.strerror or str(exc))
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()


def temporary_folders() -> tuple[Path, ...]:
    """Where sockets and temporary files go. hivemind's are in /tmp, whatever TMPDIR says. Raises OSError."""
    return tuple(dict.fromkeys((Path(tempfile.gettempdir()), Path("/tmp"))))


def look_at_control(folder: Path) -> str:
    """Make a socket where the watchdog's would be. Raises CalmRayError or OSError."""
    path = socket_path(folder).with_suffix(f".{os.getpid() % 1000}")  # not longer than the real one
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
        try:
            trial.bind(str(path))
        finally:
            path.unlink(missing_ok=True)
    return str(path.parent)


def look_at_open_files() -> int | None:
    """The hard limit of this process, which its children inherit; None if there is none."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if hard == resource.RLIM_INFINITY else hard


def look_at_folder(folder: Path) -> FolderFacts:
    """Whether a peer runs in the folder, and whether it has an identity that we can read. Changes nothing."""
    import fcntl

    identity = folder / "identity.key"
    try:
        if identity.exists():
            identity.read_bytes()
        with (folder / "lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two doctors do not see each other
            except BlockingIOError:
                return FolderFacts(
                    holder=file.read(20).strip() or "unknown", state=_state(folder), has_identity=identity.exists()
                )
    except FileNotFoundError:
        pass  # nobody has ever run there
    except OSError as exc:
        return FolderFacts(problem=f"{exc.filename}: {exc.strerror or exc}")
    return FolderFacts(has_identity=identity.exists())


def _state(folder: Path) -> str:
    with contextlib.suppress(Exception):  # it only makes the sentence longer
        client = ControlClient(folder)
        try:
            return client.call("status").state
        finally:
            client.close()
    return ""
