"""A small state to write down: plain tensors where the model does not matter, which is nearly everywhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from calm_ray.checkpoint.write import write_checkpoint

Write = Callable[..., Path]


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "corpus.txt").write_text("not part of a tokenizer")
    return folder


@pytest.fixture
def write(tmp_path: Path, tokenizer_dir: Path) -> Write:
    """write(epoch, **changes): a checkpoint of epoch `epoch` in tmp_path/out, whose values say which epoch it is."""

    def write(epoch: int, **changes: Any) -> Path:
        values: dict[str, Any] = {
            "epoch": epoch, "run_id": "demo", "config_hash": "ab" * 32,
            "named_parameters": {"embeddings.weight": torch.full((4, 3), float(epoch)), "bias": torch.arange(3.0)},
            "optimizer_tensors": [torch.full((2,), float(i)) for i in range(12)],
            "optimizer_metadata": [{"step": epoch, "lr": 1e-3}], "model_config": {"model_type": "albert"},
            "tokenizer_dir": tokenizer_dir, "keep_last": 3,
        }  # fmt: skip
        return write_checkpoint(changes.pop("out_dir", tmp_path / "out"), **(values | changes))

    return write
