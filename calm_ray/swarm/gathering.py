"""Who leads a round, who has come to it, and when it begins. Pure but for the clock."""

import asyncio
import hashlib
import time

from calm_ray.swarm.group import Kind
from calm_ray.swarm.limits import RoundLimits
from calm_ray.swarm.messages import Ticket
from calm_ray.swarm.verdict import Outcome
from calm_ray.swarm.wires import Behind

Key = tuple[Kind, int]


class NoGroup(Exception):
    """Nobody to average with this time."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.outcome: Outcome = outcome


def rank_of(peer_id: str, *, run_id: str, key: Key) -> bytes:
    """Smallest leads. Changes with every round, so the work goes round too."""
    return hashlib.sha256(f"{run_id}/{key[0]}/{key[1]}/{peer_id}".encode()).digest()


def should_begin(
    *, num_here: int, num_missing: int, num_unreachable: int, age: float, quorum_age: float | None, limits: RoundLimits
) -> bool:
    """Whether a leader goes ahead. `num_missing`: those expected who may still come. `num_unreachable`: those who did
    not answer its call; they are not waited for, but they count. `quorum_age`: seconds since most were there, if so."""
    if not is_quorum(num_here=num_here, num_others=num_missing + num_unreachable):
        return False
    if num_missing == 0 or age >= limits.matchmaking_seconds:
        return True
    return quorum_age is not None and quorum_age >= limits.grace_seconds


def is_quorum(*, num_here: int, num_others: int) -> bool:
    """A minority must not step: the others may be doing so already, and just be too busy to answer."""
    return num_here >= 2 and num_here > num_others


class Gathering:
    """Those who asked us to lead one round, and what we heard from those whom we asked to come."""

    def __init__(self) -> None:
        self.tickets: dict[str, Ticket] = {}
        self.opened_at = time.monotonic()
        self.quorum_at: float | None = None
        """When most of those expected were there. Kept while the leader looks whether a better one has come up."""
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.called: set[str] = set()
        self.unreachable: set[str] = set()
        self.begun_by: str | None = None
        """Somebody who says that this round has begun elsewhere."""
        self.behind: Behind | None = None
