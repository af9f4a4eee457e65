"""The run bundle where an actor is: found on its machine, taken over from another one, handed on.

Only what verifies counts: a worker that dies while it writes leaves half a bundle, and a peer that starts with that is
parked. A machine whose peers joined by invite has copies of the bundle, which count like the organiser's own.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import ValidationError

from calm_ray.actors.desired import Orders
from calm_ray.bundle import MANIFEST, SIGNATURE, Manifest, is_part_intact
from calm_ray.errors import CalmRayError

FOLDER = "bundle"
"""In a peer's folder; also where a peer that joins by invite puts its copy."""


def find_bundle(orders: Orders) -> Path | None:
    """The folder on this machine that holds the run's bundle, whole."""
    return next((place for place in _places(orders) if holds_bundle(place, digest=orders.bundle_digest)), None)


def _places(orders: Orders) -> Iterator[Path]:
    if orders.spec.bundle is not None:
        yield orders.spec.bundle
    yield orders.spec.folder / FOLDER
    yield from sorted(orders.spec.folder.parent.glob(f"*/{FOLDER}"))  # of the run's other peers


def holds_bundle(folder: Path, *, digest: str) -> bool:
    """Whether the bundle whose manifest has that SHA-256 is there, with all its parts."""
    try:
        data = (folder / MANIFEST).read_bytes()
        manifest = Manifest.model_validate_json(data) if hashlib.sha256(data).hexdigest() == digest else None
        return (
            manifest is not None
            and (folder / SIGNATURE).is_file()
            and all(is_part_intact(folder / name, part) for name, part in manifest.parts.items())
        )
    except (OSError, ValidationError):
        return False


def read_bundle(folder: Path) -> dict[str, bytes]:
    """A sealed bundle as one value for Ray's object store."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def store_bundle(orders: Orders, parts: Mapping[str, bytes]) -> None:
    """Write what was handed over into the peer's folder: all of it or nothing. CalmRayError if it is another bundle or
    not whole, OSError of the disk."""
    place = orders.spec.folder / FOLDER
    partial = place.with_name(f"{FOLDER}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        for name, data in parts.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if not holds_bundle(partial, digest=orders.bundle_digest):
            raise CalmRayError(f"what was handed over ({len(parts)} files) is not the run's bundle")
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
