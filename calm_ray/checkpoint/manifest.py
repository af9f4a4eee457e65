"""What a checkpoint is on disk: its files, its manifest, and the names of folders.

epoch-00000040/  model.safetensors  config.json  tokenizer.json ...   what `from_pretrained` reads
                 optimizer.safetensors  training_state.json           what a swarm needs to go on
                 manifest.json                                        SHA-256 and size of each of them
latest.json                                                           names the newest, for readers that cannot list
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import Field, ValidationError

from calm_ray.errors import CheckpointRejected
from calm_ray.tables import Table

FORMAT_VERSION = 1
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
CONFIG, STATE, MANIFEST, LATEST = "config.json", "training_state.json", "manifest.json", "latest.json"
TENSOR_FILES = (MODEL, OPTIMIZER)
REQUIRED = (*TENSOR_FILES, CONFIG, STATE)
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model",
    "sentencepiece.bpe.model", "tokenizer.model", "vocab.txt", "vocab.json", "merges.txt",
)  # fmt: skip
"""Of a tokenizer's folder only these are taken: it may be a bundle that holds a corpus as well."""
MAX_MANIFEST_BYTES = 64 * 1024
REPLACED_PREFIX = ".old-"
"""A damaged checkpoint on its way out, while its successor takes its name."""
TEMPORARY_PREFIX = ".tmp-"
_FOLDER = re.compile(rf"({re.escape(REPLACED_PREFIX)})?epoch-(\d{{8,}})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


class FileEntry(Table):
    """One file of the checkpoint."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class Manifest(Table):
    """Written last, so a folder that has one was whole when it was written."""

    format_version: int
    run_id: str = Field(max_length=100)
    config_hash: str = Field(max_length=64)
    epoch: int = Field(ge=0)
    files: Mapping[str, FileEntry] = Field(max_length=64)


def folder_name(epoch: int) -> str:
    return f"epoch-{epoch:08d}"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_manifest(folder: Path, names: Iterable[str], *, run_id: str, config_hash: str, epoch: int) -> Manifest:
    """Measure the files as they lie on disk."""
    files = {
        name: FileEntry(sha256=sha256_of(folder / name), size_bytes=(folder / name).stat().st_size) for name in names
    }
    return Manifest(format_version=FORMAT_VERSION, run_id=run_id, config_hash=config_hash, epoch=epoch, files=files)


def read_manifest(folder: Path) -> Manifest:
    """Parse the manifest and compare the sizes: cheap, and enough to tell a whole checkpoint from half a one."""
    manifest = _parse_manifest(folder)
    missing = [name for name in REQUIRED if name not in manifest.files]
    if missing:
        raise CheckpointRejected(f"{folder}: the manifest does not name {missing[0]}")
    for name, entry in manifest.files.items():
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointRejected(f"{folder}: the manifest names {name[:100]!r}, which is no plain file name")
        path = folder / name
        if not path.is_file():
            raise CheckpointRejected(f"{path}: missing")
        if (size_bytes := path.stat().st_size) != entry.size_bytes:
            raise CheckpointRejected(f"{path}: {size_bytes} bytes, should have {entry.size_bytes}")
    return manifest


def folders(out_dir: Path) -> list[tuple[int, Path]]:
    """(epoch, folder) of everything in `out_dir` that is called like a checkpoint, newest first, whole or not."""
    if not out_dir.is_dir():
        return []
    found = [(match, path) for path in out_dir.iterdir() if (match := _FOLDER.fullmatch(path.name)) and path.is_dir()]
    # Of one epoch, the checkpoint itself comes before the one that it replaces.
    found.sort(key=lambda item: (int(item[0][2]), item[0][1] is None), reverse=True)
    return [(int(match[2]), path) for match, path in found]


def _parse_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as exc:
        raise CheckpointRejected(f"{path}: {exc.strerror}; not a checkpoint, or only half of one") from exc
    if len(data) > MAX_MANIFEST_BYTES:
        raise CheckpointRejected(f"{path}: larger than any manifest")
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as exc:
        raise CheckpointRejected(f"{path}: not a manifest: {exc.errors()[0]['msg']}") from exc
    if manifest.format_version != FORMAT_VERSION:
        raise CheckpointRejected(
            f"{path}: has format {manifest.format_version}, this calm-ray reads {FORMAT_VERSION}; update calm-ray"
        )
    return manifest
