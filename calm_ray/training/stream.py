"""The trainer's endless stream of batches: documents, examples, masks, in a background thread."""

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Self

from transformers import PreTrainedTokenizerFast

from calm_ray.config import RunTable
from calm_ray.errors import ConfigError
from calm_ray.tables import DataTable
from calm_ray.training.batch import Batch
from calm_ray.training.data import training_documents
from calm_ray.training.examples import Example, ExampleMaker, sequence_length_at
from calm_ray.training.masking import Masker
from calm_ray.training.prefetch import Prefetcher
from calm_ray.training.tokenizer import SpecialIds, ordinary_token_ids

DOCUMENTS_AT_A_TIME = 64
"""Tokenised in one call, and their examples shuffled: neighbours in a document are not neighbours in a batch."""

PREFETCHED_BATCHES = 4

MAX_BARREN_CALLS = 100
"""A corpus of fragments would otherwise be read for ever without a word."""


class TrainingBatches:
    """Iterate over batches for ever. `set_epoch` moves the sequence-length warm-up on; `close` stops the thread.

    A new length reaches the model a few batches late, for examples already cut keep theirs. `seed` comes from
    `data.stream_seed`. Raises what the sources raise (ConfigError, or CalmRayError for a dead stream) from `next`.
    """

    def __init__(
        self,
        run: RunTable,
        *,
        bundle_dir: Path,
        data_root: Path,
        tokenizer: PreTrainedTokenizerFast,
        special_ids: SpecialIds,
        batch_size: int,
        seed: int,
    ) -> None:
        self._data = run.data
        self._epoch = 0
        documents = training_documents(run.data, bundle_dir=bundle_dir, data_root=data_root, seed=seed)
        rng = random.Random(seed)
        maker = ExampleMaker(tokenizer, special_ids=special_ids, rng=rng)
        masker = make_masker(run.data, tokenizer=tokenizer, special_ids=special_ids, seed=seed)
        self._prefetcher = Prefetcher(
            self._batches(documents, maker=maker, masker=masker, rng=rng, batch_size=batch_size),
            depth=PREFETCHED_BATCHES,
        )

    def set_epoch(self, epoch: int) -> None:
        """Tell the stream the global epoch. Cheap; call it at every step."""
        self._epoch = epoch

    def close(self) -> None:
        self._prefetcher.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return next(self._prefetcher)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _batches(
        self, documents: Iterator[str], *, maker: ExampleMaker, masker: Masker, rng: random.Random, batch_size: int
    ) -> Iterator[Batch]:
        pool: list[Example] = []
        while True:
            length = sequence_length_at(self._epoch, table=self._data)
            num_barren = 0
            while len(pool) < batch_size:
                if num_barren == MAX_BARREN_CALLS:
                    raise ConfigError(
                        f"data.sources: {num_barren * DOCUMENTS_AT_A_TIME} documents in a row gave no example; each is "
                        "shorter than 8 tokens or a single word: check `layout` and `text_field`"
                    )
                fresh = maker.examples(list(islice(documents, DOCUMENTS_AT_A_TIME)), sequence_length=length)
                num_barren = 0 if fresh else num_barren + 1
                rng.shuffle(fresh)
                pool += fresh
            yield masker.batch(pool[:batch_size], max_length=self._data.sequence_length)
            del pool[:batch_size]


def make_masker(data: DataTable, *, tokenizer: PreTrainedTokenizerFast, special_ids: SpecialIds, seed: int) -> Masker:
    """Return the masker that `data` asks for; training and evaluation hide tokens alike."""
    return Masker(
        special_ids=special_ids,
        ordinary_ids=ordinary_token_ids(tokenizer),
        masking=data.masking,
        mask_fraction=data.mask_fraction,
        seed=seed,
    )
