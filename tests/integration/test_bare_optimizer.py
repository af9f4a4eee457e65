"""`wire = "hivemind-1.1"`: a bare `hivemind.Optimizer` and two of our peers train one model."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.eventually import Child, Children, eventually
from tests.integration.stock import Bare, start_bare
from tests.shards import ROOT

pytestmark = [pytest.mark.slow(shard=1), pytest.mark.timeout(400)]

NUM_OURS = 2
TARGET_BATCH_SIZE = 1500
"""Some seconds of computing for three: bare peers look for their groups ahead, and cannot in less."""
EPOCH_SECONDS = 20.0
START_SECONDS = 90.0

READER = """
import sys, hivemind
from hivemind.dht.crypto import RSASignatureValidator
dht = hivemind.DHT(
    initial_peers=[sys.argv[1]], client_mode=True, start=True, record_validators=[RSASignatureValidator()]
)
found = dht.get(sys.argv[2] + "_progress", latest=True)
for entry in found.value.values():
    print("progress", entry.value["epoch"], entry.value["samples_accumulated"], entry.value["samples_per_second"])
print("done", flush=True)
dht.shutdown()
"""
"""All that a stranger needs to know how a run is doing. Progress is signed, by hivemind's trackers as by ours."""


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """A bare optimizer and ours, that begin together."""

    folder: Path
    children: Children
    bare: Bare
    ours: list[Child]
    num_epochs: int

    def rounds(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / str(number) / "rounds.json").read_text())
        return found

    def parameters(self, number: int) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = torch.load(self.folder / str(number) / "peer.pt")
        return found


def start_mixed(folder: Path, children: Children, *, num_epochs: int, **options: Any) -> Mixed:
    gate = folder / "gate"
    bare = start_bare(
        children, folder / "bare", run_id="mixed", epochs=num_epochs, target_batch_size=TARGET_BATCH_SIZE, gate=gate,
        optimizer="adamw", **options,
    )  # fmt: skip
    ours = []
    for number in range(NUM_OURS):
        own = folder / str(number)
        own.mkdir()
        argv: list[str | Path] = [sys.executable, "-W", "ignore", "-m", "tests.integration.stock_ours", own, "mixed"]
        seed = str(100 + number)
        ours.append(
            children.start([*argv, str(num_epochs), str(TARGET_BATCH_SIZE), seed, gate, bare.addresses[0]], cwd=ROOT)
        )
    for number, child in enumerate(ours):
        eventually((folder / str(number) / "ready").exists, START_SECONDS, child.tail)
    gate.touch()
    return Mixed(folder=folder, children=children, bare=bare, ours=ours, num_epochs=num_epochs)


@pytest.fixture
def started(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Mixed]:
    with Children(tmp_path) as children:
        yield start_mixed(tmp_path, children, **request.param)


@pytest.mark.parametrize(
    "started",
    [{"num_epochs": 10}, {"num_epochs": 3, "no_offload": True}],
    ids=["ten-epochs", "without-offloading"],
    indirect=True,
)
def test_bare_optimizer_and_two_of_ours_stay_together(started: Mixed) -> None:
    """Which needs hivemind's prefixes, class names and hash of the tensors, its weights, and the same steps."""
    mixed = started
    reader: Child | None = None
    if mixed.num_epochs > 3:
        mixed.bare.wait_for_epoch(2, START_SECONDS)
        reader = mixed.children.start(
            [sys.executable, "-W", "ignore", "-c", READER, mixed.bare.addresses[0], "mixed"], cwd=ROOT
        )
    for child in mixed.ours:
        assert child.wait(START_SECONDS + EPOCH_SECONDS * mixed.num_epochs) == 0, child.tail()
    mixed.bare.wait_for_epoch(mixed.num_epochs, START_SECONDS)

    told = [mixed.rounds(number) for number in range(NUM_OURS)]
    assert [each["num_resyncs"] for each in told] == [0] * NUM_OURS
    whole = {
        r["epoch"]
        for r in told[0]["rounds"]
        if r["is_true"] and r["group_size"] == NUM_OURS + 1 and (not r["weights"] or mixed.bare.peer_id in r["weights"])
    }
    assert len(whole) >= 0.8 * mixed.num_epochs, (told, mixed.bare.logged("Averaged"))
    # A round in two groups leaves unlike moments behind; averaging the parameters keeps them near each other then.
    tolerance = 1e-5 if len(whole) == mixed.num_epochs else 0.05
    first, second = (mixed.parameters(number) for number in range(NUM_OURS))
    for epoch in range(1, mixed.num_epochs + 1):
        assert (first[epoch] - second[epoch]).abs().max() < tolerance
        assert (first[epoch] - mixed.bare.parameters(epoch)).abs().max() < tolerance
        assert (first[epoch] - first[epoch - 1]).abs().max() > 1e-4, "every epoch has a step"
    if reader is not None:
        assert reader.wait(60) == 0, reader.tail()
        progress = [line.split() for line in reader.output().splitlines() if line.startswith("progress")]
        assert len(progress) == NUM_OURS + 1
        assert max(int(epoch) for _, epoch, _, _ in progress) >= 1
