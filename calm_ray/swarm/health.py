"""hivemind's rules of thumb, applied by code: what recent rounds say about the times that they were given. Pure.

hivemind's manual asks its readers to raise `matchmaking_time` "if you see 'averaged gradients with N peers' where N is
below 0.9x the real size on >=25% of epochs", and `averaging_timeout` "if you see 'Proceeding with local gradients' at
least 25% of the time". Nobody reads logs at night. Each peer watches its own rounds; whoever leads the next one sets
its limits. The evidence starts anew after each change: what was seen under the old times says nothing of the new ones.

More time does not cure everything: a listed peer that nobody can reach, or one that is slow on purpose, would hold all
others up for ever. So when the longest times did not help either, they fall back to what they were.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median_low

from calm_ray.swarm.verdict import Outcome

WINDOW = 24
"""Rounds looked at, at most."""
MIN_ROUNDS = 8
"""Fewer say nothing: one of three would already be more than the quarter."""
BAD_SHARE = 0.25
GOOD_MEMBERS_SHARE = 0.9
MAX_FACTOR = 4.0
_RAISE, _LOWER = 1.5, 1.25
"""Up fast, down slowly: a group that falls apart costs a round; time that nobody needs costs nothing when all come."""
_TIME_WAS_UP: frozenset[Outcome] = frozenset({"timeout", "partial"})


@dataclass(frozen=True, kw_only=True)
class RoundFact:
    """What one round says about its times."""

    outcome: Outcome
    group_size: int
    """0 if there was no group."""
    num_live: int
    """Peers that should have been in it, ourselves included, as known when matchmaking began."""
    num_too_slow: int = 0
    """Members banned because their time was up."""

    @property
    def is_small(self) -> bool:
        return self.group_size < GOOD_MEMBERS_SHARE * self.num_live

    @property
    def is_slow(self) -> bool:
        num_in_time = self.group_size - self.num_too_slow
        return self.outcome in _TIME_WAS_UP or num_in_time < GOOD_MEMBERS_SHARE * self.group_size


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How many times as long as `round_limits` says by itself."""

    factor: float = 1.0
    is_exhausted: bool = False
    """MAX_FACTOR did not help: no longer waits until things are well."""

    def after(self, *, num_bad: int, num_rounds: int) -> "Patience":
        """What follows from `num_bad` of `num_rounds` rounds; itself if nothing does."""
        is_bad = num_rounds >= MIN_ROUNDS and num_bad >= BAD_SHARE * num_rounds
        if is_bad and self.is_exhausted:
            return self
        if is_bad and self.factor >= MAX_FACTOR:
            return Patience(is_exhausted=True)
        if is_bad:
            return Patience(factor=min(MAX_FACTOR, self.factor * _RAISE))
        if num_rounds < WINDOW:
            return self
        if self.is_exhausted:
            return Patience()
        return Patience(factor=max(1.0, self.factor / _LOWER)) if num_bad == 0 else self


@dataclass(frozen=True, kw_only=True)
class RoundHealth:
    """What has been seen since the last change, and what it led to."""

    matchmaking: Patience = Patience()
    averaging: Patience = Patience()
    recent: tuple[RoundFact, ...] = ()
    """At most WINDOW, oldest first."""
    advice: str = ""
    """A sentence for log and status: the last change and why. Empty while all is well."""


def after_round(health: RoundHealth, fact: RoundFact) -> RoundHealth:
    """`health` with one more round. A round of a peer that knows of nobody else says nothing and is left out."""
    if fact.num_live <= 1:
        return health
    recent = (*health.recent, fact)[-WINDOW:]
    small, slow = [f for f in recent if f.is_small], [f for f in recent if f.is_slow]
    # First the groups: a round that lacks half of its members often ends badly for that alone.
    matchmaking = health.matchmaking.after(num_bad=len(small), num_rounds=len(recent))
    if matchmaking != health.matchmaking:
        finding = _finding_of_small(small, num_rounds=len(recent))
        advice = _advice(finding, what="matchmaking", before=health.matchmaking, now=matchmaking)
        return replace(health, matchmaking=matchmaking, recent=(), advice=advice)
    averaging = health.averaging.after(num_bad=len(slow), num_rounds=len(recent))
    if averaging != health.averaging:
        finding = f"time was up for members in {len(slow)} of {len(recent)} rounds"
        advice = _advice(finding, what="averaging", before=health.averaging, now=averaging)
        return replace(health, averaging=averaging, recent=(), advice=advice)
    is_well = len(recent) == WINDOW and not small and not slow
    return replace(health, recent=recent, advice="" if is_well else health.advice)


def _finding_of_small(small: Sequence[RoundFact], *, num_rounds: int) -> str:
    finding = f"groups had less than {GOOD_MEMBERS_SHARE:.0%} of the live peers in {len(small)} of {num_rounds} rounds"
    if not small:
        return finding
    return f"{finding} (about {median_low(f.group_size for f in small)} of {median_low(f.num_live for f in small)})"


def _advice(finding: str, *, what: str, before: Patience, now: Patience) -> str:
    if now.is_exhausted:
        return f"{finding}, and more time for {what} did not help: it gets its usual time again; is a peer cut off?"
    if now.factor == before.factor:
        return f"{finding}: {what} may get more time again when it needs it"
    return f"{finding}: {what} gets {now.factor:.2g} times its usual time, {before.factor:.2g} times before"
