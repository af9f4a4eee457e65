"""Choose the tokens to predict, and hide them: BERT, section 3.1, appendix A.1.

One algorithm for both kinds of masking. Words get a random rank; in that order they are taken until the sequence's
budget is used. With `token`, each token is a word. The number of masked tokens is thus nearly the same in every
sequence, which makes gradients steadier than independent coin flips do, and it is never zero.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from calm_ray.training.batch import Batch
from calm_ray.training.examples import Example
from calm_ray.training.tokenizer import SpecialIds

PAD_MULTIPLE = 8
"""Lengths are multiples of this: tensor cores and vector units like it, and torch sees fewer shapes."""

IGNORED = -100

MASKED_SHARE, REPLACED_SHARE = 0.8, 0.1


class Masker:
    """Pads and masks examples. Draws from its own generator: same seed and examples, same batch."""

    def __init__(
        self,
        *,
        special_ids: SpecialIds,
        ordinary_ids: Sequence[int],
        masking: Literal["token", "whole-word"],
        mask_fraction: float,
        seed: int,
    ) -> None:
        self._special_ids = special_ids
        self._ordinary_ids = torch.tensor(ordinary_ids, dtype=torch.long)
        self._is_whole_word = masking == "whole-word"
        self._mask_fraction = mask_fraction
        self._generator = torch.Generator().manual_seed(seed)

    def batch(self, examples: Sequence[Example], *, max_length: int) -> Batch:
        """Return `examples` as one batch, padded to the longest, rounded up to 8 but not beyond `max_length`."""
        longest = max(len(example.input_ids) for example in examples)
        length = max(longest, min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, max_length))
        input_ids = _padded([e.input_ids for e in examples], length=length, value=self._special_ids.pad)
        words = _padded([e.word_ids for e in examples], length=length, value=-1)
        is_chosen = choose_masked(
            words,
            mask_fraction=self._mask_fraction,
            is_whole_word=self._is_whole_word,
            generator=self._generator,
        )
        return Batch(
            input_ids=self._hide(input_ids, is_chosen),
            attention_mask=_padded([[1] * len(e.input_ids) for e in examples], length=length, value=0),
            token_type_ids=_padded([e.token_type_ids for e in examples], length=length, value=0),
            labels=input_ids.masked_fill(~is_chosen, IGNORED),
            sentence_order_label=torch.tensor([int(e.is_swapped) for e in examples]),
        )

    def _hide(self, input_ids: torch.Tensor, is_chosen: torch.Tensor) -> torch.Tensor:
        """80 % of the chosen become [MASK], 10 % a random ordinary token, 10 % stay."""
        draw = torch.rand(input_ids.shape, generator=self._generator)
        picks = torch.randint(len(self._ordinary_ids), input_ids.shape, generator=self._generator)
        hidden = input_ids.masked_fill(is_chosen & (draw < MASKED_SHARE), self._special_ids.mask)
        is_replaced = is_chosen & (draw >= MASKED_SHARE) & (draw < MASKED_SHARE + REPLACED_SHARE)
        return torch.where(is_replaced, self._ordinary_ids[picks], hidden)


def choose_masked(
    words: torch.Tensor, *, mask_fraction: float, is_whole_word: bool, generator: torch.Generator
) -> torch.Tensor:
    """Return a (B, L) mask of the tokens to predict.

    `words`: (B, L) int64, the number of each token's word, below L; -1 for special tokens and padding, which are never
    chosen. Each row with any word gets at least one. A word at the end of the budget is taken if more than half of it
    fits, so that long words are neither favoured nor avoided.
    """
    num_rows, length = words.shape
    is_maskable = words >= 0
    if not is_whole_word:
        words = torch.where(is_maskable, torch.arange(length).expand_as(words), words)
    budget = (is_maskable.sum(dim=1, keepdim=True) * mask_fraction).round().clamp(min=1)
    ranks = torch.rand(num_rows, length, generator=generator).gather(1, words.clamp(min=0))
    ranks = ranks.masked_fill(~is_maskable, 2.0)  # behind all words
    sizes = torch.zeros_like(words).scatter_add_(1, words.clamp(min=0), is_maskable.long())
    order = torch.argsort(ranks, dim=1, stable=True)
    words_in_order = words.gather(1, order)
    position = torch.arange(length).expand_as(words)
    is_start = torch.ones_like(is_maskable)
    is_start[:, 1:] = words_in_order[:, 1:] != words_in_order[:, :-1]
    start = torch.where(is_start, position, 0).cummax(dim=1).values
    size = sizes.gather(1, words_in_order.clamp(min=0))
    fits = (start == 0) | (start + size / 2 <= budget)
    chosen_in_order = fits & (words_in_order >= 0)
    return torch.zeros_like(is_maskable).scatter_(1, order, chosen_in_order)


def _padded(rows: Sequence[Sequence[int]], *, length: int, value: int) -> torch.Tensor:
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.long)
