"""What the step controller needs of a wire, and hivemind's wire behind it. Our own is in `averaging.py`."""

from collections.abc import Callable, Collection
from typing import Protocol

import torch

from calm_ray.errors import StateUnavailable, SwarmUnreachable
from calm_ray.swarm.group import Kind
from calm_ray.swarm.limits import round_limits
from calm_ray.swarm.node import Swarm
from calm_ray.swarm.progress import ProgressTracker
from calm_ray.swarm.stock import StockAveraging
from calm_ray.swarm.verdict import RoundResult
from calm_ray.tables import AveragingTable

Take = Callable[[], tuple[torch.Tensor, float] | None]
"""Called when the group stands: (flat fp32 vector, its weight), or None to only receive."""

BYTES_PER_ELEMENT = {"none": 4, "fp16": 2, "8bit": 1}
NUM_ROUNDS_IN_A_TURN = 4
"""Of the rounds thread: two tries to average gradients, the parameters, and a late reading."""
NUM_STOCK_MEMBERS = 16
"""Members that the limits on hivemind's wire allow for: they are set before the swarm is known."""


class Behind(Exception):
    """The round that we looked for is over elsewhere."""

    def __init__(self, epoch: int, peer_id: str) -> None:
        super().__init__(f"{peer_id} is at epoch {epoch}")
        self.epoch, self.peer_id = epoch, peer_id


class Wire(Protocol):
    """One round after another, for one thread."""

    lead_seconds: float
    """Begin to look for a group so long before the epoch is full."""

    def average(self, kind: Kind, epoch: int, take: Take) -> RoundResult:
        """One round. Blocks, within bounds; raises Behind if others are past it, nothing else of others' making."""
        ...

    def has_company(self) -> bool:
        """Whether anybody else is there to average with."""
        ...

    @property
    def is_forsaken(self) -> bool:
        """Whether those who were there have fallen silent not long ago, without leaving."""
        ...

    @property
    def patience_seconds(self) -> float:
        """The longest that two tries of a round, a state round and a late reading can take together."""
        ...

    @property
    def num_missing(self) -> int | None:
        """Peers that the group which we lead waits for; None if we lead none."""
        ...

    @property
    def is_out_of_step(self) -> bool: ...
    @property
    def out_of_step(self) -> Collection[str]: ...
    def is_state_due(self, epoch: int) -> bool: ...
    def close_state_round(self, epoch: int) -> None: ...
    def forget_group(self) -> None: ...
    def distrust(self, peer_id: str) -> None: ...
    def fetch_last(self, donor: str, *, epoch: int) -> torch.Tensor: ...
    def close(self) -> None: ...


class StockWire:
    """hivemind 1.1's: no digests, no repair, no late reading; who misses a round downloads the state.

    Make it before any thread runs: it forks. Bare peers look for the next group before the epoch ends, so we do.
    """

    is_out_of_step, is_forsaken, num_missing = False, False, None
    out_of_step: Collection[str] = ()

    def __init__(
        self, swarm: Swarm, *, shapes: list[torch.Size], table: AveragingTable, max_weight: float,
    ) -> None:  # fmt: skip
        self._swarm, self._table = swarm, table
        self._limits = round_limits(
            num_bytes=sum(s.numel() for s in shapes) * BYTES_PER_ELEMENT[table.compression],
            num_members=NUM_STOCK_MEMBERS, network=table.network, matchmaking_seconds=table.matchmaking_seconds,
            averaging_timeout_seconds=table.averaging_timeout_seconds,
        )  # fmt: skip
        self.lead_seconds = self._limits.matchmaking_seconds
        self._stock = StockAveraging(
            swarm, shapes=shapes, compression=table.compression, limits=self._limits, max_weight=max_weight
        )
        self._tracker: ProgressTracker | None = None

    def follow(self, tracker: ProgressTracker) -> None:
        """The tracker's threads start after our processes have forked."""
        self._tracker = tracker

    def has_company(self) -> bool:
        assert self._tracker is not None
        return bool(self._tracker.records.keys() - {self._swarm.peer_id})

    @property
    def patience_seconds(self) -> float:
        return NUM_ROUNDS_IN_A_TURN * (2 * self._limits.matchmaking_seconds + self._limits.round_seconds)

    def average(self, kind: Kind, epoch: int, take: Take) -> RoundResult:
        if not self._stock.is_alive():
            raise SwarmUnreachable("an averaging process has ended")  # again and again, until our watchdog restarts us
        timeout = 2 * self._limits.matchmaking_seconds + self._limits.round_seconds
        return self._stock.average(kind, epoch, take, timeout_seconds=timeout)

    def is_state_due(self, epoch: int) -> bool:
        return epoch % self._table.average_state_every == 0 and self.has_company()

    def close_state_round(self, epoch: int) -> None: ...
    def forget_group(self) -> None: ...
    def distrust(self, peer_id: str) -> None: ...

    def fetch_last(self, donor: str, *, epoch: int) -> torch.Tensor:
        raise StateUnavailable(f"{donor}: peers keep no average of epoch {epoch} on hivemind's wire")

    def close(self) -> None:
        self._stock.close()
