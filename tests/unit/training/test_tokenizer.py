"""A tokenizer made here loads anywhere; one that does not fit is refused with a remedy."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from calm_ray.errors import ConfigError
from calm_ray.training.tokenizer import check_tokenizer, load_tokenizer, ordinary_token_ids, train_tokenizer

TEXT = ["The quick brown fox jumps over the lazy dog.", "A second sentence; with 42 numbers!"] * 20


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(iter(TEXT), vocab_size=120, max_documents=1000)


def test_tokenizer_when_saved_loads_with_the_auto_class(trained: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    encoded = loaded("The fox", "a dog", return_token_type_ids=True)
    assert encoded["input_ids"] == trained("The fox", "a dog")["input_ids"]
    assert encoded["input_ids"][0] == loaded.cls_token_id
    assert set(encoded["token_type_ids"]) == {0, 1}
    assert len(loaded) == len(trained)


def test_tokenizer_mask_leaves_no_lone_space_token(trained: PreTrainedTokenizerFast) -> None:
    tokens = trained.convert_ids_to_tokens(trained("dog [MASK] fox", add_special_tokens=False)["input_ids"])
    assert tokens[tokens.index("[MASK]") - 1] != "▁"


def test_tokenizer_unknown_character_becomes_unk(trained: PreTrainedTokenizerFast) -> None:
    assert trained.unk_token_id in trained("fox 漢")["input_ids"]


def test_tokenizer_bengali_pipe_becomes_danda_and_english_pipe_stays(trained: PreTrainedTokenizerFast) -> None:
    normalize = trained.backend_tokenizer.normalizer.normalize_str
    assert normalize("আমি গাই |") == "আমি গাই।"
    assert normalize("a | b") == "a | b"
    assert normalize("\u0643\u064e\u062a\u0640\u0628") == "\u0643\u062a\u0628"


def test_tokenizer_without_text_raises_config_error() -> None:
    with pytest.raises(ConfigError, match=r"no text to train on; check"):
        train_tokenizer([], vocab_size=100, max_documents=10)


def test_tokenizer_small_corpus_yields_fewer_tokens_than_asked() -> None:
    assert len(train_tokenizer(["a b c d e f"], vocab_size=5000, max_documents=10)) < 5000


def test_load_tokenizer_from_folder_without_one_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}: no tokenizer.json"):
        load_tokenizer(tmp_path)


def test_load_tokenizer_from_broken_file_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{tmp_path}: cannot be loaded"):
        load_tokenizer(tmp_path)


def test_check_tokenizer_when_it_fits_returns_its_ids(trained: PreTrainedTokenizerFast) -> None:
    ids = check_tokenizer(trained, vocab_size=len(trained), where="here")
    assert (ids.pad, ids.unk, ids.cls, ids.sep, ids.mask) == (0, 1, 2, 3, 4)
    assert set(ordinary_token_ids(trained)) == set(range(5, len(trained)))


def test_check_tokenizer_beyond_the_models_vocabulary_says_so(trained: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"here: token id \d+ is beyond the model's vocabulary of 30"):
        check_tokenizer(trained, vocab_size=30, where="here")


def test_check_tokenizer_without_mask_and_cls_names_both(trained: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(
        tokenizer_object=trained.backend_tokenizer, pad_token="<pad>", unk_token="<unk>", sep_token="[SEP]"
    )
    with pytest.raises(ConfigError, match="no cls_token, mask_token"):
        check_tokenizer(bare, vocab_size=1000, where="here")


def test_check_tokenizer_with_one_token_in_two_roles_raises(trained: PreTrainedTokenizerFast) -> None:
    double = PreTrainedTokenizerFast(
        tokenizer_object=trained.backend_tokenizer,
        pad_token="<unk>",
        unk_token="<unk>",
        sep_token="[SEP]",
        cls_token="[CLS]",
        mask_token="[MASK]",
    )
    with pytest.raises(ConfigError, match="same token"):
        check_tokenizer(double, vocab_size=1000, where="here")


def test_load_tokenizer_of_the_wordpiece_kind_from_its_vocabulary_keeps_words_together(tmp_path: Path) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "train", "##ing", "together"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}', encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert check_tokenizer(tokenizer, vocab_size=len(pieces), where="here").mask == 4
    encoded = tokenizer.backend_tokenizer.encode("training together", add_special_tokens=False)
    assert (encoded.ids, encoded.word_ids) == ([5, 6, 7], [0, 0, 1])
