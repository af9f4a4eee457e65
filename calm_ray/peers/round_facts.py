"""What a peer's report says of its rounds. Pure.

A report must be publishable whatever happened: numbers that came from other peers are held to the report's bounds.
"""

import hashlib
import math
from typing import TYPE_CHECKING, get_args

from calm_ray.report import MAX_COUNT, MAX_LISTED, MAX_REPORTS, Outcome, RoundCounts, RoundReport

if TYPE_CHECKING:
    from calm_ray.swarm.tally import RoundTally
    from calm_ray.swarm.verdict import RoundResult

MAX_SAMPLES = 1e6
MAX_TOTAL = 1e9
MAX_SECONDS = 1e6
MAX_BYTES = 10**13
MAX_NORM = 1e30
MAX_CONTRIBUTED = 10**15
SUFFIX_LENGTH = 10


def round_facts(tally: "RoundTally") -> dict[str, object]:
    """Fields of `PeerReport`, by name."""
    norm = tally.parameter_norm
    return {
        "rounds": RoundCounts(**{o: min(tally.by_outcome[o], MAX_COUNT) for o in get_args(Outcome)}),
        "last_round": _report_of(tally.last, epoch=tally.last_epoch) if tally.last is not None else None,
        "last_group_size": min(tally.last_group_size, MAX_REPORTS),
        "samples_contributed": min(tally.samples_averaged, MAX_CONTRIBUTED),
        "num_resyncs": min(tally.num_resyncs, MAX_COUNT),
        "parameter_norm": norm if math.isfinite(norm) and 0 < norm <= MAX_NORM else None,
    }


def _report_of(result: "RoundResult", *, epoch: int) -> RoundReport:
    return RoundReport(
        epoch=min(epoch, MAX_COUNT),
        outcome=result.outcome,
        digest=result.digest,
        group_size=min(result.group_size, MAX_REPORTS),
        total_weight=_bounded(result.total_weight, MAX_TOTAL),
        weights=_listed(result),
        num_banned=min(len(result.banned), MAX_REPORTS),
        seconds=_bounded(result.seconds, MAX_SECONDS),
        bytes_sent=min(result.bytes_sent, MAX_BYTES),
        bytes_received=min(result.bytes_received, MAX_BYTES),
    )


def _listed(result: "RoundResult") -> dict[str, float]:
    """Weights by the end of the peer id. Of more than MAX_LISTED, those that the round's digest draws: all members list
    the same ones, so they can be compared, and other ones each time, so that everybody is seen."""

    def draw(peer_id: str) -> bytes:
        return hashlib.sha256(f"{result.digest} {peer_id}".encode()).digest()

    chosen = sorted(result.weights, key=draw)[:MAX_LISTED]
    return {peer_id[-SUFFIX_LENGTH:]: _bounded(result.weights[peer_id], MAX_SAMPLES) for peer_id in sorted(chosen)}


def _bounded(value: float, limit: float) -> float:
    return min(max(0.0, value), limit) if math.isfinite(value) else 0.0
