"""The model and the text of the efficiency benchmark: an ALBERT of 1.97 M parameters, and two languages.

The text is the prose that ships with Python, tokenised once. The second trainer's is the same text in another script:
every token's id is 4,000 higher. The held-out text is half of each. So no trainer can learn alone what both learn
together, and a swarm that averages nothing shows it in its loss. The cost of computing is that of any text.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.swarm_tasks import Computed
from calm_ray.tables import ModelTable, OptimizerTable
from calm_ray.training.batch import Batch
from calm_ray.training.builtin import builtin_documents
from calm_ray.training.compute import Compute
from calm_ray.training.data import is_held_out
from calm_ray.training.examples import Example, ExampleMaker
from calm_ray.training.loop import GradientSource
from calm_ray.training.masking import Masker
from calm_ray.training.model import build_model, model_config, parameter_groups, pretraining_losses
from calm_ray.training.tokenizer import SpecialIds, check_tokenizer, ordinary_token_ids, train_tokenizer

VOCAB_SIZE = 8000
SCRIPT_SIZE = VOCAB_SIZE // 2
SEQUENCE_LENGTH = 128
NUM_BATCHES = 300
"""Made before the clock starts: making them is not what is measured."""
NUM_WARM_UP = 3
NUM_HELD_OUT = 96
HELD_OUT_FRACTION = 0.1

MODEL = ModelTable(
    hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
    max_position_embeddings=SEQUENCE_LENGTH,
)  # fmt: skip


class TwoLanguages:
    """One trainer's share of the work; `seed` 0 and 1 are the two languages."""

    optimizer_table = OptimizerTable(name="adamw", learning_rate=3e-3, decay_epochs=1000)
    """In 8 steps of 512 samples the loss falls from 9.0 to 6.6; of 256 samples of one language, to 8.0."""

    def __init__(self, *, seed: int, batch_size: int) -> None:
        tokenizer, special = _tokenizer()
        self.model = build_model(model_config(MODEL, vocab_size=VOCAB_SIZE, special_ids=special), seed=0)
        self.param_groups = parameter_groups(self.model, self.optimizer_table)
        self._batches = _Cycle(
            _batches(tokenizer, special, language=seed % 2, seed=seed, batch_size=batch_size, is_held_out_split=False)
        )
        compute = Compute(device="cpu", precision="fp32", micro_batch_size=batch_size, gradient_checkpointing=False)
        self._source = GradientSource(self.model, batches=self._batches, compute=compute)
        self._warm_up()

    def _warm_up(self) -> None:
        """torch chooses its kernels at the first calls."""
        for _ in range(NUM_WARM_UP):
            self._source.step(epoch=0)
        for parameter in self.model.parameters():
            parameter.grad = None

    def compute(self) -> Computed:
        batch = self._batches.num_given
        result = self._source.step(epoch=0)
        return Computed(
            num_samples=result.num_samples, loss=result.mean_mlm_loss + result.mean_sop_loss, batch=batch
        )  # fmt: skip

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Masked-LM loss on held-out text of both languages, nats."""
        tokenizer, special = _tokenizer()
        self.model.eval()
        losses = [
            float(pretraining_losses(self.model, batch)[0])
            for language in (0, 1)
            for batch in _batches(
                tokenizer, special, language=language, seed=-1, batch_size=16, is_held_out_split=True
            )
        ]  # fmt: skip
        self.model.train()
        return sum(losses) / len(losses)


class _Cycle:
    """Given batches, over and over."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self.num_given = 0

    def __next__(self) -> Batch:
        self.num_given += 1
        return self._batches[(self.num_given - 1) % len(self._batches)]

    def set_epoch(self, epoch: int) -> None:
        """The sequence length does not change here."""


@cache
def _tokenizer() -> tuple[PreTrainedTokenizerFast, SpecialIds]:
    tokenizer = train_tokenizer(builtin_documents(), vocab_size=SCRIPT_SIZE, max_documents=10**6)
    return tokenizer, check_tokenizer(tokenizer, vocab_size=SCRIPT_SIZE, where="efficiency benchmark")


def _batches(
    tokenizer: PreTrainedTokenizerFast, special: SpecialIds, *, language: int, seed: int, batch_size: int,
    is_held_out_split: bool,
) -> list[Batch]:  # fmt: skip
    documents = [
        d for d in builtin_documents() if is_held_out(d, fraction=HELD_OUT_FRACTION) == is_held_out_split
    ]  # fmt: skip
    rng = random.Random(seed)
    examples = ExampleMaker(tokenizer, special_ids=special, rng=rng).examples(
        documents, sequence_length=SEQUENCE_LENGTH
    )
    masker = Masker(
        special_ids=special, ordinary_ids=ordinary_token_ids(tokenizer), masking="token", mask_fraction=0.15,
        seed=abs(seed),
    )  # fmt: skip
    number = NUM_HELD_OUT // batch_size if is_held_out_split else NUM_BATCHES
    return [
        _in_script(masker.batch(_draw(examples, batch_size, rng), max_length=SEQUENCE_LENGTH), language)
        for _ in range(number)
    ]


def _draw(examples: list[Example], number: int, rng: random.Random) -> list[Example]:
    """Full sequences only, so that every micro-batch costs the same."""
    return rng.sample([e for e in examples if len(e.input_ids) > SEQUENCE_LENGTH - 8] or examples, number)


def _in_script(batch: Batch, language: int) -> Batch:
    """The batch in one of the two languages: special tokens (ids below 5) and ignored labels stay as they are."""
    if not language:
        return batch

    def move(ids: torch.Tensor) -> torch.Tensor:
        return torch.where(ids >= 5, ids + SCRIPT_SIZE, ids)

    return replace(batch, input_ids=move(batch.input_ids), labels=move(batch.labels))
