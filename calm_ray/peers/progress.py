"""How a peer that takes part in rounds shows its watchdog that it makes progress, and when it last succeeded."""

import time
from collections.abc import Callable

from calm_ray.peers.context import PeerContext
from calm_ray.peers.judge import Pulse
from calm_ray.swarm.rounds import SwarmOptimizer
from calm_ray.swarm.verdict import RoundResult

TURN_SECONDS = 120.0
"""For what a turn of the rounds thread does beside rounds: the step itself, copies, records."""
CATCH_UP_TURNS = 3
"""A peer that stays behind through so many whole turns is lost, whatever it does meanwhile."""


def optimizer_pulses(optimizer: SwarmOptimizer) -> dict[str, Pulse]:
    """The rounds thread turns; and a peer that the swarm has left behind gets nearer to it."""
    patience, doing = optimizer.wire.patience_seconds + TURN_SECONDS, optimizer.doing
    found = {"rounds thread": Pulse(count=doing.turns, allowance_seconds=patience)}
    if optimizer.tracker.global_epoch > optimizer.local_epoch and doing.percent is None:
        found["catching up"] = Pulse(count=optimizer.local_epoch, allowance_seconds=CATCH_UP_TURNS * patience)
    return found


def words(optimizer: SwarmOptimizer) -> str:
    """What the rounds thread is doing, unless it waits for samples."""
    return optimizer.doing.words(num_missing=optimizer.wire.num_missing)


def note_success(context: PeerContext) -> Callable[[RoundResult, int], None]:
    """For `SwarmOptimizer.on_round`."""

    def note(result: RoundResult, _epoch: int) -> None:
        if result.is_true:
            context.note_success(time.time())

    return note
