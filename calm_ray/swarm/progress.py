"""Where the swarm is, as its peers' progress records say: hivemind's tracker, made safe for swarms without a full peer.

Only full peers can hand their state to newcomers, so stock takes the epoch from them alone. While every trainer is a
client, stock lets each keep an epoch of its own and average gradients of unequal models, without a word. Here an epoch
ends only if some full peer trains, and clients' epochs count while no full peer does: a newcomer then learns that
nobody can give it the state, rather than start another model.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hivemind.optim.progress_tracker import GlobalTrainingProgress
from hivemind.optim.progress_tracker import ProgressTracker as _ProgressTracker


class ProgressTracker(_ProgressTracker):
    """A follower (client or auxiliary peer) never ends an epoch on its own."""

    def __init__(self, *args: Any, is_follower: bool, **kwargs: Any) -> None:
        self._is_follower = is_follower
        super().__init__(*args, **kwargs)

    @property
    def awaits_full_peer(self) -> bool:
        """Whether this follower has nobody to follow."""
        return self._is_follower and self.global_progress.num_clients >= self.global_progress.num_peers

    @property
    def ready_to_update_epoch(self) -> bool:
        return super().ready_to_update_epoch and not self.awaits_full_peer

    @property
    def estimated_next_update_time(self) -> float:
        return float("inf") if self.awaits_full_peer else float(super().estimated_next_update_time)

    def _parse_swarm_progress_data(self, metadata: Any) -> GlobalTrainingProgress:
        entries = metadata if isinstance(metadata, Mapping) else {}
        present = [entry.value for entry in entries.values() if entry.value is not None]
        if not present or not all(value["client_mode"] for value in present):
            return super()._parse_swarm_progress_data(metadata)
        as_full = {
            subkey: replace(entry, value=entry.value and {**entry.value, "client_mode": False})
            for subkey, entry in entries.items()
        }
        return replace(super()._parse_swarm_progress_data(as_full), num_clients=len(present))
