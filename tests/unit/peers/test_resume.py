"""A cold start from a checkpoint: the same bits and the right rate go on, and what does not fit is refused in words."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calm_ray.checkpoint.write import write_checkpoint
from calm_ray.config import RunTable, parse_table
from calm_ray.errors import CalmRayError, CheckpointRejected, ConfigError, StateUnavailable
from calm_ray.peers.auxiliary import _take_up_state
from calm_ray.peers.learner import make_learner
from calm_ray.peers.resume import find_checkpoint, held_state, saved_state
from calm_ray.peers.spec import PeerSpec
from calm_ray.swarm.holder import HeldState, StateHolder
from calm_ray.training.model import build_model, parameter_names
from calm_ray.training.optim import learning_rate_at
from calm_ray.training.prepare import load_bundle_model_config, write_parts

RUN = RunTable.model_validate(
    {
        "run_id": "tiny", "num_epochs": 10, "target_batch_size": 64,
        "model": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
        "tokenizer": {"source": "train", "vocab_size": 300},
        "data": {"sources": [{"kind": "builtin"}], "sequence_length": 32},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2, "warmup_epochs": 4, "decay_epochs": 10},
    }
)  # fmt: skip
NUM_STEPS = 3


def _changed(run: RunTable, table: str, **changes: Any) -> RunTable:
    return RunTable.model_validate(run.model_dump() | {table: getattr(run, table).model_dump() | changes})


LAMB = _changed(RUN, "optimizer", name="lamb")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    write_parts(RUN, config_dir=folder, out_dir=folder)
    return folder


def _holder(run: RunTable, bundle: Path) -> StateHolder:
    learner = make_learner(run, bundle, device="cpu")
    return StateHolder(learner.param_groups, rules=learner.rules, should_offload=True)


def _names(bundle: Path) -> list[str]:
    return parameter_names(build_model(load_bundle_model_config(bundle), seed=0))


def _step(holder: StateHolder) -> None:
    generator = torch.Generator().manual_seed(holder.epoch)
    holder.step(torch.randn(holder.num_elements, generator=generator))


def _write(
    out: Path, bundle: Path, *, run: RunTable = RUN, num_steps: int = NUM_STEPS, **changes: Any
) -> tuple[Path, StateHolder]:
    """A checkpoint after some steps, arranged as the monitor does, and the holder that took them."""
    holder, names = _holder(run, bundle), _names(bundle)
    for _ in range(num_steps):
        _step(holder)
    state = holder.snapshot()
    values: dict[str, Any] = {
        "epoch": state.epoch, "run_id": run.run_id, "config_hash": run.config_hash(),
        "named_parameters": dict(zip(names, state.tensors, strict=False)),
        "optimizer_tensors": state.tensors[len(names) :], "optimizer_metadata": state.optimizer_metadata,
        "model_config": load_bundle_model_config(bundle).to_dict(), "tokenizer_dir": bundle / "tokenizer",
        "keep_last": 9, "facts": {"schedule": run.optimizer.model_dump(mode="json")},
    }  # fmt: skip
    return write_checkpoint(out, **(values | changes)), holder


def _saved(path: Path, bundle: Path, run: RunTable = RUN) -> HeldState | None:
    return saved_state(path, run=run, bundle=bundle, names=_names(bundle))


def _rate(holder: StateHolder) -> float:
    return float(holder.optimizer.param_groups[0]["lr"])


# --- what goes on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [RUN, LAMB], ids=["adamw", "lamb"])
def test_checkpoint_goes_on_with_the_same_bits_epoch_and_rate(tmp_path: Path, bundle: Path, run: RunTable) -> None:
    folder, before = _write(tmp_path, bundle, run=run)
    after = _holder(run, bundle)
    state = _saved(folder, bundle, run)
    assert state is not None
    after.load(state)
    assert after.epoch == NUM_STEPS
    assert _rate(after) == pytest.approx(learning_rate_at(NUM_STEPS, table=run.optimizer))
    for _ in range(3):  # past the end of the warm-up
        _step(before)
        _step(after)
        ours, theirs = before.snapshot(), after.snapshot()
        assert all(torch.equal(a, b) for a, b in zip(ours.tensors, theirs.tensors, strict=True))
        assert _rate(before) == _rate(after)


def test_longer_run_with_another_rate_goes_on_with_the_rate_of_now(tmp_path: Path, bundle: Path) -> None:
    folder, _ = _write(tmp_path, bundle)
    run = _changed(RUN, "optimizer", learning_rate=3e-2, warmup_epochs=0, decay_epochs=100)
    run = run.model_copy(update={"num_epochs": 100, "target_batch_size": 128})
    holder = _holder(run, bundle)
    state = _saved(folder, bundle, run)
    assert state is not None
    holder.load(state)
    assert holder.epoch == NUM_STEPS
    assert _rate(holder) == pytest.approx(learning_rate_at(NUM_STEPS, table=run.optimizer))


def test_newest_that_verifies_of_several_is_taken(tmp_path: Path, bundle: Path) -> None:
    paths = [_write(tmp_path, bundle, num_steps=number)[0] for number in (1, 2, 3)]
    assert find_checkpoint(tmp_path).epoch == 3
    _damage(paths[2])
    assert find_checkpoint(tmp_path).epoch == 2
    assert find_checkpoint(paths[0]).epoch == 1


def test_checkpoint_of_epoch_0_is_nothing_to_go_on_from(tmp_path: Path, bundle: Path) -> None:
    folder, _ = _write(tmp_path, bundle, num_steps=0, optimizer_tensors=[], optimizer_metadata=[], facts=None)
    assert _saved(folder, bundle) is None


# --- what is refused -------------------------------------------------------------------------------------------------


def _damage(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_altered_checkpoint_is_refused_alone_and_as_the_only_one(tmp_path: Path, bundle: Path) -> None:
    folder, _ = _write(tmp_path, bundle)
    _damage(folder)
    for path in (folder, tmp_path):
        with pytest.raises(CheckpointRejected, match="altered since it was written"):
            _saved(path, bundle)


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_folder_without_checkpoints_is_told_apart_from_a_damaged_one(tmp_path: Path, bundle: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no checkpoint there"):
        _saved(tmp_path / name, bundle)


@pytest.mark.parametrize(
    ("run", "changes", "match"),
    [
        (RUN.model_copy(update={"run_id": "other"}), {}, "a checkpoint of run 'tiny', this is run 'other'"),
        (LAMB, {}, "was trained with the optimizer adamw, this run has lamb"),
        (RUN, {"model_config": {"num_attention_heads": 4}}, "model's shape is fixed"),
        (RUN, {"named_parameters": {"x": torch.zeros(1)}}, r"lacks parameter albert|has an unknown parameter"),
        (RUN, {"optimizer_metadata": {"lr": 1}}, "metadata is not what a swarm writes"),
    ],
    ids=["run", "optimizer", "model", "parameters", "metadata"],
)
def test_checkpoint_of_something_else_is_refused_in_words(
    tmp_path: Path, bundle: Path, run: RunTable, changes: dict[str, Any], match: str
) -> None:
    if "model_config" in changes:
        changes = {"model_config": load_bundle_model_config(bundle).to_dict() | changes["model_config"]}
    folder, _ = _write(tmp_path, bundle, **changes)
    with pytest.raises(CalmRayError, match=match):
        _saved(folder, bundle, run)


def test_tokenizer_made_anew_is_refused_even_with_the_same_settings(tmp_path: Path, bundle: Path) -> None:
    folder, _ = _write(tmp_path / "checkpoints", bundle)
    other = tmp_path / "bundle"
    shutil.copytree(bundle, other)
    path = other / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"\u2581the"', '"\u2581thy"'))
    with pytest.raises(ConfigError, match="its embeddings would mean other words"):
        _saved(folder, other)


def test_optimizer_state_of_another_kind_does_not_load(tmp_path: Path, bundle: Path) -> None:
    """Where the checkpoint does not name its optimizer, the state itself tells."""
    folder, _ = _write(tmp_path, bundle, run=LAMB, facts=None)
    state = held_state(find_checkpoint(folder), names=_names(bundle))
    with pytest.raises(ValueError, match="do not fit"):
        _holder(RUN, bundle).load(state)


def test_only_auxiliary_peers_resume(tmp_path: Path) -> None:
    values = {"role": "trainer", "folder": tmp_path, "invite": "calm1-x", "resume": tmp_path}
    with pytest.raises(ConfigError, match="only an auxiliary peer can resume"):
        parse_table(PeerSpec, values, where="calm-ray peer")


# --- the swarm first -------------------------------------------------------------------------------------------------


class _FakeOptimizer:
    """A swarm at some epoch, whose state comes or does not."""

    def __init__(self, *, swarm_epoch: int, does_answer: bool = True) -> None:
        self.swarm_epoch, self._does_answer = swarm_epoch, does_answer
        self.local_epoch, self.source, self.has_asked = 0, "", False

    def wait_for_swarm(self, *, timeout_seconds: float) -> None:
        self.has_asked = True

    def load_state_from_peers(self) -> None:
        if not self._does_answer:
            raise StateUnavailable("nobody")
        self.local_epoch, self.source = self.swarm_epoch, "swarm"

    def load_state(self, state: HeldState) -> None:
        self.local_epoch, self.source = state.epoch, "checkpoint"


@pytest.fixture
def take_up(tmp_path: Path, bundle: Path) -> Callable[..., _FakeOptimizer]:
    """take_up(optimizer, should_resume=True, is_first=False): what an auxiliary peer does at its start."""

    def take_up(optimizer: _FakeOptimizer, *, should_resume: bool = True, is_first: bool = False) -> _FakeOptimizer:
        folder = _write(tmp_path, bundle)[0] if should_resume else None
        spec = PeerSpec(role="auxiliary", folder=tmp_path, invite="calm1-x", resume=folder)
        context: Any = SimpleNamespace(spec=spec, run=RUN, bundle=bundle, tell=lambda *args: None, is_first=is_first)
        fake: Any = optimizer
        _take_up_state(context, fake, names=_names(bundle))
        assert optimizer.has_asked is not is_first
        return optimizer

    return take_up


@pytest.mark.parametrize(
    ("swarm_epoch", "source"), [(0, "checkpoint"), (NUM_STEPS - 1, "checkpoint"), (NUM_STEPS, "swarm"), (9, "swarm")]
)
def test_newer_of_swarm_and_checkpoint_is_taken(take_up: Any, swarm_epoch: int, source: str) -> None:
    found = take_up(_FakeOptimizer(swarm_epoch=swarm_epoch))
    assert (found.source, found.local_epoch) == (source, max(swarm_epoch, NUM_STEPS))


def test_checkpoint_serves_when_nobody_gives_what_is_claimed(take_up: Any) -> None:
    assert take_up(_FakeOptimizer(swarm_epoch=9, does_answer=False)).source == "checkpoint"
    with pytest.raises(StateUnavailable):
        take_up(_FakeOptimizer(swarm_epoch=9, does_answer=False), should_resume=False)


def test_first_peer_of_a_run_asks_nobody(take_up: Any) -> None:
    assert take_up(_FakeOptimizer(swarm_epoch=0), is_first=True).source == "checkpoint"
    assert take_up(_FakeOptimizer(swarm_epoch=0), should_resume=False, is_first=True).source == ""


def test_swarm_at_its_beginning_needs_no_state(take_up: Any) -> None:
    assert take_up(_FakeOptimizer(swarm_epoch=0), should_resume=False).source == ""
