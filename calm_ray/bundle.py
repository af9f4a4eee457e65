"""The run bundle: everything that peers of one run share, in one folder, sealed once by the organiser.

    run.json  tokenizer/...  model/config.json  text/...  manifest.json  manifest.sig

The manifest names every part with size and SHA-256 and is signed with the organiser's key, so a part may come from any
peer. Made once: training a tokenizer twice gives two tokenizers, and Python's own texts differ between its versions.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from calm_ray import __version__
from calm_ray.config import RunTable, parse_table
from calm_ray.errors import ConfigError, VersionMismatch
from calm_ray.signing import is_signed_by
from calm_ray.tables import Table

MANIFEST, SIGNATURE, RUN = "manifest.json", "manifest.sig", "run.json"
MAX_MANIFEST_BYTES = 64 * 1024
MAX_BUNDLE_BYTES = 512 * 1024 * 1024
"""Larger corpora do not belong in a bundle: every peer downloads all of it."""
_PART_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}){0,3}$")


class Part(Table):
    """One file of the bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0, le=MAX_BUNDLE_BYTES)


class Manifest(Table):
    """What a bundle holds; the bytes of its JSON form are what the organiser signs."""

    format: int = Field(ge=1, le=1)
    run_id: str
    config_hash: str
    version: str = Field(max_length=32)
    """The organiser's calm-ray. Peers need the same major and minor version."""
    install: str = Field(default="", max_length=1024)
    """The pip line that installs a fitting calm-ray."""
    parts: Mapping[str, Part] = Field(max_length=256)

    def total_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts.values())


def seal_bundle(folder: Path, *, run: RunTable, key: Ed25519PrivateKey, install: str = "") -> Manifest:
    """Write `manifest.json` and its signature over all files in `folder`."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    parts = {
        name: Part(sha256=_sha256(folder / name), size_bytes=(folder / name).stat().st_size)
        for name in names
        if name not in (MANIFEST, SIGNATURE)
    }
    if bad := _bad_names(parts):
        raise ConfigError(f"{folder}: bad part name {bad[0]!r}; use letters, digits, dots, dashes and underscores")
    total = sum(part.size_bytes for part in parts.values())
    if total > MAX_BUNDLE_BYTES:
        raise ConfigError(
            f"{folder}: the bundle has {total / 1e6:.0f} MB, more than {MAX_BUNDLE_BYTES / 1e6:.0f} MB; "
            "set in_bundle = false and give trainers the text under [peer] data_root"
        )
    manifest = Manifest(
        format=1, run_id=run.run_id, config_hash=run.config_hash(), version=__version__, install=install, parts=parts
    )
    data = manifest.model_dump_json().encode()
    (folder / MANIFEST).write_bytes(data)
    (folder / SIGNATURE).write_bytes(key.sign(data))
    return manifest


def check_manifest(data: bytes, *, signature: bytes, organiser_key: bytes) -> Manifest:
    """Verify and parse a manifest that came from a stranger."""
    if not is_signed_by(organiser_key, signature=signature, data=data):
        raise ConfigError("run bundle: not signed by the organiser of this invite; ask for a new invite")
    manifest = parse_table(Manifest, _json(data, where="run bundle manifest"), where="run bundle manifest")
    bad = _bad_names(manifest.parts)
    if bad or manifest.total_bytes() > MAX_BUNDLE_BYTES:
        raise ConfigError(f"run bundle manifest: {f'bad part name {bad[0]!r}' if bad else 'too large'}")
    if manifest.version.split(".")[:2] != __version__.split(".")[:2]:
        raise VersionMismatch(
            f"this run needs calm-ray {'.'.join(manifest.version.split('.')[:2])}, you have {__version__}; "
            f"run: {manifest.install or 'pip install calm-ray==' + manifest.version}"
        )
    return manifest


def is_part_intact(path: Path, part: Part) -> bool:
    """Whether the file at `path` is there and is the one that the manifest names."""
    return path.is_file() and path.stat().st_size == part.size_bytes and _sha256(path) == part.sha256


def open_bundle(folder: Path, *, organiser_key: bytes | None = None) -> tuple[Manifest, RunTable]:
    """Verify a bundle on disk and read its `[run]`. Without a key, only digests are checked (own folder)."""
    try:
        data, signature = (folder / MANIFEST).read_bytes(), (folder / SIGNATURE).read_bytes()
    except FileNotFoundError as exc:
        raise ConfigError(f"{folder}: not a run bundle, {Path(exc.filename).name} is missing") from None
    if organiser_key is None:
        manifest = parse_table(Manifest, _json(data, where=f"{folder / MANIFEST}"), where=f"{folder / MANIFEST}")
    else:
        manifest = check_manifest(data, signature=signature, organiser_key=organiser_key)
    for name, part in manifest.parts.items():
        if not is_part_intact(folder / name, part):
            raise ConfigError(f"{folder / name}: missing or altered; delete the folder and fetch the bundle again")
    run = parse_table(RunTable, _json((folder / RUN).read_bytes(), where=f"{folder / RUN}"), where=f"{folder / RUN}")
    if run.config_hash() != manifest.config_hash:
        raise VersionMismatch(
            f"{folder / RUN}: this calm-ray {__version__} reads the run's settings differently than the organiser's "
            f"{manifest.version}; run: {manifest.install or 'pip install calm-ray==' + manifest.version}"
        )
    return manifest, run


def _bad_names(names: Iterable[str]) -> list[str]:
    return [name for name in names if not _PART_NAME.fullmatch(name)]


def _json(data: bytes, *, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{where}: not JSON; delete the folder and fetch the bundle again") from exc


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
