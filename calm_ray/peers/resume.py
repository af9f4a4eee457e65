"""A cold start: when nobody alive has a newer state, the last checkpoint becomes the swarm's again, at its own epoch.

Only an auxiliary peer does this; everyone else gets the state from it, as from any swarm. What must not have changed
since is what gives the numbers their meaning: the run's name, the model, the tokenizer and the optimizer. The rest of
`[run]` may, and then counts from now on: batch, rates, number of epochs, averaging. Rejected: comparing the config hash
alone. It would forbid to train a finished run for longer, and miss a tokenizer that was trained anew.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calm_ray.checkpoint.manifest import MANIFEST, folders
from calm_ray.checkpoint.read import Checkpoint, read_checkpoint
from calm_ray.config import RunTable
from calm_ray.errors import CheckpointRejected, ConfigError
from calm_ray.swarm.holder import HeldState
from calm_ray.training.prepare import load_bundle_model_config
from calm_ray.training.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

MODEL_KEYS = (
    "vocab_size", "embedding_size", "hidden_size", "num_hidden_layers", "num_hidden_groups", "num_attention_heads",
    "intermediate_size", "max_position_embeddings",
)  # fmt: skip
"""Of config.json: another value is another model, even where the tensors' shapes are the same. Dropout may change."""


def find_checkpoint(path: Path) -> Checkpoint:
    """Read `path` if it is a checkpoint, else the newest one in that folder that verifies.

    ConfigError if there is none, CheckpointRejected if there are and none verifies.
    """
    if (path / MANIFEST).is_file():
        return read_checkpoint(path)
    found = folders(path)
    if not found:
        raise ConfigError(f"{path}: no checkpoint there; name one, or a folder of them such as out/RUN_ID/checkpoints")
    problems = []
    for _, folder in found:
        try:
            return read_checkpoint(folder)
        except CheckpointRejected as exc:
            logger.warning("checkpoint passed over: %s", exc)
            problems.append(str(exc))
    raise CheckpointRejected(f"{path}: none of {len(found)} checkpoints verifies; the newest: {problems[0]}")


def require_same_run(checkpoint: Checkpoint, *, run: RunTable, bundle: Path) -> None:
    """ConfigError that names what differs, unless `run` can go on from `checkpoint`."""
    where, manifest = checkpoint.folder, checkpoint.manifest
    if manifest.run_id != run.run_id:
        raise ConfigError(f"{where}: a checkpoint of run {manifest.run_id!r}, this is run {run.run_id!r}")
    ours = load_bundle_model_config(bundle).to_dict()
    for key in MODEL_KEYS:
        if checkpoint.model_config.get(key) != ours.get(key):
            raise ConfigError(
                f"{where}: its model has {key} {checkpoint.model_config.get(key)}, this run's has {ours.get(key)}; "
                "a model's shape is fixed once its run has started: change it back, or start a run of another name"
            )
    before = _optimizer_of(checkpoint)
    if before not in (None, run.optimizer.name):
        raise ConfigError(
            f"{where}: was trained with the optimizer {before}, this run has {run.optimizer.name}, which cannot use "
            "its state: change it back, or start a run of another name"
        )
    if load_tokenizer(where).get_vocab() != load_tokenizer(bundle / "tokenizer").get_vocab():
        raise ConfigError(
            f"{where}: its tokenizer is not the run bundle's, so its embeddings would mean other words; put the "
            'checkpoint\'s in: tokenizer.source = "path"'
        )
    if manifest.config_hash != run.config_hash():
        logger.warning("the run's settings have changed since %s was written; those of now count", where)


def held_state(checkpoint: Checkpoint, *, names: Sequence[str]) -> HeldState:
    """The checkpoint as peers hold it. `names`: of the parameters, in the optimizer's order.

    ConfigError if a parameter is missing or unknown.
    """
    parameters = checkpoint.parameters
    if odd := sorted(set(names) ^ parameters.keys()):
        what = "lacks" if odd[0] in names else "has an unknown"
        raise ConfigError(f"{checkpoint.folder}: {what} parameter {odd[0]} ({len(odd)} differ); it is another model's")
    metadata: Any = checkpoint.optimizer_metadata
    if not isinstance(metadata, list) or not all(isinstance(entry, Mapping) for entry in metadata):
        raise CheckpointRejected(f"{checkpoint.folder}: its optimizer's metadata is not what a swarm writes")
    tensors = [*(parameters[name] for name in names), *checkpoint.optimizer_tensors.values()]
    return HeldState(epoch=checkpoint.epoch, optimizer_metadata=[dict(e) for e in metadata], tensors=tensors)


def saved_state(path: Path, *, run: RunTable, bundle: Path, names: Sequence[str]) -> HeldState | None:
    """What a swarm goes on from; None at epoch 0, where every peer makes the initial weights itself.

    Raise ConfigError or CheckpointRejected, in words for the organiser.
    """
    checkpoint = find_checkpoint(path)
    require_same_run(checkpoint, run=run, bundle=bundle)
    if checkpoint.epoch == 0:
        logger.info("checkpoint=%s is of epoch 0: nothing to go on from", checkpoint.folder)
        return None
    logger.info("checkpoint=%s epoch=%d", checkpoint.folder, checkpoint.epoch)
    return held_state(checkpoint, names=names)


def _optimizer_of(checkpoint: Checkpoint) -> object:
    schedule = checkpoint.facts.get("schedule")
    return schedule.get("name") if isinstance(schedule, Mapping) else None
