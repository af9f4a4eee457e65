"""Sentence pairs: nothing lost in silence, nothing too long, half of them swapped."""

import random

import pytest
from transformers import PreTrainedTokenizerFast

from calm_ray.tables import DataTable
from calm_ray.training.examples import Example, ExampleMaker, sequence_length_at, split_sentences
from calm_ray.training.tokenizer import SpecialIds

LONG = "The first sentence is here. The second one follows it. A third comes after that. And the last one ends it. " * 8


@pytest.fixture
def maker(tokenizer: PreTrainedTokenizerFast, special_ids: SpecialIds) -> ExampleMaker:
    return ExampleMaker(tokenizer, special_ids=special_ids, rng=random.Random(0))


def tokens_of(example: Example, special_ids: SpecialIds) -> tuple[list[int], list[int]]:
    """The two segments without special tokens, in their original order."""
    ids, types = example.input_ids, example.token_type_ids
    special = {special_ids.cls, special_ids.sep}
    first = [i for i, t in zip(ids, types, strict=True) if t == 0 and i not in special]
    second = [i for i, t in zip(ids, types, strict=True) if t == 1 and i not in special]
    return (second, first) if example.is_swapped else (first, second)


def test_sentences_split_at_marks_of_three_scripts_and_keep_abbreviations() -> None:
    assert split_sentences("One here. Two! Three?") == ["One here.", "Two!", "Three?"]
    assert split_sentences("See e.g. this. And J. Smith said so.") == ["See e.g. this.", "And J. Smith said so."]
    assert split_sentences("আমি যাই। তুমি যাও।") == ["আমি যাই।", "তুমি যাও।"]
    assert split_sentences("كيف الحال؟ بخير.") == ["كيف الحال؟", "بخير."]
    assert split_sentences('He said "no." Then left.\nA line') == ['He said "no."', "Then left.", "A line"]
    assert split_sentences("  \n ") == []


def test_examples_have_the_pair_layout(maker: ExampleMaker, special_ids: SpecialIds) -> None:
    for example in maker.examples([LONG], sequence_length=40):
        assert len(example.input_ids) == len(example.token_type_ids) == len(example.word_ids) <= 40
        assert example.input_ids[0] == special_ids.cls
        assert example.input_ids.count(special_ids.sep) == 2
        assert example.input_ids[-1] == special_ids.sep
        assert example.token_type_ids == sorted(example.token_type_ids)
        for token_id, word in zip(example.input_ids, example.word_ids, strict=True):
            assert (word == -1) == (token_id in (special_ids.cls, special_ids.sep))


def test_examples_of_a_long_document_fill_their_sequences(maker: ExampleMaker) -> None:
    examples = maker.examples([LONG], sequence_length=40)
    assert sum(len(example.input_ids) == 40 for example in examples) >= len(examples) - 1
    assert maker.num_skipped <= 1


def test_examples_are_swapped_in_half_of_the_cases(maker: ExampleMaker) -> None:
    examples = maker.examples([LONG] * 60, sequence_length=32)
    assert sum(example.is_swapped for example in examples) / len(examples) == pytest.approx(0.5, abs=0.06)


def test_example_of_one_sentence_is_cut_at_a_word(
    maker: ExampleMaker, tokenizer: PreTrainedTokenizerFast, special_ids: SpecialIds
) -> None:
    text = "a single sentence without any end that is long enough to be cut"
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    labels = set()
    for _ in range(20):
        (example,) = maker.examples([text], sequence_length=64)
        first, second = tokens_of(example, special_ids)
        assert first + second == whole
        assert tokenizer.convert_ids_to_tokens(second)[0].startswith("▁")
        labels.add(example.is_swapped)
    assert labels == {False, True}
    assert maker.num_skipped == 0


def test_sentence_longer_than_a_sequence_is_not_lost(
    maker: ExampleMaker, tokenizer: PreTrainedTokenizerFast, special_ids: SpecialIds
) -> None:
    text = " ".join(f"number {i}" for i in range(100))
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    examples = maker.examples([text], sequence_length=32)
    joined: list[int] = []
    for example in examples:
        first, second = tokens_of(example, special_ids)
        joined += first + second
    assert joined == whole[: len(joined)]
    assert len(whole) - len(joined) < 8


def test_documents_too_short_are_counted_not_dropped_in_silence(maker: ExampleMaker) -> None:
    assert maker.examples(["One.", "", LONG[:80]], sequence_length=32)
    assert maker.num_skipped == 1


def test_examples_of_the_same_seed_are_the_same(tokenizer: PreTrainedTokenizerFast, special_ids: SpecialIds) -> None:
    made = [
        ExampleMaker(tokenizer, special_ids=special_ids, rng=random.Random(seed)).examples([LONG], sequence_length=40)
        for seed in (1, 1, 2)
    ]
    assert made[0] == made[1] != made[2]


def test_sequence_length_follows_calms_published_steps() -> None:
    table = DataTable.model_validate(
        {
            "sources": [{"kind": "builtin"}],
            "sequence_length": 512,
            "sequence_warmup": {"start_length": 128, "length_step": 32, "num_epochs": 10_000},
        }
    )
    steps = {0: 128, 833: 128, 834: 160, 1667: 192, 2500: 224, 5000: 320, 8334: 448, 9166: 448, 9167: 480, 9999: 480}
    assert {epoch: sequence_length_at(epoch, table=table) for epoch in steps} == steps
    assert sequence_length_at(10_000, table=table) == sequence_length_at(10**6, table=table) == 512


def test_sequence_length_without_warmup_is_full_from_the_start() -> None:
    table = DataTable.model_validate({"sources": [{"kind": "builtin"}], "sequence_length": 48})
    assert sequence_length_at(0, table=table) == 48
