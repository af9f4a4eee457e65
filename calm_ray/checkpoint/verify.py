"""Is this checkpoint what its writer wrote, and fit to train on? Reads every byte.

The manifest proves that nothing was damaged on the way, not who wrote it: whoever can alter a file can alter the
manifest. Loading one is safe all the same: safetensors and JSON hold no code.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from calm_ray.checkpoint.manifest import STATE, TENSOR_FILES, Manifest, read_manifest, sha256_of
from calm_ray.checkpoint.tensors import require_finite
from calm_ray.errors import CheckpointRejected


def verify_checkpoint(folder: Path) -> Manifest:
    """Return the manifest if all its files are there, unaltered and finite; CheckpointRejected names what is not.

    Files that the manifest does not name are nobody's business: a model card may lie beside.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        try:
            digest = sha256_of(folder / name)
        except OSError as exc:
            raise CheckpointRejected(f"{folder / name}: {exc.strerror}") from exc
        if digest != entry.sha256:
            raise CheckpointRejected(f"{folder / name}: altered since it was written, its SHA-256 differs")
    _require_agreement(folder, manifest)
    for name in TENSOR_FILES:
        _require_finite_file(folder / name)
    return manifest


def _require_agreement(folder: Path, manifest: Manifest) -> None:
    path = folder / STATE
    try:
        state = json.loads(path.read_bytes())
        stated = {key: state[key] for key in ("run_id", "config_hash", "epoch")}
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise CheckpointRejected(f"{path}: not a training state") from exc
    if stated != {"run_id": manifest.run_id, "config_hash": manifest.config_hash, "epoch": manifest.epoch}:
        raise CheckpointRejected(f"{path}: of another run or epoch than the manifest")


def _require_finite_file(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                require_finite({name: file.get_tensor(name)}, where=str(path))
    except SafetensorError as exc:
        raise CheckpointRejected(f"{path}: not a safetensors file: {exc}") from exc
