"""Writing that survives a power cut, and the system's errors as one of ours.

Each function returns when what it did is on disk.
"""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from calm_ray.errors import CalmRayError

MARGIN_BYTES = 1 << 20
"""Small files and what the file system needs for itself."""


def write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _sync(path)


def write_copy(path: Path, source: Path) -> None:
    shutil.copyfile(source, path)
    _sync(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # `format` is what transformers looks for before it loads a file.
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors' own mode is for the owner alone; a web server may serve this
    _sync(path)


def replace_file(path: Path, data: bytes) -> None:
    """Readers see the old content or the new, never half."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_bytes(temporary, data)
    os.replace(temporary, path)
    sync_folder(path.parent)


def rename_folder(source: Path, target: Path) -> None:
    os.rename(source, target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make names in `folder` durable, not only the content of its files."""
    _sync(folder)


@contextmanager
def only_writer(out_dir: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel lets go of it when we die."""
    lock = os.open(out_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CalmRayError(f"{out_dir}: another process is writing here; one writer per folder") from None
        yield
    finally:
        os.close(lock)


def require_room(out_dir: Path, *, num_bytes: int) -> None:
    """Fail before the first byte is written, rather than with half a checkpoint."""
    if shutil.disk_usage(out_dir).free < num_bytes + MARGIN_BYTES:
        raise _no_room(out_dir, num_bytes)


@contextmanager
def disk_errors(out_dir: Path, *, num_bytes: int) -> Iterator[None]:
    """Translate what a disk does to us into CalmRayError with path, size and remedy."""
    try:
        yield
    except (OSError, SafetensorError) as exc:
        if _errno(exc) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _no_room(out_dir, num_bytes) from exc
        raise CalmRayError(
            f"{out_dir}: checkpoint not written: {exc}; the one before is kept. Check that the folder is writable"
        ) from exc


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _errno(exc: OSError | SafetensorError) -> int | None:
    if isinstance(exc, OSError):
        return exc.errno
    found = re.search(r"os error (\d+)", str(exc))  # safetensors hands on only the text of Rust's error
    return int(found[1]) if found else None


def _no_room(out_dir: Path, num_bytes: int) -> CalmRayError:
    return CalmRayError(
        f"{out_dir}: no room for a checkpoint, which needs {(num_bytes + MARGIN_BYTES) / 1e6:,.0f} MB; the one before "
        "is kept. Free some space, lower `keep_last`, or choose a folder on another disk"
    )
