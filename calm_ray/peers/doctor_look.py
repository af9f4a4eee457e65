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
from pathlib import Path

import psutil

from calm_ray.errors import CalmRayError
from calm_ray.peers.control import ask, socket_path, temporary_folder
from calm_ray.peers.doctor_machine import PACKAGES, MemoryFacts, SpaceFacts, SystemFacts
from calm_ray.peers.doctor_peer import FolderFacts
from calm_ray.peers.endings import disk_error
from calm_ray.peers.spec import IDENTITY_FILE
from calm_ray.peers.vitals import control_groups

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
    for limit, left in control_groups(root):
        if limit < facts.total_bytes and left < facts.available_bytes:
            facts = MemoryFacts(total_bytes=limit, available_bytes=left, is_container=True)
    return facts


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
    """Where sockets and temporary files go. hivemind's are in /tmp, whatever TMPDIR says."""
    return tuple(dict.fromkeys((temporary_folder(), Path("/tmp"))))


def look_at_control(folder: Path) -> str:
    """Make a socket where the watchdog's would be. Raises CalmRayError."""
    place = temporary_folder()
    try:
        path = socket_path(folder).with_suffix(f".{os.getpid() % 1000}")  # not longer than the real one
        place = path.parent
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
            try:
                trial.bind(str(path))
            finally:
                path.unlink(missing_ok=True)
    except OSError as exc:
        raise disk_error(exc, where=place, elsewhere="set TMPDIR to another folder") from exc
    return str(place)


def look_at_open_files() -> int | None:
    """The hard limit of this process, which its children inherit; None if there is none."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if hard == resource.RLIM_INFINITY else hard


def look_at_folder(folder: Path) -> FolderFacts:
    """Whether a peer runs in the folder, and whether it has an identity that we can read. Changes nothing."""
    from calm_ray.peers.lock import FILE_NAME, holder

    identity = folder / IDENTITY_FILE
    try:
        for path in (identity, folder / FILE_NAME):
            with contextlib.suppress(FileNotFoundError):  # nobody has ever run there
                path.read_bytes()
        has_identity = identity.exists()
    except OSError as exc:
        return FolderFacts(problem=f"{exc.filename}: {exc.strerror or exc}")
    if not (process := holder(folder)):
        return FolderFacts(has_identity=has_identity)
    status = None
    with contextlib.suppress(CalmRayError):  # it only makes the sentence longer
        status = ask(folder)
    return FolderFacts(holder=process, state=status.state if status is not None else "", has_identity=has_identity)
