"""Measure a checkpoint on held-out text: always the same sequences, the same masks, so that numbers compare.

`python -m calm_ray.training.evaluate CHECKPOINT BUNDLE --json`

The loss alone says little to a reader. Beside it stand the two marks that need no model: ln(vocabulary), the loss of
knowing nothing, and the loss of knowing only how frequent each token is. What lies below the second is language.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from transformers import AlbertForPreTraining, PreTrainedTokenizerFast

from calm_ray.config import RunTable
from calm_ray.errors import CalmRayError, CheckpointRejected, ConfigError
from calm_ray.training.batch import Batch
from calm_ray.training.data import ordered_documents
from calm_ray.training.examples import Example, ExampleMaker
from calm_ray.training.model import pretraining_losses
from calm_ray.training.prepare import load_bundle_run, load_bundle_tokenizer
from calm_ray.training.stream import make_masker
from calm_ray.training.tokenizer import SpecialIds

DEFAULT_SEQUENCES = 200
"""All of them different in the demo, whose corpus is small: about 1,700 masked tokens, standard error about 0.05."""

_SEED = 0
_BATCH_SIZE = 32
_DOCUMENTS_AT_A_TIME = 64
_MAX_UNIGRAM_DOCUMENTS = 20_000
"""Enough for frequencies; the whole of a large corpus would be read otherwise."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Losses are means in nats: the first and the third over the same masked tokens."""

    mean_mlm_loss: float
    mean_sop_loss: float
    unigram_loss: float
    """Of predicting each masked token by its frequency in the training text (add-one smoothing)."""

    ln_vocab_size: float
    """Loss of the uniform guess, and about that of an untrained model."""

    sop_accuracy: float
    """Share of pairs whose order was told right; 0.5 is chance."""

    num_sequences: int
    num_masked_tokens: int


def evaluate(
    checkpoint_dir: Path,
    bundle_dir: Path,
    *,
    data_root: Path = Path(),
    num_sequences: int = DEFAULT_SEQUENCES,
    device: str = "cpu",
) -> Evaluation:
    """Load a checkpoint as any reader would and measure it.

    `data_root` matters only for a run whose text is not in the bundle. Raise CheckpointRejected if the checkpoint does
    not load or its losses are not finite, ConfigError if it does not belong to the bundle.
    """
    if not (checkpoint_dir / "config.json").is_file():
        raise ConfigError(f"{checkpoint_dir}: no config.json there; name the folder of a checkpoint")
    try:
        model = AlbertForPreTraining.from_pretrained(
            str(checkpoint_dir), local_files_only=True, use_safetensors=True, attn_implementation="sdpa"
        )
    except Exception as exc:  # transformers and safetensors raise half a dozen types for a broken file
        raise CheckpointRejected(f"{checkpoint_dir}: does not load: {exc}") from exc
    return evaluate_model(
        nn.Module.to(model, device), bundle_dir=bundle_dir, data_root=data_root, num_sequences=num_sequences
    )


@torch.no_grad()
def evaluate_model(
    model: AlbertForPreTraining, *, bundle_dir: Path, data_root: Path = Path(), num_sequences: int = DEFAULT_SEQUENCES
) -> Evaluation:
    """Measure a model in memory, in 32 bits, on the device it is on; it goes back to the mode it was in."""
    run = load_bundle_run(bundle_dir)
    tokenizer, special_ids = load_bundle_tokenizer(bundle_dir)
    vocab_size = model.config.vocab_size
    if vocab_size <= max(tokenizer.get_vocab().values()):
        raise ConfigError(
            f"{bundle_dir}: its tokenizer has {len(tokenizer)} tokens, the model {vocab_size}: the checkpoint is of "
            "another run; name the bundle that it was trained with"
        )
    log_frequency = _log_frequencies(run, tokenizer, vocab_size=vocab_size, bundle_dir=bundle_dir, data_root=data_root)
    mlm_sum = sop_sum = unigram_sum = 0.0
    num_right = num_masked_tokens = 0
    was_training = model.training
    model.eval()
    batches = held_out_batches(
        run, tokenizer, special_ids=special_ids, bundle_dir=bundle_dir, data_root=data_root, num_sequences=num_sequences
    )
    for batch in batches:
        mlm_loss, sop_loss, sop_logits = pretraining_losses(model, batch.to(model.device))
        targets = batch.labels[batch.labels >= 0]
        mlm_sum += float(mlm_loss) * len(targets)
        sop_sum += float(sop_loss) * batch.num_samples
        unigram_sum -= float(log_frequency[targets].sum())
        num_right += int((sop_logits.argmax(dim=1).cpu() == batch.sentence_order_label).sum())
        num_masked_tokens += len(targets)
    model.train(was_training)
    if not math.isfinite(mlm_sum + sop_sum):
        raise CheckpointRejected("the model's loss on held-out text is not finite; go back to an earlier checkpoint")
    return Evaluation(
        mean_mlm_loss=mlm_sum / num_masked_tokens,
        mean_sop_loss=sop_sum / num_sequences,
        unigram_loss=unigram_sum / num_masked_tokens,
        ln_vocab_size=math.log(vocab_size),
        sop_accuracy=num_right / num_sequences,
        num_sequences=num_sequences,
        num_masked_tokens=num_masked_tokens,
    )


def held_out_batches(
    run: RunTable,
    tokenizer: PreTrainedTokenizerFast,
    *,
    special_ids: SpecialIds,
    bundle_dir: Path,
    data_root: Path,
    num_sequences: int,
) -> Iterator[Batch]:
    """Yield `num_sequences` held-out sequences at the run's full length, the same at every call.

    A small corpus is read again, and cut and masked in other places, until there are enough.
    """
    masker = make_masker(run.data, tokenizer=tokenizer, special_ids=special_ids, seed=_SEED)
    maker = ExampleMaker(tokenizer, special_ids=special_ids, rng=random.Random(_SEED))
    examples: list[Example] = []
    while len(examples) < num_sequences:
        num_before = len(examples)
        documents = ordered_documents(run.data, split="held-out", bundle_dir=bundle_dir, data_root=data_root)
        while len(examples) < num_sequences and (some := list(islice(documents, _DOCUMENTS_AT_A_TIME))):
            examples += maker.examples(some, sequence_length=run.data.sequence_length)
        if len(examples) == num_before:
            raise ConfigError("data.held_out_fraction: no document falls to the evaluation; raise it, or add text")
    for start in range(0, num_sequences, _BATCH_SIZE):
        chosen = examples[start : min(start + _BATCH_SIZE, num_sequences)]
        yield masker.batch(chosen, max_length=run.data.sequence_length)


def _log_frequencies(
    run: RunTable, tokenizer: PreTrainedTokenizerFast, *, vocab_size: int, bundle_dir: Path, data_root: Path
) -> torch.Tensor:
    """Log of each token's share of the training split, (vocab_size,) float64; every count one higher than it is."""
    counts = torch.ones(vocab_size, dtype=torch.float64)
    documents = islice(
        ordered_documents(run.data, split="training", bundle_dir=bundle_dir, data_root=data_root),
        _MAX_UNIGRAM_DOCUMENTS,
    )
    while some := list(islice(documents, _DOCUMENTS_AT_A_TIME)):
        encoded = tokenizer.backend_tokenizer.encode_batch(some, add_special_tokens=False)
        ids = torch.tensor([token_id for e in encoded for token_id in e.ids], dtype=torch.long)
        counts += torch.bincount(ids, minlength=vocab_size)
    return (counts / counts.sum()).log()


def main(argv: list[str] | None = None) -> int:
    """Print the evaluation; errors that a user can act upon as one line, with their exit code."""
    parser = argparse.ArgumentParser(prog="python -m calm_ray.training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder with config.json and model.safetensors")
    parser.add_argument("bundle", type=Path, help="folder with run.json, tokenizer/ and text/")
    parser.add_argument("--data-root", type=Path, default=Path(), help="folder of the run's text, if not in the bundle")
    parser.add_argument("--num-sequences", type=int, default=DEFAULT_SEQUENCES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of key=value lines")
    arguments = parser.parse_args(argv)
    try:
        result = evaluate(
            arguments.checkpoint,
            arguments.bundle,
            data_root=arguments.data_root,
            num_sequences=arguments.num_sequences,
            device=arguments.device,
        )
    except CalmRayError as exc:
        sys.stderr.write(f"{exc}\n")
        return exc.exit_code
    values = asdict(result)
    lines = [json.dumps(values)] if arguments.json else [f"{key}={value}" for key, value in values.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
