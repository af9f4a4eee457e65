"""Which tokens are hidden, and how: shares, whole words, never a special token, never none."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from calm_ray.training.examples import Example
from calm_ray.training.masking import Masker, choose_masked
from calm_ray.training.tokenizer import SpecialIds

SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)


def make_example(words: Sequence[int]) -> Example:
    """Tokens are numbered from 10 on; two equal segments are not needed here."""
    num = len(words)
    return Example(
        input_ids=[2, *range(10, 10 + num), 3],
        token_type_ids=[0] * (num + 2),
        word_ids=[-1, *words, -1],
        is_swapped=True,
    )


def make_masker(**values: Any) -> Masker:
    defaults: dict[str, Any] = {
        "special_ids": SPECIAL,
        "ordinary_ids": list(range(5, 200)),
        "masking": "token",
        "mask_fraction": 0.15,
        "seed": 0,
    }
    return Masker(**{**defaults, **values})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("masking", ["token", "whole-word"])
def test_masking_hides_the_asked_share_and_nothing_special(masking: str) -> None:
    examples = [make_example([i // 2 for i in range(100)]) for _ in range(64)]
    batch = make_masker(masking=masking).batch(examples, max_length=512)
    is_chosen = batch.labels != -100
    assert not is_chosen[:, 0].any()
    assert not is_chosen[:, 101:].any()
    assert float(is_chosen.sum(1).float().mean()) == pytest.approx(15, abs=1)
    original = torch.tensor([[2, *range(10, 110), 3] + [0] * (batch.labels.shape[1] - 102)] * 64)
    assert torch.equal(batch.labels[is_chosen], original[is_chosen])
    assert torch.equal(batch.input_ids[~is_chosen], original[~is_chosen])


def test_masking_splits_the_chosen_eighty_ten_ten() -> None:
    batch = make_masker(mask_fraction=0.5).batch([make_example(range(150)) for _ in range(200)], max_length=512)
    is_chosen = batch.labels != -100
    hidden, labels = batch.input_ids[is_chosen], batch.labels[is_chosen]
    assert float((hidden == 4).float().mean()) == pytest.approx(0.8, abs=0.01)
    assert float((hidden == labels).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert hidden.min() >= 4
    assert hidden.max() < 200


def test_whole_word_masking_takes_words_whole() -> None:
    words = torch.tensor([[-1, 0, 0, 0, 1, 2, 2, 3, 4, 4, -1, -1]]).expand(500, -1)
    chosen = choose_masked(words, mask_fraction=0.3, is_whole_word=True, generator=generator())
    for start, stop in ((1, 4), (5, 7), (8, 10)):
        block = chosen[:, start:stop]
        assert torch.equal(block.all(1), block.any(1))
    assert chosen.any(1).all()
    assert float(chosen.sum(1).float().mean()) == pytest.approx(9 * 0.3, abs=0.5)


def test_whole_word_masking_does_not_avoid_long_words() -> None:
    words = torch.tensor([[i // 4 if i < 40 else 10 + (i - 40) for i in range(80)]]).expand(400, -1)
    chosen = choose_masked(words, mask_fraction=0.2, is_whole_word=True, generator=generator())
    assert float(chosen[:, :40].float().mean()) == pytest.approx(float(chosen[:, 40:].float().mean()), abs=0.03)


@pytest.mark.parametrize("is_whole_word", [False, True])
def test_masking_short_sequence_gets_one(is_whole_word: bool) -> None:
    words = torch.tensor([[-1, 0, 1, -1, -1]]).expand(50, -1)
    chosen = choose_masked(words, mask_fraction=0.01, is_whole_word=is_whole_word, generator=generator())
    assert (chosen.sum(1) == 1).all()
    assert len({tuple(row) for row in chosen.tolist()}) == 2


def test_batch_is_padded_to_the_longest_rounded_up_to_eight() -> None:
    batch = make_masker().batch([make_example(range(5)), make_example(range(9))], max_length=512)
    assert batch.input_ids.shape == (2, 16)
    assert batch.attention_mask.sum(1).tolist() == [7, 11]
    assert batch.sentence_order_label.tolist() == [1, 1]
    assert make_masker().batch([make_example(range(9))], max_length=12).input_ids.shape == (1, 12)


def test_masking_same_seed_same_batch() -> None:
    examples = [make_example(range(30))] * 4
    batches = [make_masker(seed=seed).batch(examples, max_length=64) for seed in (1, 1, 2)]
    assert torch.equal(batches[0].input_ids, batches[1].input_ids)
    assert not torch.equal(batches[0].input_ids, batches[2].input_ids)
