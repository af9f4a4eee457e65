"""The organiser's one-time work: everything in the run bundle that training needs, made from `[run]`.

    run.json            the table, canonical
    tokenizer/          trained or brought along, checked
    model/config.json   transformers' config, with the tokenizer's true vocabulary
    text/0.txt ...      small corpora, numbered as in data.sources

Signing, and the manifest, are `calm_ray.bundle`'s.
"""

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path

from transformers import AlbertConfig, PreTrainedTokenizerFast

from calm_ray.config import RunTable, parse_table
from calm_ray.errors import ConfigError
from calm_ray.tables import TextSource
from calm_ray.training.data import is_held_out, mix
from calm_ray.training.model import model_config
from calm_ray.training.sources import bundle_text_path, is_bundled, organiser_documents, write_documents
from calm_ray.training.tokenizer import SpecialIds, check_tokenizer, load_tokenizer, train_tokenizer

log = logging.getLogger(__name__)


def write_parts(run: RunTable, *, config_dir: Path, out_dir: Path, tokenizer_dir: Path | None = None) -> None:
    """Write the parts of `run`'s bundle into `out_dir`, which may exist.

    Paths in `run` are relative to `config_dir`, the folder of the config file. `tokenizer_dir` has the tokenizer of a
    run that goes on; without it, it is made as `run` says. Raise ConfigError if a source or the tokenizer is missing,
    empty or unfit.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    for index, source in enumerate(run.data.sources):
        if is_bundled(source):
            documents = organiser_documents(source, config_dir=config_dir)
            _write_text(documents, path=bundle_text_path(out_dir, index), index=index)
    if tokenizer_dir is None:
        tokenizer, where = _make_tokenizer(run, config_dir=config_dir)
    else:
        tokenizer, where = load_tokenizer(tokenizer_dir), str(tokenizer_dir)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    special_ids = check_tokenizer(tokenizer, vocab_size=vocab_size, where=where)
    tokenizer.model_max_length = run.model.max_position_embeddings
    tokenizer.save_pretrained(out_dir / "tokenizer")
    albert_config = model_config(run.model, vocab_size=vocab_size, special_ids=special_ids)
    albert_config.architectures = ["AlbertForPreTraining"]
    albert_config.save_pretrained(out_dir / "model")
    (out_dir / "run.json").write_bytes(run.canonical_json())
    log.info("bundle=%s run_id=%s vocab_size=%d sources=%d", out_dir, run.run_id, vocab_size, len(run.data.sources))


def load_bundle_run(bundle_dir: Path) -> RunTable:
    """Read `[run]` from a bundle, without checking its signature: that was done when it arrived."""
    path = bundle_dir / "run.json"
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{path}: not a run bundle ({exc}); name the folder that holds run.json") from exc
    return parse_table(RunTable, values, where=str(path))


def load_bundle_tokenizer(bundle_dir: Path) -> tuple[PreTrainedTokenizerFast, SpecialIds]:
    """Load the bundle's tokenizer, checked against the bundle's model."""
    path = bundle_dir / "tokenizer"
    tokenizer = load_tokenizer(path)
    vocab_size = load_bundle_model_config(bundle_dir).vocab_size
    return tokenizer, check_tokenizer(tokenizer, vocab_size=vocab_size, where=str(path))


def load_bundle_model_config(bundle_dir: Path) -> AlbertConfig:
    """Read the model's config from a bundle: hand it to `model.build_model`."""
    path = bundle_dir / "model" / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; delete the folder and fetch the bundle again")
    return AlbertConfig.from_json_file(str(path))


def _write_text(documents: Iterator[str], *, path: Path, index: int) -> None:
    if not write_documents(documents, path):
        raise ConfigError(f"data.sources[{index}]: holds no text; add some, or remove the source")


def _make_tokenizer(run: RunTable, *, config_dir: Path) -> tuple[PreTrainedTokenizerFast, str]:
    """Return the tokenizer and what to call it in messages."""
    table = run.tokenizer
    if table.source == "path":
        path = config_dir / str(table.path)
        return load_tokenizer(path), f"tokenizer.path {path}"
    if table.source == "hub":
        from calm_ray.hub import fetch_tokenizer

        path = fetch_tokenizer(str(table.hub_id), revision=table.revision)
        return load_tokenizer(path), f"tokenizer.hub_id {table.hub_id}"
    documents = _training_text(run, config_dir=config_dir)
    tokenizer = train_tokenizer(
        documents, vocab_size=int(table.vocab_size or 0), max_documents=table.max_training_documents
    )
    return tokenizer, "tokenizer, as trained"


def _training_text(run: RunTable, *, config_dir: Path) -> Iterator[str]:
    """Documents for the tokenizer, sources in turn by weight. The held-out ones stay unseen here too."""
    streams = [_of_training(source, run, config_dir) for source in run.data.sources]
    return mix(streams, weights=[source.weight for source in run.data.sources], rng=random.Random(0))


def _of_training(source: TextSource, run: RunTable, config_dir: Path) -> Iterator[str]:
    fraction = run.data.held_out_fraction
    return (d for d in organiser_documents(source, config_dir=config_dir) if not is_held_out(d, fraction=fraction))
