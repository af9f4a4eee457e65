"""A reader needs only transformers: the real classes load a checkpoint, tied weights and tokenizer included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AlbertConfig, AlbertForPreTraining, AutoTokenizer, PreTrainedTokenizerFast

Write = Callable[..., Path]


@pytest.fixture
def model() -> AlbertForPreTraining:
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=96, embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    model = AlbertForPreTraining(config)
    model.train(False)
    with torch.no_grad():
        for parameter in model.parameters():  # a loader that leaves one at its initial value must not pass
            parameter.normal_(std=0.3)
    return model


@pytest.fixture
def real_tokenizer_dir(tmp_path: Path) -> Path:
    vocabulary = {
        word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "small", "swarm"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip
    fast.save_pretrained(tmp_path / "real-tokenizer")
    return tmp_path / "real-tokenizer"


def test_checkpoint_loaded_with_transformers_gives_equal_logits(
    write: Write, model: AlbertForPreTraining, real_tokenizer_dir: Path
) -> None:
    folder = write(
        40, named_parameters=dict(model.named_parameters()), model_config=model.config.to_dict(),
        tokenizer_dir=real_tokenizer_dir,
    )  # fmt: skip
    loading: Any = AlbertForPreTraining.from_pretrained(folder, output_loading_info=True)
    loaded, info = loading
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(ids), loaded.eval()(ids)
    assert torch.equal(ours.prediction_logits, theirs.prediction_logits)
    assert torch.equal(ours.sop_logits, theirs.sop_logits)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_checkpoint_holds_the_tied_embedding_once(
    write: Write, model: AlbertForPreTraining, real_tokenizer_dir: Path
) -> None:
    parameters = dict(model.named_parameters())
    assert "albert.embeddings.word_embeddings.weight" in parameters
    assert "predictions.decoder.weight" not in parameters
    folder = write(
        1, named_parameters=parameters, model_config=model.config.to_dict(), tokenizer_dir=real_tokenizer_dir
    )
    size = (folder / "model.safetensors").stat().st_size
    assert size < 4 * sum(p.numel() for p in parameters.values()) + 8192


def test_checkpoint_tokenizer_loads_with_auto_tokenizer(
    write: Write, model: AlbertForPreTraining, real_tokenizer_dir: Path
) -> None:
    folder = write(
        1, named_parameters=dict(model.named_parameters()), model_config=model.config.to_dict(),
        tokenizer_dir=real_tokenizer_dir,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a small swarm")["input_ids"] == [5, 6, 7]
    assert tokenizer.mask_token_id == 4
