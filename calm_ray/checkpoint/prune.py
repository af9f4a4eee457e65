"""Which checkpoints stay, and what a crash left behind goes. For the folder's one writer."""

import shutil
from pathlib import Path

from calm_ray.checkpoint import files
from calm_ray.checkpoint.manifest import REPLACED_PREFIX, TEMPORARY_PREFIX, Manifest, folders, read_manifest
from calm_ray.errors import CheckpointRejected


def sweep(out_dir: Path) -> None:
    """Remove temporary folders; give a replaced checkpoint its name back if its successor never came."""
    for path in out_dir.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(path)
    for path in out_dir.glob(f"{REPLACED_PREFIX}*"):
        original = path.with_name(path.name.removeprefix(REPLACED_PREFIX))
        if original.exists():
            shutil.rmtree(path)
        else:
            files.rename_folder(path, original)


def prune(out_dir: Path, *, keep_last: int, written: Path) -> None:
    """Keep the newest `keep_last` whole checkpoints, and `written`, whatever its epoch.

    A folder that is not whole counts for nothing. It stays while it is newer than those kept, for somebody to look at.
    """
    num_kept = 0
    for _, folder in folders(out_dir):
        if num_kept >= keep_last and folder != written:
            shutil.rmtree(folder)
        elif is_whole(folder):
            num_kept += 1


def newest_whole(out_dir: Path) -> tuple[Path, Manifest] | None:
    """By name and size alone, without reading the tensors: see `read.latest` for one that verifies."""
    for _, folder in folders(out_dir):
        try:
            return folder, read_manifest(folder)
        except CheckpointRejected:
            continue
    return None


def is_whole(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except CheckpointRejected:
        return False
    return True
