"""A written checkpoint is whole, names what it refuses, and never costs the one before."""

import json
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from calm_ray.checkpoint.files import only_writer
from calm_ray.checkpoint.manifest import sha256_of
from calm_ray.checkpoint.read import latest, read_checkpoint
from calm_ray.checkpoint.verify import verify_checkpoint
from calm_ray.errors import CalmRayError, CheckpointRejected

Write = Callable[..., Path]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_checkpoint_written_and_read_gives_back_every_tensor_and_fact(write: Write) -> None:
    folder = write(40, facts={"num_samples": 10240, "learning_rate": 5e-4})
    checkpoint = read_checkpoint(folder)
    assert folder.name == "epoch-00000040"
    assert (checkpoint.epoch, checkpoint.manifest.run_id) == (40, "demo")
    assert torch.equal(checkpoint.parameters["embeddings.weight"], torch.full((4, 3), 40.0))
    assert [float(t[0]) for t in checkpoint.optimizer_tensors.values()] == [float(i) for i in range(12)]
    assert checkpoint.optimizer_metadata == [{"step": 40, "lr": 1e-3}]
    assert checkpoint.facts == {"num_samples": 10240, "learning_rate": 5e-4}
    assert checkpoint.model_config["architectures"] == ["AlbertForPreTraining"]


def test_checkpoint_folder_holds_its_files_and_nothing_of_the_corpus(write: Write) -> None:
    folder = write(1)
    assert names(folder) == {
        "model.safetensors", "optimizer.safetensors", "config.json", "training_state.json", "tokenizer.json",
        "manifest.json",
    }  # fmt: skip
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444 for path in folder.iterdir())


def test_latest_json_names_the_newest_by_its_manifest(write: Write, tmp_path: Path) -> None:
    write(1)
    folder = write(2)
    assert json.loads((tmp_path / "out" / "latest.json").read_bytes()) == {
        "run_id": "demo", "epoch": 2, "folder": folder.name, "manifest_sha256": sha256_of(folder / "manifest.json"),
    }  # fmt: skip


def test_checkpoint_without_optimizer_state_is_a_checkpoint(write: Write) -> None:
    checkpoint = read_checkpoint(write(0, optimizer_tensors=[], optimizer_metadata=[]))
    assert checkpoint.optimizer_tensors == {}
    assert checkpoint.optimizer_metadata == []


def test_checkpoint_of_views_and_shared_tensors_holds_each_value(write: Write) -> None:
    flat = torch.arange(12.0)
    views = {"a": flat[:6].view(2, 3), "b": flat[6:].view(3, 2).t(), "c": flat, "d": flat, "e": flat.to(torch.bfloat16)}
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in views.items()}
    folder = write(1, named_parameters=parameters)
    for name, tensor in read_checkpoint(folder).parameters.items():
        assert torch.equal(tensor, views[name])
    assert (folder / "model.safetensors").stat().st_size < 1000


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["model", "optimizer"])
def test_checkpoint_with_a_value_that_is_not_finite_is_refused_by_name(
    write: Write, tmp_path: Path, bad: float, where: str
) -> None:
    before = write(1)
    tensor = torch.zeros(5, 5)
    tensor[3, 3] = bad
    key = "named_parameters" if where == "model" else "optimizer_tensors"
    with pytest.raises(CheckpointRejected, match=rf"epoch 2, {where}.*1 of the 25 values of `layer\.weight` are NaN"):
        write(2, **{key: {"fine": torch.zeros(2), "layer.weight": tensor}})
    assert names(tmp_path / "out") == {".lock", "latest.json", before.name}
    assert latest(tmp_path / "out") == before


def test_checkpoint_with_metadata_that_is_not_finite_is_refused(write: Write) -> None:
    with pytest.raises(CheckpointRejected, match="optimizer_metadata or facts"):
        write(2, facts={"loss": float("nan")})


def test_checkpoint_without_tokenizer_says_where_it_looked(write: Write, tmp_path: Path) -> None:
    with pytest.raises(CalmRayError, match="empty: no tokenizer there"):
        write(1, tokenizer_dir=tmp_path / "empty")


def test_prune_keeps_the_newest_and_only_whole_ones_count(write: Write, tmp_path: Path) -> None:
    for epoch in (10, 20, 30, 40):
        write(epoch, keep_last=2)
    (tmp_path / "out" / "epoch-00000040" / "model.safetensors").unlink()
    write(50, keep_last=2)
    assert names(tmp_path / "out") == {
        ".lock", "latest.json", "epoch-00000030", "epoch-00000040", "epoch-00000050",
    }  # fmt: skip
    write(60, keep_last=1)
    assert names(tmp_path / "out") == {".lock", "latest.json", "epoch-00000060"}


def test_prune_keeps_what_was_just_written_even_if_it_is_old(write: Write, tmp_path: Path) -> None:
    write(60)
    old = write(40, keep_last=1)
    assert old.exists()
    assert json.loads((tmp_path / "out" / "latest.json").read_bytes())["epoch"] == 60


def test_prune_leaves_alone_what_is_not_ours(write: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "epoch-notes").mkdir(parents=True)
    (out / "epoch-00000001.txt").write_text("mine")
    for epoch in (2, 3):
        write(epoch, keep_last=1)
    assert names(out) == {".lock", "latest.json", "epoch-notes", "epoch-00000001.txt", "epoch-00000003"}


def test_checkpoint_of_the_same_epoch_replaces_the_one_there(write: Write, tmp_path: Path) -> None:
    write(7)
    (tmp_path / "out" / "epoch-00000007" / "model.safetensors").write_bytes(b"damaged")
    folder = write(7, facts={"try": 2})
    assert read_checkpoint(folder).facts == {"try": 2}
    assert names(tmp_path / "out") == {".lock", "latest.json", folder.name}


def test_checkpoint_into_another_runs_folder_is_refused(write: Write, tmp_path: Path) -> None:
    before = write(7)
    with pytest.raises(CalmRayError, match=r"out: holds checkpoints of run 'demo', this is run 'other'"):
        write(8, run_id="other", keep_last=1)
    assert latest(tmp_path / "out") == before


def test_checkpoint_while_another_is_being_written_is_refused(write: Write, tmp_path: Path) -> None:
    write(1)
    with only_writer(tmp_path / "out"), pytest.raises(CalmRayError, match="another process is writing here"):
        write(2)
    write(2)


def test_checkpoint_that_needs_more_than_the_disk_has_writes_nothing(write: Write, tmp_path: Path) -> None:
    before = write(1)
    huge = torch.zeros(1).expand(10**14)  # 400 TB that take four bytes
    with pytest.raises(CalmRayError, match=r"out: no room for a checkpoint, which needs 400,000,00\d MB.*Free some"):
        write(2, named_parameters={"huge": huge})
    assert names(tmp_path / "out") == {".lock", "latest.json", before.name}


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let a file grow beyond this, in the middle of a write: as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("which", ["named_parameters", "facts"], ids=["tensors", "json"])
def test_checkpoint_when_the_disk_fills_in_the_middle_keeps_the_one_before(
    write: Write, tmp_path: Path, which: str
) -> None:
    before = write(1)
    large = {"large": torch.zeros(100_000)} if which == "named_parameters" else {"large": "x" * 400_000}
    with file_size_limit(65_536), pytest.raises(CalmRayError, match="no room for a checkpoint, which needs 1 MB"):
        write(2, **{which: large})
    assert names(tmp_path / "out") == {".lock", "latest.json", before.name}
    assert latest(tmp_path / "out") == before
    verify_checkpoint(write(2, **{which: large}))


def test_checkpoint_where_no_folder_can_be_made_says_where(write: Write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CalmRayError, match=r"file/out: checkpoint not written.*the one before is kept"):
        write(1, out_dir=tmp_path / "file" / "out")


@pytest.mark.parametrize("changes", [{"epoch": -1}, {"keep_last": 0}, {"named_parameters": {}}])
def test_checkpoint_of_nonsense_is_our_own_mistake(write: Write, changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="a checkpoint has"):
        write(**({"epoch": 1} | changes))
