"""A whole swarm of real processes: training, a late joiner, a client, a checkpoint, leaving; and equal parameters."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AlbertForPreTraining, AutoTokenizer

from calm_ray.checkpoint.verify import verify_checkpoint
from calm_ray.peers.spec import CheckpointSpec
from calm_ray.peers.status import PeerStatus
from calm_ray.swarm.node import NodeOptions, Swarm
from calm_ray.swarm.state import download_state
from tests.integration.runs import TinySwarm, tiny_swarm

NUM_EPOCHS = 40
STEADY = {"target_batch_size": 6000, "micro_batch_size": 24}
"""A second or two of computing per epoch, so that forty of them outlast the start of two newcomers."""
EPOCH_SECONDS = 40.0
"""Far more than the three or four that an epoch takes here: CI's two cores may be busy."""
GONE_SECONDS = 5.0
"""Less than a report lives, 10 s."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinySwarm]:
    """Two trainers start; at epoch 3 a full peer and a client join; all wait at the last epoch."""
    folder = tmp_path_factory.mktemp("swarm")
    with tiny_swarm(folder, num_epochs=NUM_EPOCHS, **STEADY) as swarm:
        spec = CheckpointSpec(folder=folder / "checkpoints", every_epochs=5, keep_last=2)
        swarm.start("monitor", role="monitor", reach="public", checkpoints=spec)
        for name in ("first", "second"):
            swarm.start(name, role="trainer", reach="public")
        swarm.wait_for_epoch("first", 3, 4 * EPOCH_SECONDS)
        swarm.start("late", role="trainer", reach="auto")
        swarm.start("client", role="trainer", reach="client")
        yield swarm


def _joined_at(log: str) -> int:
    """Epoch whose state a newcomer asked for, by its own words in the log of its rounds."""
    first = next(line for line in log.splitlines() if "round epoch=" in line)
    return int(first.split("round epoch=")[1].split()[0])


@pytest.mark.timeout(400)
def test_late_joiner_is_in_step_within_two_epochs(finished: TinySwarm) -> None:
    status = finished.wait("late", lambda s: s.state == "training" and s.report is not None, 3 * EPOCH_SECONDS)
    assert status.report is not None
    epoch_at_joining = finished.handles["first"].status().report.epoch  # type: ignore[union-attr]
    finished.wait("late", lambda s: bool(s.report and s.report.rounds.averaged), 3 * EPOCH_SECONDS)
    assert _joined_at(finished.log("late")) <= epoch_at_joining + 2


@pytest.mark.timeout(400)
def test_peer_that_was_dialled_back_is_a_full_peer(finished: TinySwarm) -> None:
    assert not finished.handles["late"].status().is_client_mode


@pytest.mark.timeout(400)
def test_client_mode_trainer_contributes(finished: TinySwarm) -> None:
    status = finished.wait("client", lambda s: bool(s.report and s.report.samples_contributed), 5 * EPOCH_SECONDS)
    assert status.is_client_mode and status.report is not None
    assert status.report.last_group_size >= 2


@pytest.mark.timeout(400)
def test_monitor_counts_everyone_and_writes_a_checkpoint_that_loads(finished: TinySwarm) -> None:
    status = finished.wait(
        "monitor", lambda s: s.last_checkpoint.endswith(f"{NUM_EPOCHS:08d}"), NUM_EPOCHS * EPOCH_SECONDS
    )
    summary = status.summary
    assert summary is not None
    assert summary.peers_by_role["trainer"] == 4
    assert not summary.dropped
    checkpoint = Path(status.last_checkpoint)
    verify_checkpoint(checkpoint)
    loaded: Any = AlbertForPreTraining.from_pretrained(checkpoint, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = tokenizer("a swarm", "trains", return_tensors="pt", return_token_type_ids=True)
    assert torch.isfinite(model(**tokens).prediction_logits).all()


@pytest.mark.timeout(400)
def test_trainer_that_leaves_withdraws_its_report(finished: TinySwarm) -> None:
    handle = finished.start("goer", role="trainer", reach="public", wait_for="waiting")  # the run is over
    peer_id = handle.status().peer_id

    def is_listed(status: PeerStatus) -> bool:
        return status.summary is not None and peer_id in {peer.peer_id for peer in status.summary.peers}

    finished.wait("monitor", is_listed, 30)
    del finished.handles["goer"]
    assert handle.stop() == 0
    finished.wait("monitor", lambda status: not is_listed(status), GONE_SECONDS)


def test_every_peer_leaves_within_ten_seconds_and_leaves_nothing(finished: TinySwarm) -> None:
    """Last of those that share the swarm: it ends it."""
    trees = {
        name: [psutil.Process(handle.pid), *psutil.Process(handle.pid).children(recursive=True)]
        for name, handle in finished.handles.items()
    }
    for name, handle in finished.handles.items():
        started = time.monotonic()
        assert handle.stop() == 0, finished.log(name)[-2000:]
        assert time.monotonic() - started < 10
    # torch_shm_manager is a daemon of torch's own; it ends by itself when the last tensor is let go.
    _, left = psutil.wait_procs([p for tree in trees.values() for p in tree], timeout=5)
    assert not left


@pytest.mark.timeout(300)
def test_two_trainers_differ_by_at_most_1e_6_at_an_epoch_boundary(tmp_path: Path) -> None:
    num_epochs = 4
    with tiny_swarm(tmp_path, run_id="equal", num_epochs=num_epochs, **STEADY) as swarm:
        for name in ("first", "second"):
            swarm.start(name, role="trainer", reach="public")
        for name in ("first", "second"):
            swarm.wait(name, lambda s: s.state == "waiting", num_epochs * EPOCH_SECONDS)
        options = NodeOptions(is_client_mode=True, listen="/ip4/127.0.0.1/tcp/0", identity_path=tmp_path / "id")
        boot = swarm.handles["auxiliary"].status().addresses
        reader = Swarm.join("equal", initial_peers=boot, options=options)
        try:
            first, second = (
                download_state(
                    reader, min_epoch=num_epochs, max_bytes=1 << 26, timeout_seconds=30,
                    only_from=swarm.handles[name].status().peer_id,
                )
                for name in ("first", "second")
            )  # fmt: skip
        finally:
            reader.close()
    assert first.epoch == second.epoch == num_epochs
    num_parameters = len(first.tensors) // 4  # AdamW: parameter, step, two moments
    for a, b in zip(first.tensors[:num_parameters], second.tensors[:num_parameters], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.timeout(200)
def test_peer_with_more_samples_than_anybody_believes_counts_for_fewer(tmp_path: Path) -> None:
    """A micro-batch of five target batches, as after rounds that failed for long; four is what reducers believe."""
    with tiny_swarm(tmp_path, run_id="many", target_batch_size=16, micro_batch_size=80) as swarm:
        swarm.start("only", role="trainer", reach="public")
        status = swarm.wait("only", lambda s: s.report and s.report.rounds.averaged >= 3, 2 * EPOCH_SECONDS)
        assert status.report is not None and status.report.last_round is not None
        assert status.report.rounds.non_finite == 0
        assert status.report.last_round.total_weight == 64
