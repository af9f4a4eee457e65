"""The run that the benchmarks of faults hurt: its config, its bundle, and how fast its trainers are alone."""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.chaos_solo import solo_rates
from benchmarks.fault_bare_rig import BareRig
from benchmarks.fault_kinds import TRAINERS
from benchmarks.fault_rig import RUN_ID, OurRig
from benchmarks.stolen import Stolen
from launchers.output import BUNDLE
from tests.shards import ROOT

MICRO_BATCH_SIZE = 16
DUTY_CYCLE = 0.3
"""Of each trainer. In a real swarm each has a machine of its own; three that compute all the time take both cores of
a small one, and whatever else a peer does is taken from the others' computing: see docs/faults.md. Little enough that
two cores of which a host takes a quarter away still carry it."""
NUM_EPOCHS = 100_000
"""The benchmark says when it is enough."""
CONFIG = """
[run]
run_id = "{run_id}"
num_epochs = {num_epochs}
target_batch_size = {target_batch_size}
report_seconds = 5.0

[run.model]
hidden_size = 128
num_hidden_layers = 2
num_attention_heads = 4
intermediate_size = 512
embedding_size = 128
max_position_embeddings = 128

[run.tokenizer]
source = "train"
vocab_size = 2000

[run.data]
sequence_length = 64
shuffle_buffer = 2000
held_out_fraction = 0.2
sources = [{{ kind = "builtin" }}]

[run.optimizer]
name = "adamw"
learning_rate = 1e-3
decay_epochs = 1000

[run.averaging]
network = "lan"
compression = "fp16"

[peer]
device = "cpu"
num_threads = 1
micro_batch_size = {micro_batch_size}
duty_cycle = {duty_cycle}
listen = "/ip4/127.0.0.1/tcp/0"

[organiser.job]
num_trainers = 3
num_auxiliary = 2
num_monitors = 1
adoption_seconds = 120

[organiser.checkpoint]
every_epochs = 1000
keep_last = 2
"""
"""The model of runs/demo.toml."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What both swarms train."""

    folder: Path
    config: Path
    target_batch_size: int
    duty_cycle: float
    solo_rate: float
    """Samples per second of one trainer, mean of three that compute at once."""
    stolen: float = 0.0
    """Of the machine, by its host, during the last measurement."""

    @property
    def swarm_rate(self) -> float:
        return self.solo_rate * len(TRAINERS)

    @property
    def bundle(self) -> Path:
        return self.folder / "solo" / BUNDLE

    def measure_again(self, *, seconds: float) -> "Prepared":
        """With the solo rate as it is now: rented cores change their speed."""
        rate, stolen = _solo(self.bundle, seconds=seconds, duty_cycle=self.duty_cycle)
        return replace(self, solo_rate=rate, stolen=stolen)

    @property
    def stolen_words(self) -> str:
        return f" ({100 * self.stolen:.0f} % of the machine was taken away by its host)"

    def ours(self) -> OurRig:
        return OurRig(self.config, folder=self._new_folder("ours"))

    def stock(self) -> BareRig:
        return BareRig(
            self.bundle, folder=self._new_folder("stock"), target_batch_size=self.target_batch_size,
            micro_batch_size=MICRO_BATCH_SIZE, duty_cycle=self.duty_cycle,
        )  # fmt: skip

    def _new_folder(self, kind: str) -> Path:
        number = len(list(self.folder.glob(f"{kind}*")))
        folder = self.folder / (f"{kind}-{number}" if number else kind)
        folder.mkdir()
        return folder


def prepare(folder: Path, *, epoch_seconds: float, solo_seconds: float, duty_cycle: float = DUTY_CYCLE) -> Prepared:
    """Measure the trainers alone, and choose the target batch that takes them `epoch_seconds` undisturbed."""
    config = folder / "run.toml"
    _write(config, target_batch_size=1000, duty_cycle=duty_cycle)
    bundle = folder / "solo" / BUNDLE
    subprocess.run(
        [sys.executable, "-m", "launchers.prepare", config, bundle.parent], check=True, cwd=ROOT,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    rate, stolen = _solo(bundle, seconds=solo_seconds, duty_cycle=duty_cycle)
    target = int(rate * len(TRAINERS) * epoch_seconds) // MICRO_BATCH_SIZE * MICRO_BATCH_SIZE
    _write(config, target_batch_size=target, duty_cycle=duty_cycle)
    return Prepared(
        folder=folder, config=config, target_batch_size=target, duty_cycle=duty_cycle, solo_rate=rate, stolen=stolen
    )


def _solo(bundle: Path, *, seconds: float, duty_cycle: float) -> tuple[float, float]:
    """Samples per second of one, and what share of the machine was taken away meanwhile."""
    stolen = Stolen()
    rates = solo_rates(
        bundle, num_trainers=len(TRAINERS), seconds=seconds, micro_batch_size=MICRO_BATCH_SIZE, duty_cycle=duty_cycle
    )
    return sum(rates) / len(rates), stolen.share()


def _write(path: Path, *, target_batch_size: int, duty_cycle: float) -> None:
    text = CONFIG.format(
        run_id=RUN_ID, num_epochs=NUM_EPOCHS, target_batch_size=target_batch_size, micro_batch_size=MICRO_BATCH_SIZE,
        duty_cycle=duty_cycle,
    )  # fmt: skip
    path.write_text(text)
