"""Write a checkpoint so that a crash at any point leaves the one before intact.

All files go into a temporary folder beside the final one, each is synced, the manifest comes last, then one rename
makes it a checkpoint. One of the same epoch that is there already is replaced: the caller's state is the newer word.
Rejected: writing in place and marking it complete, as a reader would see half of it; pickles (`torch.save`), as whoever
loads one runs its author's code.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from calm_ray.checkpoint import files
from calm_ray.checkpoint.manifest import (
    CONFIG,
    FORMAT_VERSION,
    LATEST,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    REPLACED_PREFIX,
    STATE,
    TEMPORARY_PREFIX,
    TOKENIZER_FILES,
    folder_name,
    make_manifest,
    sha256_of,
)
from calm_ray.checkpoint.prune import newest_whole, prune, sweep
from calm_ray.checkpoint.tensors import require_finite, storable
from calm_ray.errors import CalmRayError, CheckpointRejected


def write_checkpoint(
    out_dir: Path,
    *,
    epoch: int,
    run_id: str,
    config_hash: str,
    named_parameters: Mapping[str, Tensor],
    optimizer_tensors: Mapping[str, Tensor] | Sequence[Tensor],
    optimizer_metadata: Any,
    model_config: Mapping[str, Any],
    tokenizer_dir: Path,
    keep_last: int,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write `out_dir/epoch-NNNNNNNN`, then delete all but the newest `keep_last`; return the new folder.

    `named_parameters`: tied weights once, names as in `model.named_parameters()`. `optimizer_tensors`: a sequence is
    named by its positions, so it comes back in order. `optimizer_metadata`: anything that JSON can hold; keys become
    strings. `model_config`: for config.json. `facts`: for people and for a later start, such as samples, learning rate.

    CheckpointRejected if a value is not finite, with its name; CalmRayError if the disk does not take it. Neither
    touches the checkpoints that are there.
    """
    if epoch < 0 or keep_last < 1 or not named_parameters:
        raise ValueError("a checkpoint has epoch >= 0 and parameters, and keep_last is at least 1")
    tensors = {MODEL: dict(named_parameters), OPTIMIZER: _named(optimizer_tensors)}
    documents = {
        CONFIG: _json(_with_architecture(model_config), what="model_config", epoch=epoch),
        STATE: _json(
            {
                "format_version": FORMAT_VERSION, "run_id": run_id, "config_hash": config_hash, "epoch": epoch,
                "optimizer_metadata": optimizer_metadata, "facts": dict(facts or {}),
            },
            what="optimizer_metadata or facts",
            epoch=epoch,
        ),
    }  # fmt: skip
    tokenizer = _tokenizer_files(tokenizer_dir)
    num_bytes = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    num_bytes += sum(map(len, documents.values())) + sum(path.stat().st_size for path in tokenizer)

    with files.disk_errors(out_dir, num_bytes=num_bytes):
        out_dir.mkdir(parents=True, exist_ok=True)
        with files.only_writer(out_dir):
            sweep(out_dir)
            _require_same_run(out_dir, run_id=run_id)
            files.require_room(out_dir, num_bytes=num_bytes)
            for name, group in tensors.items():
                require_finite(group, where=f"epoch {epoch}, {name}")
            temporary = out_dir / f"{TEMPORARY_PREFIX}{folder_name(epoch)}-{os.getpid()}"
            try:
                _fill(temporary, tensors=tensors, documents=documents, tokenizer=tokenizer)
                names = [*tensors, *documents, *(path.name for path in tokenizer)]
                manifest = make_manifest(temporary, names, run_id=run_id, config_hash=config_hash, epoch=epoch)
                files.write_bytes(temporary / MANIFEST, manifest.model_dump_json(indent=1).encode())
                files.sync_folder(temporary)
            except (OSError, SafetensorError):
                shutil.rmtree(temporary, ignore_errors=True)  # a full disk: give the room back at once
                raise
            folder = _publish(temporary, out_dir / folder_name(epoch))
            _point_to_newest(out_dir)
            prune(out_dir, keep_last=keep_last, written=folder)
    return folder


def _fill(
    folder: Path, *, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, bytes],
    tokenizer: Sequence[Path],
) -> None:  # fmt: skip
    folder.mkdir()
    for name, group in tensors.items():
        files.write_tensors(folder / name, storable(group))
    for name, data in documents.items():
        files.write_bytes(folder / name, data)
    for path in tokenizer:
        files.write_copy(folder / path.name, path)


def _publish(temporary: Path, folder: Path) -> Path:
    """Rename; a folder that has the name already steps aside, where readers still find it, and goes afterwards."""
    replaced = folder.with_name(REPLACED_PREFIX + folder.name)
    if folder.exists():
        files.rename_folder(folder, replaced)
    files.rename_folder(temporary, folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return folder


def _point_to_newest(out_dir: Path) -> None:
    found = newest_whole(out_dir)
    assert found is not None, "one has just been written"
    folder, manifest = found
    values = {
        "run_id": manifest.run_id, "epoch": manifest.epoch, "folder": folder.name,
        "manifest_sha256": sha256_of(folder / MANIFEST),
    }  # fmt: skip
    files.replace_file(out_dir / LATEST, _json(values, what=LATEST, epoch=manifest.epoch))


def _require_same_run(out_dir: Path, *, run_id: str) -> None:
    """Pruning deletes what is old, so a second run in the same folder would lose its checkpoints to the first."""
    found = newest_whole(out_dir)
    if found is not None and found[1].run_id != run_id:
        raise CalmRayError(
            f"{out_dir}: holds checkpoints of run {found[1].run_id!r}, this is run {run_id!r}; choose another folder"
        )


def _tokenizer_files(tokenizer_dir: Path) -> list[Path]:
    found = [path for name in TOKENIZER_FILES if (path := tokenizer_dir / name).is_file()]
    if not found:
        raise CalmRayError(f"{tokenizer_dir}: no tokenizer there; expected tokenizer.json or one of its like")
    return found


def _named(tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> dict[str, Tensor]:
    if isinstance(tensors, Mapping):
        return dict(tensors)
    return {f"{position:06d}": tensor for position, tensor in enumerate(tensors)}


def _with_architecture(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """The class that the Hub and `AutoModel` should take; a config that was never saved has none."""
    return {**model_config, "architectures": model_config.get("architectures") or ["AlbertForPreTraining"]}


def _json(values: Any, *, what: str, epoch: int) -> bytes:
    try:
        return json.dumps(values, indent=1, allow_nan=False).encode()
    except ValueError as exc:
        raise CheckpointRejected(f"epoch {epoch}: {what} holds a number that is NaN or infinite") from exc
