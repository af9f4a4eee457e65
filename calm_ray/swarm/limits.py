"""How long each part of a round may take. Pure."""

from dataclasses import dataclass


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
