"""One tiny bundle for all training tests: the builtin English text, a model of 60,000 parameters."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from calm_ray.config import RunTable
from calm_ray.training.prepare import load_bundle_tokenizer, write_parts
from calm_ray.training.tokenizer import SpecialIds


@pytest.fixture(scope="session")
def tiny_run() -> RunTable:
    return RunTable.model_validate(
        {
            "run_id": "tiny",
            "num_epochs": 4,
            "target_batch_size": 32,
            "model": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 64,
                "embedding_size": 16,
                "max_position_embeddings": 64,
            },
            "tokenizer": {"source": "train", "vocab_size": 500},
            "data": {"sources": [{"kind": "builtin"}], "sequence_length": 48, "held_out_fraction": 0.2},
            "optimizer": {"name": "adamw", "learning_rate": 5e-3, "warmup_epochs": 2, "decay_epochs": 10},
        }
    )


@pytest.fixture(scope="session")
def bundle_dir(tiny_run: RunTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    write_parts(tiny_run, config_dir=folder, out_dir=folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_and_ids(bundle_dir: Path) -> tuple[PreTrainedTokenizerFast, SpecialIds]:
    return load_bundle_tokenizer(bundle_dir)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_and_ids: tuple[PreTrainedTokenizerFast, SpecialIds]) -> PreTrainedTokenizerFast:
    return tokenizer_and_ids[0]


@pytest.fixture(scope="session")
def special_ids(tokenizer_and_ids: tuple[PreTrainedTokenizerFast, SpecialIds]) -> SpecialIds:
    return tokenizer_and_ids[1]
