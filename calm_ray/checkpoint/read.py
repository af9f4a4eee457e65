"""Load a checkpoint back into tensors. Verifies it first, always: a swarm's cold start copies it to every peer."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from calm_ray.checkpoint.manifest import CONFIG, MODEL, OPTIMIZER, STATE, Manifest, folders
from calm_ray.checkpoint.verify import verify_checkpoint
from calm_ray.errors import CheckpointRejected

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What `write_checkpoint` was given, on the CPU."""

    folder: Path
    manifest: Manifest
    parameters: Mapping[str, Tensor]
    optimizer_tensors: Mapping[str, Tensor]
    """In the order of their names; of a sequence, `.values()` is that sequence."""
    optimizer_metadata: Any
    model_config: Mapping[str, Any]
    facts: Mapping[str, Any]

    @property
    def epoch(self) -> int:
        return self.manifest.epoch


def read_checkpoint(folder: Path) -> Checkpoint:
    """Verify and load; CheckpointRejected if it does not verify."""
    manifest = verify_checkpoint(folder)
    state = json.loads((folder / STATE).read_bytes())
    return Checkpoint(
        folder=folder,
        manifest=manifest,
        parameters=_sorted(load_file(folder / MODEL)),
        optimizer_tensors=_sorted(load_file(folder / OPTIMIZER)),
        optimizer_metadata=state.get("optimizer_metadata"),
        model_config=json.loads((folder / CONFIG).read_bytes()),
        facts=state.get("facts") or {},
    )


def latest(out_dir: Path) -> Path | None:
    """The newest checkpoint that verifies; None if there is none. Says in the log which ones do not, and why."""
    for _, folder in folders(out_dir):
        try:
            verify_checkpoint(folder)
        except CheckpointRejected as exc:
            logger.warning("checkpoint passed over: %s", exc)
            continue
        return folder
    return None


def _sorted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors keeps tensors in the order of their sizes."""
    return dict(sorted(tensors.items()))
