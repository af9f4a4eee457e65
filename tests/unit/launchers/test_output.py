"""The run's output folder: progress is never thrown away without a word, and a run that goes on finds its own."""

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest

from calm_ray.bundle import open_bundle
from calm_ray.checkpoint.read import read_checkpoint
from calm_ray.checkpoint.write import write_checkpoint
from calm_ray.errors import CheckpointRejected, ConfigError
from launchers import output
from launchers.begin import Found
from launchers.output import (
    BUNDLE,
    CHECKPOINTS,
    KEY,
    PEERS,
    end_peers,
    lock_output,
    newest_epoch,
    set_aside,
    survey,
)
from launchers.prepare import prepare
from tests.integration.runs import write_config

# --- who may have the folder -----------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder in which a run has come to epoch 20."""
    folder = tmp_path / "out"
    for name in ("epoch-00000000", "epoch-00000020"):
        (folder / CHECKPOINTS / name).mkdir(parents=True)
    return folder


def test_one_job_at_a_time(out: Path) -> None:
    with lock_output(out), pytest.raises(ConfigError, match="another job is writing there"), lock_output(out):
        pass
    with lock_output(out):
        pass


def test_fresh_start_moves_what_was_there_aside(out: Path) -> None:
    moved_to = set_aside(out)
    assert list(out.iterdir()) == []
    assert moved_to == out.with_name("out.previous")
    assert newest_epoch(moved_to) == 20


def test_progress_that_was_set_aside_is_not_replaced_by_nothing(out: Path) -> None:
    moved_to = set_aside(out)
    (out / CHECKPOINTS / "epoch-00000000").mkdir(parents=True)
    assert set_aside(out) is None
    assert list(out.iterdir()) == []
    assert moved_to is not None and newest_epoch(moved_to) == 20


def test_folder_of_a_peer_that_lives_is_not_set_aside(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "LEAVE_SECONDS", 0.3)
    path = out / PEERS / "trainer-0" / "lock"
    path.parent.mkdir(parents=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="a peer of an earlier job still runs there"):
            set_aside(out)
        assert [line.split(" ")[0] for line in end_peers(out)] == [str(path.parent)]
    assert end_peers(out) == []
    assert survey(out).newest_epoch == 20
    assert survey(out).live == {}


def test_survey_of_no_folder_finds_nothing(tmp_path: Path) -> None:
    assert survey(tmp_path / "none") == Found()


# --- what a run goes on with -----------------------------------------------------------------------------------------

Prepare = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Prepare:
    """make(should_resume=..., **values of the config): prepare tmp_path/out."""

    def make(*, should_resume: bool = False, **values: int) -> Path:
        config = write_config(tmp_path / "run.toml", **{"num_epochs": 30, **values})  # type: ignore[arg-type]
        return prepare(config, tmp_path / "out", should_resume=should_resume)

    return make


def _pretend_progress(initial: Path, *, epoch: int) -> Path:
    """Replace the initial checkpoint by the same one of `epoch`."""
    was = read_checkpoint(initial)
    return write_checkpoint(
        initial.parent, epoch=epoch, run_id=was.manifest.run_id, config_hash=was.manifest.config_hash,
        named_parameters=was.parameters, optimizer_tensors=[], optimizer_metadata=[], model_config=was.model_config,
        tokenizer_dir=initial, keep_last=1,
    )  # fmt: skip


def test_longer_run_goes_on_with_its_key_its_tokenizer_and_its_new_settings(make: Prepare, tmp_path: Path) -> None:
    saved = _pretend_progress(make(), epoch=20)
    out = tmp_path / "out"
    key, tokenizer = (out / KEY).read_bytes(), (out / BUNDLE / "tokenizer" / "tokenizer.json").read_bytes()
    assert make(should_resume=True, num_epochs=60) == saved
    assert (out / KEY).read_bytes() == key
    assert (out / BUNDLE / "tokenizer" / "tokenizer.json").read_bytes() == tokenizer
    assert open_bundle(out / BUNDLE)[1].num_epochs == 60
    assert not (out / CHECKPOINTS / "epoch-00000000").exists()


def test_run_that_has_ended_is_told_how_to_go_on(make: Prepare) -> None:
    _pretend_progress(make(), epoch=30)
    with pytest.raises(ConfigError, match="epoch 30 is the run's last: finished; --fresh begins anew, raise"):
        make(should_resume=True)


def test_resume_without_progress_begins_at_epoch_0(make: Prepare) -> None:
    for _ in range(2):
        assert read_checkpoint(make(should_resume=True)).epoch == 0


def test_resume_with_nothing_but_damaged_progress_is_refused(make: Prepare) -> None:
    saved = _pretend_progress(make(), epoch=20)
    (saved / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointRejected, match="none of 1 checkpoints verifies"):
        make(should_resume=True)
    make()
    with pytest.raises(CheckpointRejected, match="none after epoch 0 verifies"):
        make(should_resume=True)
