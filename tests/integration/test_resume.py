"""A swarm that loses its trainers, and one that loses everyone: real processes go on where the others ended."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from calm_ray.checkpoint.read import Checkpoint, read_checkpoint
from calm_ray.peers.resume import find_checkpoint
from calm_ray.peers.spec import CheckpointSpec
from calm_ray.swarm.node import NodeOptions, Swarm
from calm_ray.swarm.state import TrainingState, download_state
from calm_ray.training.optim import learning_rate_at
from tests.eventually import eventually
from tests.integration.runs import TinySwarm, tiny_swarm

EPOCH_SECONDS = 40.0
"""Far more than the two or three that an epoch takes here: CI's two cores may be busy."""
SETTINGS = {"target_batch_size": 3000, "micro_batch_size": 24, "compression": "fp16"}


class Reader:
    """A client that looks at the states of a swarm's peers."""

    def __init__(self, swarm: TinySwarm, node: Swarm) -> None:
        self._swarm, self._node = swarm, node

    def state_of(self, name: str) -> TrainingState:
        return download_state(
            self._node, min_epoch=0, max_bytes=1 << 26, timeout_seconds=30,
            only_from=self._swarm.handles[name].status().peer_id,
        )  # fmt: skip

    def same_epoch_of(self, one: str, other: str) -> tuple[TrainingState, TrainingState]:
        """Both states, of one epoch: asked again while the peers step in between."""
        return eventually(
            lambda: pair if (pair := (self.state_of(one), self.state_of(other)))[0].epoch == pair[1].epoch else None,
            EPOCH_SECONDS,
        )  # type: ignore[return-value]  # eventually returns what is true


@contextmanager
def reader_of(swarm: TinySwarm) -> Iterator[Reader]:
    options = NodeOptions(
        is_client_mode=True, listen="/ip4/127.0.0.1/tcp/0", identity_path=swarm.folder / "reader" / "id"
    )
    boot = swarm.handles["auxiliary"].status().addresses
    node = Swarm.join(swarm.config.run.run_id, initial_peers=boot, options=options)
    try:
        yield Reader(swarm, node)
    finally:
        node.close()


def assert_equal_states(one: TrainingState, other: TrainingState) -> None:
    """Parameters and the optimizer's tensors, bit for bit."""
    assert one.epoch == other.epoch
    assert len(one.tensors) == len(other.tensors)
    assert all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


def losses_in(log: str) -> dict[int, float]:
    """Epoch -> mean loss, as a trainer's log tells."""
    return {int(e): float(loss) for e, loss in re.findall(r" epoch=(\d+) samples=\d+ mlm_mean_loss=([\d.]+)", log)}


def first_round_in(log: str) -> int:
    found = re.search(r"round epoch=(\d+)", log)
    assert found, log[-2000:]
    return int(found[1])


def checkpoint_of(swarm: TinySwarm, *, min_epoch: int, timeout: float) -> Checkpoint:
    status = swarm.wait(
        "monitor", lambda s: s.last_checkpoint and int(s.last_checkpoint[-8:]) >= min_epoch, timeout
    )  # fmt: skip
    return read_checkpoint(Path(status.last_checkpoint))


@pytest.mark.slow(shard=1)
@pytest.mark.timeout(400)
def test_newcomer_goes_on_from_the_auxiliary_peer_when_all_trainers_have_left(tmp_path: Path) -> None:
    with tiny_swarm(tmp_path, **SETTINGS) as swarm:
        for name in ("first", "second"):
            swarm.start(name, role="trainer", reach="public")
        swarm.wait_for_epoch("auxiliary", 3, 4 * EPOCH_SECONDS)
        with reader_of(swarm) as reader:
            assert_equal_states(*reader.same_epoch_of("auxiliary", "first"))
            for name in ("first", "second"):
                assert swarm.handles[name].stop() == 0
            auxiliary = swarm.handles["auxiliary"].status().peer_id
            kept = reader.state_of("auxiliary")

            spec = CheckpointSpec(folder=tmp_path / "checkpoints", every_epochs=1, keep_last=1)
            swarm.start("monitor", role="monitor", reach="public", checkpoints=spec)
            written = checkpoint_of(swarm, min_epoch=kept.epoch, timeout=EPOCH_SECONDS)
            assert written.epoch == kept.epoch, "without trainers there is no step"
            assert written.facts["donor"] == auxiliary

            swarm.start("late", role="trainer", reach="public")
            swarm.wait_for_epoch("late", kept.epoch + 2, 3 * EPOCH_SECONDS)
            log = swarm.log("late")
            assert f"state downloaded epoch={kept.epoch} donor={auxiliary}" in log
            assert first_round_in(log) == kept.epoch
            assert_equal_states(*reader.same_epoch_of("auxiliary", "late"))
        losses = losses_in(swarm.log("first"))
        assert losses_in(log)[kept.epoch] == pytest.approx(losses[max(losses)], abs=0.2)


@pytest.mark.slow(shard=1)
@pytest.mark.timeout(400)
def test_swarm_that_was_killed_whole_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    spec = CheckpointSpec(folder=tmp_path / "checkpoints", every_epochs=5, keep_last=2)
    with tiny_swarm(tmp_path, **SETTINGS) as swarm:
        swarm.start("monitor", role="monitor", reach="public", checkpoints=spec)
        for name in ("first", "second"):
            swarm.start(name, role="trainer", reach="public")
        written = checkpoint_of(swarm, min_epoch=5, timeout=7 * EPOCH_SECONDS)
        swarm.wait("first", lambda _: written.epoch in losses_in(swarm.log("first")), 2 * EPOCH_SECONDS)
        swarm.kill_all()
        before = losses_in(swarm.log("first"))
        saved = find_checkpoint(spec.folder)  # one more may have been written meanwhile

        swarm.start_first(resume=spec.folder)
        assert f"checkpoint={saved.folder}" in swarm.log("auxiliary")
        with reader_of(swarm) as reader:
            state = reader.state_of("auxiliary")
            assert state.epoch == saved.epoch
            tensors = [*saved.optimizer_tensors.values()]
            assert all(torch.equal(a, b) for a, b in zip(state.tensors[-len(tensors) :], tensors, strict=True))
            rate = learning_rate_at(saved.epoch, table=swarm.config.run.optimizer)
            assert any(entry.get("value") == pytest.approx(rate) for entry in state.optimizer_metadata)

            swarm.start("third", role="trainer", reach="public")  # a log of its own
            swarm.start("second", role="trainer", reach="public")
            swarm.wait_for_epoch("third", saved.epoch + 2, 4 * EPOCH_SECONDS)
            assert first_round_in(swarm.log("third")) == saved.epoch
            assert_equal_states(*reader.same_epoch_of("auxiliary", "third"))
        after = losses_in(swarm.log("third"))
        print(f"before={before} after={after}")
        last = before[min(saved.epoch, max(before))]
        assert before[0] - last > 0.5, "it has learned something that could be lost"
        assert after[saved.epoch] == pytest.approx(last, abs=0.15)
