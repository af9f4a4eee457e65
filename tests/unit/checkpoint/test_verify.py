"""What can happen to a checkpoint on a disk or on its way is found, and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from calm_ray.checkpoint.manifest import REQUIRED, sha256_of
from calm_ray.checkpoint.read import latest, read_checkpoint
from calm_ray.checkpoint.verify import verify_checkpoint
from calm_ray.errors import CheckpointRejected

Write = Callable[..., Path]


def alter_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def reseal(folder: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed: damage that digests do not show."""
    files = json.loads((folder / "manifest.json").read_bytes())["files"]
    files[name] = {"sha256": sha256_of(folder / name), "size_bytes": (folder / name).stat().st_size}
    alter_manifest(folder, files=files)


def test_verify_of_a_fresh_checkpoint_returns_its_manifest(write: Write) -> None:
    manifest = verify_checkpoint(write(3))
    assert (manifest.epoch, manifest.run_id, manifest.config_hash) == (3, "demo", "ab" * 32)


def test_verify_with_a_file_that_the_manifest_does_not_name_is_content(write: Write) -> None:
    folder = write(3)
    (folder / "README.md").write_text("a model card")
    verify_checkpoint(folder)


def test_verify_of_a_copy_under_another_name_is_content(write: Write, tmp_path: Path) -> None:
    verify_checkpoint(shutil.copytree(write(3), tmp_path / "downloaded"))


@pytest.mark.parametrize("name", [*REQUIRED, "tokenizer.json", "manifest.json"])
def test_verify_with_a_missing_file_names_it(write: Write, name: str) -> None:
    folder = write(3)
    (folder / name).unlink()
    with pytest.raises(CheckpointRejected, match=name):
        verify_checkpoint(folder)


@pytest.mark.parametrize("name", [*REQUIRED, "tokenizer.json"])
def test_verify_with_a_flipped_bit_names_the_file(write: Write, name: str) -> None:
    folder = write(3)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointRejected, match=f"{name}: altered"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("name", [*REQUIRED, "tokenizer.json"])
def test_verify_with_a_truncated_file_says_how_much_is_there(write: Write, name: str) -> None:
    folder = write(3)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    with pytest.raises(CheckpointRejected, match=f"{name}: {len(data) - 1} bytes, should have {len(data)}"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"{}", b"[" * 60_000, b" " * 70_000])
def test_verify_with_a_manifest_that_is_none_is_refused(write: Write, content: bytes) -> None:
    folder = write(3)
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointRejected, match=r"manifest\.json"):
        verify_checkpoint(folder)


def test_verify_with_a_manifest_that_reaches_outside_is_refused(write: Write) -> None:
    folder = write(3)
    files = json.loads((folder / "manifest.json").read_bytes())["files"]
    alter_manifest(folder, files=files | {"../../etc/passwd": {"sha256": "0" * 64, "size_bytes": 1}})
    with pytest.raises(CheckpointRejected, match="no plain file name"):
        verify_checkpoint(folder)


def test_verify_with_a_manifest_that_leaves_out_the_model_is_refused(write: Write) -> None:
    folder = write(3)
    files = json.loads((folder / "manifest.json").read_bytes())["files"]
    del files["model.safetensors"]
    alter_manifest(folder, files=files)
    with pytest.raises(CheckpointRejected, match=r"does not name model\.safetensors"):
        verify_checkpoint(folder)


def test_verify_of_a_newer_format_says_to_update(write: Write) -> None:
    folder = write(3)
    alter_manifest(folder, format_version=2)
    with pytest.raises(CheckpointRejected, match="update calm-ray"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_verify_with_values_that_are_not_finite_names_the_tensor(write: Write, name: str) -> None:
    folder = write(3)
    save_file({"fine": torch.zeros(2), "poisoned": torch.tensor([1.0, float("nan")])}, folder / name)
    reseal(folder, name)
    with pytest.raises(CheckpointRejected, match=rf"{name}: 1 of the 2 values of `poisoned` are NaN"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x80\x04\x95pickle"], ids=["empty", "header", "pickle"])
def test_verify_with_tensors_in_no_known_format_is_refused(write: Write, content: bytes) -> None:
    folder = write(3)
    (folder / "model.safetensors").write_bytes(content)
    reseal(folder, "model.safetensors")
    with pytest.raises(CheckpointRejected, match="not a safetensors file"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("content", [b"[]", b"{}", b"?", b"[" * 100_000])
def test_verify_with_a_training_state_that_is_none_is_refused(write: Write, content: bytes) -> None:
    folder = write(3)
    (folder / "training_state.json").write_bytes(content)
    reseal(folder, "training_state.json")
    with pytest.raises(CheckpointRejected, match="not a training state"):
        verify_checkpoint(folder)


def test_verify_when_state_and_manifest_are_of_different_epochs_is_refused(write: Write) -> None:
    folder = write(3)
    alter_manifest(folder, epoch=4)
    with pytest.raises(CheckpointRejected, match="another run or epoch"):
        verify_checkpoint(folder)


def test_read_of_an_altered_checkpoint_loads_nothing(write: Write) -> None:
    folder = write(3)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointRejected):
        read_checkpoint(folder)


def test_latest_passes_over_what_does_not_verify(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [write(epoch) for epoch in (1, 2, 3)]
    (folders[2] / "config.json").unlink()
    data = (folders[1] / "model.safetensors").read_bytes()
    (folders[1] / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert latest(tmp_path / "out") == folders[0]
    assert "config.json: missing" in caplog.text
    assert "model.safetensors: altered" in caplog.text


def test_latest_of_a_folder_without_checkpoints_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "not there") is None
