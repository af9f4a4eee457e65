"""How long each part of a round may take. Pure.

The organiser says once where most peers are, and may set the two times that hivemind has; the rest follows from bytes,
members, bandwidth and what the last rounds took. Rejected: hivemind's four constants (`matchmaking_time`,
`averaging_timeout`, `next_chunk_timeout`, `request_timeout`), set by hand for one model and one kind of line: the
second was 30 s in sahajBERT's code and 600 s in CALM's, and a round with a dead peer could last as long.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

PART_BYTES = 512 << 10
"""Of a stream's window, more or less, and of a part on hivemind's wire: what a sender may have under way between two
signs of life."""
MAX_ROUND_SECONDS = 3600.0

_GRACE_SHARE = 0.2
"""Of matchmaking. When a quorum is there, those still missing are late by a timer or a lost packet, or gone."""
_MARGIN = 2.0
"""Times the expected all-reduce. hivemind's own rule: "around 2x the actual time"."""
_CHUNK_MARGIN = 4.0
"""Times a chunk's turn on a shared uplink: TCP shares a line fairly over seconds, not within one."""
_CHUNK_SHARE = 0.25
"""Of the round, at most: a silent member must be found out while there is time to go on without it."""
_PERCENTILE = 0.9
_MAX_GROWTH = 3.0
"""Times the derived limit, at most, by measured rounds: somebody slow on purpose must not stretch them for ever."""
_MAX_SLOWNESS = 4.0
"""A peer that claims less than this part of its network's bandwidth is not waited for: a claim costs it nothing."""


@dataclass(frozen=True, kw_only=True)
class RoundLimits:
    """Every wait of a round, in seconds. The group's leader sets them, so that all members agree."""

    request_seconds: float
    """For a peer to answer one request."""
    matchmaking_seconds: float
    """From our first knock until the leader begins with whoever is there."""
    grace_seconds: float
    """For those still missing, once a quorum is there."""
    chunk_seconds: float
    """Longest silence of a member that still owes something."""
    round_seconds: float
    """The whole all-reduce, from the group's beginning to the last byte."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """Where most peers of a run are: what holds until something has been measured."""

    upload_bytes_per_second: float
    """Of a slow peer among them."""
    request_seconds: float
    matchmaking_seconds: float
    pause_seconds: float
    """Longest time that a healthy peer is not heard of: lost packets, and machines with better things to do."""
    base_round_seconds: float
    """Of an all-reduce of nothing: connections, codecs, and such pauses."""


NETWORKS: Mapping[Literal["lan", "internet", "slow"], Network] = {
    # One building or one machine: 1 Gbit/s, so bytes hardly count. What counts is CPU: two cores shared by six peers
    # let one of them stand still for seconds. hivemind advises 3 to 5 s of matchmaking.
    "lan": Network(
        upload_bytes_per_second=1e9 / 8, request_seconds=2.5, matchmaking_seconds=5.0, pause_seconds=4.0,
        base_round_seconds=15.0,
    ),
    # 20 Mbit/s is the upload of the slowest home line that a run should serve well; most have up to 100.
    # hivemind advises 10 to 15 s of matchmaking.
    "internet": Network(
        upload_bytes_per_second=20e6 / 8, request_seconds=5.0, matchmaking_seconds=15.0, pause_seconds=8.0,
        base_round_seconds=30.0,
    ),
    # 5 Mbit/s: DSL's and a busy mobile cell's upload, where other people's packets queue before ours for seconds.
    # CALM's volunteers needed 60 s of matchmaking, most of it for groups that hivemind splits; ours are ranked.
    "slow": Network(
        upload_bytes_per_second=5e6 / 8, request_seconds=10.0, matchmaking_seconds=30.0, pause_seconds=16.0,
        base_round_seconds=60.0,
    ),
}  # fmt: skip


def wire_seconds(*, num_bytes: float, bandwidth: float, num_members: int, num_reducers: int) -> float:
    """Seconds that an all-reduce of `num_bytes` keeps the uplinks busy, if all have `bandwidth` (bytes/s).

    A reducer sends its own vector to the other reducers and its average to the other members:
    bytes * ((R - 1) / R + (M - 1) / R). With R = M that is the usual 2 (M - 1) / M.
    """
    reducers = max(1, num_reducers)
    return num_bytes * (reducers - 1 + max(0, num_members - 1)) / reducers / bandwidth


def round_limits(
    *, num_bytes: int, num_members: int, network: Literal["lan", "internet", "slow"],
    num_reducers: int | None = None, slowest_bandwidth: float | None = None, measured_seconds: Sequence[float] = (),
    matchmaking_seconds: float | None = None, averaging_timeout_seconds: float | None = None,
    matchmaking_factor: float = 1.0, averaging_factor: float = 1.0,
) -> RoundLimits:  # fmt: skip
    """The limits of one round.

    `num_bytes`: the vector as encoded. `num_reducers`: members that others can call; None: all of them.
    `slowest_bandwidth`: bytes per second of the slowest member, None if not known. `measured_seconds`: all-reduce
    seconds of the last true rounds in which nobody was banned for being slow; the others last as long as the limit, and
    would feed it. They raise the limit, never lower it: a newcomer is not shut out by those who are fast.

    The two explicit times are the organiser's word: neither rounds nor factors (`swarm/health.py`) change them.
    """
    place = NETWORKS[network]
    slowest = place.upload_bytes_per_second / _MAX_SLOWNESS
    bandwidth = max(slowest, slowest_bandwidth or place.upload_bytes_per_second)
    reducers = num_members if num_reducers is None else num_reducers

    matchmaking = matchmaking_seconds or place.matchmaking_seconds * matchmaking_factor
    on_the_wire = wire_seconds(
        num_bytes=num_bytes, bandwidth=bandwidth, num_members=num_members, num_reducers=reducers
    )  # fmt: skip
    derived = place.base_round_seconds + _MARGIN * on_the_wire
    measured = place.base_round_seconds + _MARGIN * _percentile(measured_seconds)
    grown = max(derived, min(measured, _MAX_GROWTH * derived)) * averaging_factor
    total = averaging_timeout_seconds or min(grown, MAX_ROUND_SECONDS)
    # A sender serves all reducers at once: each waits for its next part while the others get theirs.
    turn = min(PART_BYTES * reducers, num_bytes) / bandwidth
    chunk = place.pause_seconds * averaging_factor + _CHUNK_MARGIN * turn
    return RoundLimits(
        # Longer than matchmaking, and one peer that does not answer costs the whole of it.
        request_seconds=min(place.request_seconds, matchmaking / 2),
        matchmaking_seconds=matchmaking,
        grace_seconds=_GRACE_SHARE * matchmaking,
        chunk_seconds=min(chunk, _CHUNK_SHARE * total),
        round_seconds=total,
    )


def _percentile(seconds: Sequence[float]) -> float:
    """The 90th; 0 of nothing. What is not a duration does not count."""
    durations = sorted(value for value in seconds if math.isfinite(value) and value >= 0)
    return durations[math.ceil(_PERCENTILE * len(durations)) - 1] if durations else 0.0
