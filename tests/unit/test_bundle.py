"""The run bundle and its signature: what is sealed opens, and whatever has been altered since does not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from calm_ray import __version__, bundle
from calm_ray.bundle import MANIFEST, RUN, SIGNATURE, Manifest, check_manifest, is_part_intact, open_bundle, seal_bundle
from calm_ray.config import RunTable
from calm_ray.errors import ConfigError, VersionMismatch
from calm_ray.signing import is_signed_by, load_or_create_key, public_bytes

RUN_TABLE = RunTable.model_validate(
    {
        "run_id": "tiny",
        "num_epochs": 10,
        "target_batch_size": 64,
        "model": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
        "tokenizer": {"source": "train", "vocab_size": 300},
        "data": {"sources": [{"kind": "builtin"}], "sequence_length": 32},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "decay_epochs": 10},
    }
)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PARTS = {RUN, "tokenizer/tokenizer.json", "text/0.txt", "empty"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sealed bundle."""
    folder = tmp_path / "bundle"
    for name in PARTS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    (folder / "empty").write_bytes(b"")
    (folder / RUN).write_bytes(RUN_TABLE.canonical_json())
    seal_bundle(folder, run=RUN_TABLE, key=KEY)
    return folder


def resign(folder: Path, **changes: Any) -> tuple[bytes, bytes]:
    """The manifest with `changes`, signed by the organiser: what a careless or hostile organiser could send."""
    data = json.dumps({**json.loads((folder / MANIFEST).read_bytes()), **changes}).encode()
    (folder / MANIFEST).write_bytes(data)
    (folder / SIGNATURE).write_bytes(KEY.sign(data))
    return data, KEY.sign(data)


def check(data: bytes, signature: bytes) -> Manifest:
    return check_manifest(data, signature=signature, organiser_key=public_bytes(KEY))


def test_sealed_bundle_opens_and_gives_back_the_run(folder: Path) -> None:
    manifest, run = open_bundle(folder, organiser_key=public_bytes(KEY))
    assert run == RUN_TABLE
    assert set(manifest.parts) == PARTS
    assert manifest.run_id == "tiny"
    assert manifest.config_hash == RUN_TABLE.config_hash()
    assert manifest.total_bytes() == sum((folder / name).stat().st_size for name in PARTS)


def test_sealing_again_does_not_seal_the_seal(folder: Path) -> None:
    first = (folder / MANIFEST).read_bytes()
    seal_bundle(folder, run=RUN_TABLE, key=KEY)
    assert (folder / MANIFEST).read_bytes() == first


def test_bundle_of_another_organiser_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="not signed by the organiser of this invite"):
        open_bundle(folder, organiser_key=public_bytes(Ed25519PrivateKey.generate()))


def test_manifest_altered_after_signing_is_refused(folder: Path) -> None:
    data = (folder / MANIFEST).read_bytes()
    signature = (folder / SIGNATURE).read_bytes()
    assert check(data, signature).run_id == "tiny"
    for altered in (data.replace(b"tiny", b"tidy"), data + b" ", data[:-1], b""):
        with pytest.raises(ConfigError, match="not signed by the organiser"):
            check(altered, signature)


@pytest.mark.parametrize("signature", [b"", b"short", bytes(64), bytes(65)])
def test_malformed_signature_is_refused(folder: Path, signature: bytes) -> None:
    with pytest.raises(ConfigError, match="not signed by the organiser"):
        check((folder / MANIFEST).read_bytes(), signature)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text("other content"),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["longer", "same length", "missing", "a folder"],
)
def test_part_altered_on_disk_is_named(folder: Path, change: Any) -> None:
    change(folder / "text" / "0.txt")
    for organiser_key in (None, public_bytes(KEY)):
        with pytest.raises(ConfigError, match=r"text/0\.txt: missing or altered; delete the folder"):
            open_bundle(folder, organiser_key=organiser_key)


def test_part_that_is_intact_is_told_from_one_that_is_not(folder: Path) -> None:
    manifest, _ = open_bundle(folder)
    part = manifest.parts["text/0.txt"]
    assert is_part_intact(folder / "text/0.txt", part)
    assert not is_part_intact(folder / "empty", part)
    assert not is_part_intact(folder / "missing", part)
    assert is_part_intact(folder / "empty", manifest.parts["empty"])


@pytest.mark.parametrize("missing", [MANIFEST, SIGNATURE])
def test_folder_without_a_seal_is_no_bundle(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=f"not a run bundle, {missing} is missing"):
        open_bundle(folder)


@pytest.mark.parametrize("name", [MANIFEST, RUN])
def test_bundle_whose_json_is_broken_names_the_file(folder: Path, name: str) -> None:
    """Without a key, as a peer opens its own folder: a full disk may have cut the file short."""
    (folder / name).write_bytes(b"{")
    if name == RUN:
        seal_bundle(folder, run=RUN_TABLE, key=KEY)
    with pytest.raises(ConfigError, match=f"{name}: not JSON; delete the folder"):
        open_bundle(folder)


def test_folder_that_is_not_there_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run bundle"):
        open_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name",
    [
        "../outside", "/etc/passwd", "text/../../outside", "a//b", "", ".", "..", ".hidden", "text/.hidden",
        "a/b/c/d/e", "with space", "new\nline", "end\n", "a\\b", "x" * 101,
    ],
)  # fmt: skip
def test_part_that_would_land_elsewhere_is_refused(folder: Path, name: str) -> None:
    part = {"sha256": "0" * 64, "size_bytes": 1}
    with pytest.raises(ConfigError, match="bad part name"):
        check(*resign(folder, parts={name: part}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format"),
        ({"parts": {"a": {"sha256": "0" * 64, "size_bytes": -1}}}, "size_bytes"),
        ({"parts": {"a": {"sha256": "short", "size_bytes": 1}}}, "sha256"),
        ({"parts": {f"p{n}": {"sha256": "0" * 64, "size_bytes": 1} for n in range(300)}}, "parts"),
        ({"parts": {f"p{n}": {"sha256": "0" * 64, "size_bytes": 1 << 28} for n in range(3)}}, "too large"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_manifest_with_impossible_content_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"run bundle manifest.*{message}"):
        check(*resign(folder, **changes))


@pytest.mark.parametrize("data", [b"", b"not JSON", b"[]", b"null", b"[" * 100_000, b"\xff"])
def test_manifest_that_is_signed_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match="run bundle manifest"):
        check(data, KEY.sign(data))


def test_bundle_of_another_minor_version_names_the_line_that_helps(folder: Path) -> None:
    major, minor, *_ = __version__.split(".")
    other = f"{major}.{int(minor) + 1}.0"
    line = 'pip install "calm-ray @ file:///tmp/calm.whl"'
    with pytest.raises(VersionMismatch, match=rf"needs calm-ray {major}\.{int(minor) + 1}, you have") as caught:
        check(*resign(folder, version=other, install=line))
    assert str(caught.value).endswith(f"run: {line}")
    with pytest.raises(VersionMismatch, match=f"run: pip install calm-ray=={other}"):
        check(*resign(folder, version=other, install=""))


def test_bundle_of_another_patch_level_is_fine(folder: Path) -> None:
    major, minor, *_ = __version__.split(".")
    assert check(*resign(folder, version=f"{major}.{minor}.999")).version.endswith("999")


def test_run_that_this_version_reads_differently_is_refused(folder: Path) -> None:
    """Such as one whose new field has another default here: the hash of what *we* read must be the organiser's."""
    resign(folder, config_hash="0" * 64)
    with pytest.raises(VersionMismatch, match="reads the run's settings differently"):
        open_bundle(folder, organiser_key=public_bytes(KEY))


def test_bundle_that_is_too_large_names_the_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_BUNDLE_BYTES", 1000)
    (folder / "text" / "1.txt").write_bytes(bytes(1000))
    with pytest.raises(ConfigError, match="in_bundle = false"):
        seal_bundle(folder, run=RUN_TABLE, key=KEY)


def test_bundle_that_cannot_be_read_by_others_is_not_sealed(folder: Path) -> None:
    """A name that newcomers would refuse must fail at the organiser's, not at everybody else's."""
    (folder / "text" / "naïve.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"bad part name .*naïve"):
        seal_bundle(folder, run=RUN_TABLE, key=KEY)


def test_copied_bundle_opens_elsewhere(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert open_bundle(tmp_path / "copy", organiser_key=public_bytes(KEY))[1] == RUN_TABLE


# --- the key ---------------------------------------------------------------------------------------------------------


def test_key_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "key"
    key = load_or_create_key(path)
    assert public_bytes(load_or_create_key(path)) == public_bytes(key)
    assert path.stat().st_mode & 0o777 == 0o600


def test_damaged_key_is_told_as_such_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"half a key")
    with pytest.raises(ConfigError, match=r"not a key of ours.*restore it from a backup"):
        load_or_create_key(path)
    assert path.read_bytes() == b"half a key"


def test_signature_holds_for_its_key_and_data_alone() -> None:
    signature = KEY.sign(b"data")
    assert is_signed_by(public_bytes(KEY), signature=signature, data=b"data")
    assert not is_signed_by(public_bytes(KEY), signature=signature, data=b"date")
    assert not is_signed_by(public_bytes(Ed25519PrivateKey.generate()), signature=signature, data=b"data")
    assert not is_signed_by(b"no key", signature=signature, data=b"data")
