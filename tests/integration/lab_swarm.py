"""Small swarms of real processes for the tests of rounds: a tiny language model, epochs of about a second.

What the peers did is read from their journals afterwards. The machine may be busy: nothing here depends on speed except
how long a test takes.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.swarm_lab import Lab, PeerProcess
from benchmarks.swarm_spec import ProcessSpec
from calm_ray.tables import AveragingTable

START_SECONDS = 120.0
EPOCH_SECONDS = 15.0
"""Given up after this long per epoch; about one is needed."""
MICRO_BATCH_SIZE = 16
TARGET_BATCH_SIZE = 256
PAUSE_SECONDS = 0.1
"""After each micro-batch: a trainer makes 16 samples in it, so three trainers and an epoch take about a second."""


@dataclass(kw_only=True)
class SmallSwarm:
    """One run: an auxiliary peer, whose address all others join by, and trainers."""

    lab: Lab
    folder: Path
    averaging: AveragingTable
    num_epochs: int = 10**9
    target_batch_size: int = TARGET_BATCH_SIZE
    model_seed: int = 0
    first_seed: int = 1
    run_id: str = field(default_factory=lambda: f"lab-{uuid.uuid4().hex[:12]}")
    peers: dict[str, PeerProcess] = field(default_factory=dict)
    addresses: tuple[str, ...] = ()

    def start(self, name: str, *, env: Mapping[str, str] | None = None, **spec: Any) -> PeerProcess:
        """Start a peer, with a fresh interpreter if it needs another environment. The first one takes no address."""
        values = {
            "averaging": self.averaging, "target_batch_size": self.target_batch_size, "num_epochs": self.num_epochs,
            "micro_batch_size": MICRO_BATCH_SIZE, "pause_seconds": PAUSE_SECONDS, "model_seed": self.model_seed,
            "should_watch": True, "should_log_batches": True, **spec,
        }  # fmt: skip
        filled = ProcessSpec(
            name=name, folder=self.folder / name, run_id=self.run_id, initial_peers=self.addresses, **values
        )
        peer = self.lab.fork(filled) if env is None else self.lab.start(filled, env=env)
        self.peers[name] = peer
        return peer

    def start_all(self, num_trainers: int, **each: Mapping[str, Any]) -> None:
        """Start the auxiliary peer and the trainers "t0", "t1" ..., and let all begin at once. See `prepare`."""
        self.prepare(num_trainers, **each)
        self.begin()

    def prepare(self, num_trainers: int, **each: Mapping[str, Any]) -> None:
        """Have everybody wait for `begin`. `each`: more fields of a peer's spec by its name, and `env`."""
        auxiliary = self.start("aux", role="auxiliary", **each.get("aux", {}))
        ready = auxiliary.wait_for("ready", timeout_seconds=START_SECONDS)
        self.addresses = tuple(ready["addresses"])
        for index in range(num_trainers):
            name = f"t{index}"
            self.start(name, seed=self.first_seed + index, gate=self._gate, **each.get(name, {}))
        for peer in self.trainers():
            peer.wait_for("ready", timeout_seconds=START_SECONDS)

    def begin(self) -> None:
        self._gate.touch()

    @property
    def _gate(self) -> Path:
        return self.folder / "gate"

    def restart(self, name: str) -> PeerProcess:
        """Start a peer that has ended once more, with its identity; it has no parameters and other data."""
        spec = self.peers[name].spec
        again = spec.model_copy(update={"seed": spec.seed + 1000, "gate": None})
        self.peers[name] = self.lab.fork(again)
        return self.peers[name]

    def trainers(self) -> list[PeerProcess]:
        return [peer for peer in self.peers.values() if peer.spec.role != "auxiliary"]

    def wait_for_end(self, names: Sequence[str] | None = None) -> None:
        """Until the named trainers (None: all) have reached the last epoch."""
        for peer in self.trainers() if names is None else [self.peers[name] for name in names]:
            peer.wait_for("end", timeout_seconds=START_SECONDS + EPOCH_SECONDS * self.num_epochs)

    def wait_for_epoch(self, name: str, epoch: int) -> None:
        self.peers[name].wait_for(
            "boundary", lambda event: event["epoch"] >= epoch, timeout_seconds=START_SECONDS + EPOCH_SECONDS * epoch
        )
