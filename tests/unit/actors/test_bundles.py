"""A bundle counts when it is whole, wherever on the machine it lies, and is handed over whole or not at all."""

import hashlib
from pathlib import Path

import pytest

from calm_ray.actors.bundles import find_bundle, holds_bundle, read_bundle, store_bundle
from calm_ray.actors.desired import Orders
from calm_ray.bundle import MANIFEST, SIGNATURE, Manifest, Part
from calm_ray.errors import CalmRayError
from calm_ray.peers.spec import PeerSpec


def _parts() -> dict[str, bytes]:
    parts = {"run.json": b"{}", "text/corpus.txt": b"words"}
    named = {name: Part(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)) for name, data in parts.items()}
    manifest = Manifest(format=1, run_id="run", config_hash="c", version="0", parts=named)
    return {**parts, MANIFEST: manifest.model_dump_json().encode(), SIGNATURE: bytes(64)}


PARTS = _parts()
DIGEST = hashlib.sha256(PARTS[MANIFEST]).hexdigest()


def write(folder: Path, *, without: str = "") -> Path:
    for name, data in PARTS.items():
        if name != without:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def orders(tmp_path: Path) -> Orders:
    spec = PeerSpec(role="auxiliary", folder=tmp_path / "peers" / "auxiliary-0", bundle=tmp_path / "bundle")
    return Orders(spec=spec, config_hash="c", num_epochs=1, bundle_digest=DIGEST)


@pytest.mark.parametrize("missing", sorted(PARTS))
def test_half_a_bundle_is_none(orders: Orders, tmp_path: Path, missing: str) -> None:
    write(tmp_path / "bundle", without=missing)
    assert find_bundle(orders) is None
    assert find_bundle(orders.model_copy(update={"bundle_digest": "other"})) is None


def test_bundle_is_found_at_its_home_in_the_peers_folder_or_in_a_neighbours(orders: Orders, tmp_path: Path) -> None:
    neighbours = write(tmp_path / "peers" / "trainer-0" / "bundle")
    assert find_bundle(orders) == neighbours
    own = write(orders.spec.folder / "bundle")
    assert find_bundle(orders) == own
    home = write(tmp_path / "bundle")
    assert find_bundle(orders) == home
    invited = orders.spec.model_copy(update={"bundle": None, "invite": "calm1-x"})
    assert find_bundle(orders.model_copy(update={"spec": invited})) == own
    home.joinpath("text/corpus.txt").write_bytes(b"wordz")
    assert find_bundle(orders) == own


def test_bundle_that_is_handed_over_replaces_half_a_one(orders: Orders) -> None:
    own = write(orders.spec.folder / "bundle", without=SIGNATURE)
    store_bundle(orders, PARTS)
    assert read_bundle(own) == PARTS
    assert [path.name for path in orders.spec.folder.iterdir()] == ["bundle"]


@pytest.mark.parametrize("parts", [{}, {**PARTS, "run.json": b"[]"}, {**PARTS, MANIFEST: b"{}"}])
def test_other_bundle_is_refused_and_leaves_nothing(orders: Orders, parts: dict[str, bytes]) -> None:
    with pytest.raises(CalmRayError, match="is not the run's bundle"):
        store_bundle(orders, parts)
    assert not holds_bundle(orders.spec.folder / "bundle", digest=DIGEST)
    assert list(orders.spec.folder.glob("*")) == []


def test_disk_that_takes_only_a_part_leaves_nothing(orders: Orders, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_bytes(path: Path, data: bytes) -> int:
        if path.name == SIGNATURE:
            raise OSError(28, "No space left on device")
        with path.open("wb") as file:
            return file.write(data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match="No space"):
        store_bundle(orders, PARTS)
    assert list(orders.spec.folder.glob("*")) == []
