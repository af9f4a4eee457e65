"""What the peers of a measured or tested swarm compute: a tiny language for tests, an ALBERT for measurements."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from benchmarks.swarm_spec import ProcessSpec
from calm_ray.tables import OptimizerTable
from calm_ray.training.optim import gradient_norm, make_optimizer, make_schedule


@dataclass(frozen=True, kw_only=True)
class Computed:
    """One micro-batch whose mean gradient now stands in `.grad`."""

    num_samples: int
    loss: float
    """Mean, nats."""
    batch: int
    """Number of the micro-batch: with the peer's seed it says which samples these were."""


class Task(Protocol):
    """A model, its data and its optimizer."""

    param_groups: list[dict[str, Any]]
    optimizer_table: OptimizerTable

    def compute(self) -> Computed: ...
    def held_out_loss(self) -> float: ...


def make_task(spec: ProcessSpec) -> Task:
    if spec.task == "albert":
        from benchmarks.efficiency_data import TwoLanguages

        return TwoLanguages(seed=spec.seed, batch_size=spec.micro_batch_size)
    return TinyLanguage(seed=spec.seed, model_seed=spec.model_seed, batch_size=spec.micro_batch_size)


VOCAB_SIZE = 300
SEQUENCE_LENGTH = 16
NUM_SUCCESSORS = 4
REGULAR_SHARE = 0.9
LANGUAGE_SEED = 20
NUM_HELD_OUT = 1024
NUM_PARAMETERS = 31_212


class TinyLanguage:
    """A language of 300 words in which nine words out of ten are one of four successors of the word before.

    An untrained model has a loss of ln 300 = 5.7 nats, a perfect one about 2.0. One sample is a sentence of 16 words.
    One AdamW step on 256 sentences takes some 20 ms on one core.
    """

    optimizer_table = OptimizerTable(name="adamw", learning_rate=2e-2, warmup_epochs=5, decay_epochs=1000)

    def __init__(self, *, seed: int, model_seed: int, batch_size: int) -> None:
        self._seed, self._batch_size, self._num_batches = seed, batch_size, 0
        language = torch.Generator().manual_seed(LANGUAGE_SEED)
        self._successors = torch.randint(VOCAB_SIZE, (VOCAB_SIZE, NUM_SUCCESSORS), generator=language)
        self.model = make_tiny_model(model_seed)
        self.param_groups = [{"params": list(self.model.parameters()), "weight_decay": 0.0}]

    def compute(self) -> Computed:
        batch = self._num_batches
        self._num_batches += 1
        loss = self.add_gradient(seed=self._seed, batch=batch, batch_size=self._batch_size)
        return Computed(num_samples=self._batch_size, loss=loss, batch=batch)

    def add_gradient(self, *, seed: int, batch: int, batch_size: int) -> float:
        """Add the mean gradient of one peer's numbered micro-batch to `.grad`; return its mean loss."""
        loss = self._loss(self.sentences(seed=seed, batch=batch, batch_size=batch_size))
        loss.backward()
        return float(loss.detach())

    def sentences(self, *, seed: int, batch: int, batch_size: int) -> torch.Tensor:
        """(batch_size, SEQUENCE_LENGTH + 1) int64, a function of its arguments alone."""
        digest = hashlib.sha256(f"{seed}/{batch}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        words = torch.empty(batch_size, SEQUENCE_LENGTH + 1, dtype=torch.long)
        words[:, 0] = torch.randint(VOCAB_SIZE, (batch_size,), generator=draw)
        stray = torch.randint(VOCAB_SIZE, words.shape, generator=draw)
        is_regular = torch.rand(words.shape, generator=draw) < REGULAR_SHARE
        choice = torch.rand(words.shape, generator=draw).square().mul(NUM_SUCCESSORS).long()
        for position in range(1, words.shape[1]):
            regular = self._successors[words[:, position - 1], choice[:, position]]
            words[:, position] = torch.where(is_regular[:, position], regular, stray[:, position])
        return words

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Of sentences that no peer trains on, nats."""
        return float(self._loss(self.sentences(seed=-1, batch=0, batch_size=NUM_HELD_OUT)))

    def _loss(self, words: torch.Tensor) -> torch.Tensor:
        logits = self.model(words[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())


def make_tiny_model(seed: int) -> nn.Sequential:
    """NUM_PARAMETERS, initial weights from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Embedding(VOCAB_SIZE, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, VOCAB_SIZE))


def stepper(task: Task) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimizer and schedule of the global step, for those who step alone."""
    optimizer = make_optimizer(task.param_groups, table=task.optimizer_table)
    return optimizer, make_schedule(task.optimizer_table)(optimizer)


def parameters_of(task: Task) -> list[nn.Parameter]:
    return [parameter for group in task.param_groups for parameter in group["params"]]


def norm_only(gradients: list[torch.Tensor]) -> float:
    """No clipping: bare hivemind has no place for it."""
    return gradient_norm(gradients)


def digest_of(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 (hex) of the tensors' bytes, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()
