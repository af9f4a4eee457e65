"""What a swarm under faults has really done: goodput, where the rest went, what one fault cost. Pure.

Useful samples are those in the average of a true round. The limit is what the trainers do alone, all of them computing
at once on this machine, without a swarm.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

TRAINING = "training"
GONE, BACK_OFF, STARTING, JOINING, DOWNLOAD, WAITING = (
    "nobody there", "pause before a restart", "process start, imports", "joining", "downloading the state",
    "told to wait",
)  # fmt: skip
PHASES = (GONE, BACK_OFF, STARTING, JOINING, DOWNLOAD, WAITING)
"""What a trainer can be busy with instead of training."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """A true round."""

    at: float
    """Monotonic seconds: when somebody was first seen to have its result."""
    epoch: int
    samples: Mapping[str, float]
    """By trainer, as the average has them."""
    members: frozenset[str] = frozenset()
    """Who has said that it has the result."""

    @property
    def num_samples(self) -> float:
        return sum(self.samples.values())


@dataclass(frozen=True, kw_only=True)
class Span:
    """A trainer was in `phase` from `start` to `end`."""

    name: str
    start: float
    end: float
    phase: str


@dataclass(frozen=True, kw_only=True)
class Hold:
    """The schedule held `name` down itself."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Shares of what the trainers would have computed alone, while the schedule let them."""

    share: float
    seconds: float
    num_rounds: int
    useful_samples: float
    held_seconds: float
    """Trainer-seconds that are not counted."""
    lost: Mapping[str, float]
    """Cause -> share; with `share` they add up to 1."""


LOST_WORK, SLOWER = "computed, but in no true round", "slower than alone: shared cores, averaging, waiting for a step"


def goodput(
    rounds: Sequence[Round], *, spans: Sequence[Span], holds: Sequence[Hold], computed: float, solo_rate: float,
    num_trainers: int, end: float | None = None,
) -> Goodput:  # fmt: skip
    """From the first of `rounds` to `end`, or to the last of them.

    `solo_rate`: samples per second of one trainer, all of them running; `computed`: samples that the trainers made for
    these rounds, useful or not. ValueError for fewer than two rounds.
    """
    if len(rounds) < 2:
        raise ValueError(f"{len(rounds)} true rounds: nothing to measure")
    start, end = rounds[0].at, rounds[-1].at if end is None else end
    useful = sum(r.num_samples for r in rounds[1:])
    held = sum(_overlap(h.start, h.end, start, end) for h in holds)
    available = num_trainers * (end - start) - held
    limit = solo_rate * available
    lost = dict.fromkeys(PHASES, 0.0)
    for span in spans:
        if span.phase in lost:
            lost[span.phase] += _seconds_of(span, holds=holds, start=start, end=end) / available
    lost[LOST_WORK] = max(0.0, computed - useful) / limit
    share = useful / limit
    lost[SLOWER] = 1.0 - share - sum(lost.values())
    return Goodput(
        share=share, seconds=end - start, num_rounds=len(rounds) - 1, useful_samples=useful, held_seconds=held,
        lost=lost,
    )  # fmt: skip


def _seconds_of(span: Span, *, holds: Sequence[Hold], start: float, end: float) -> float:
    """Without what the schedule is to blame for."""
    own = [h for h in holds if h.name == span.name]
    begin, until = max(span.start, start), min(span.end, end)
    return max(0.0, until - begin) - sum(_overlap(h.start, h.end, begin, until) for h in own)


def _overlap(start: float, end: float, other_start: float, other_end: float) -> float:
    return max(0.0, min(end, other_end) - max(start, other_start))


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one fault."""

    samples: float
    """Not made, or made in vain, by the whole swarm; of the trainer alone while the schedule held it down it is 0."""
    epochs: float
    """The same, in target batches."""


def cost_of(
    rounds: Sequence[Round], *, fault_at: float, back_at: float, rate: float, held_samples: float, target: int
) -> Cost:  # fmt: skip
    """Compare what came with what `rate`, the swarm's own before the fault, had promised.

    From the last round before `fault_at` to the first one at `back_at` or later; `held_samples` are excused.
    """
    before = max((r.at for r in rounds if r.at <= fault_at), default=fault_at)
    after = min((r.at for r in rounds if r.at >= back_at), default=back_at)
    made = sum(r.num_samples for r in rounds if before < r.at <= after)
    samples = rate * (after - before) - made - held_samples
    return Cost(samples=samples, epochs=samples / target)


def rate_of(rounds: Sequence[Round], *, until: float, num_rounds: int = 3) -> float:
    """Samples per second of the last `num_rounds` rounds before `until`; ValueError without two rounds."""
    known = [r for r in rounds if r.at <= until][-num_rounds - 1 :]
    if len(known) < 2:
        raise ValueError("no rate before the first two rounds")
    return sum(r.num_samples for r in known[1:]) / (known[-1].at - known[0].at)


def spans_of(changes: Mapping[str, Sequence[tuple[float, str]]], *, end: float) -> list[Span]:
    """(when, phase) of each trainer, in order, as spans; the last one goes on until `end`."""
    return [
        Span(name=name, start=at, end=until, phase=phase)
        for name, told in changes.items()
        for (at, phase), (until, _) in pairwise([*told, (end, "")])
    ]


def missing_epochs(epochs: Sequence[int], *, first: int, last: int) -> tuple[list[int], list[int]]:
    """(epochs from `first` to `last` that are not in `epochs`, epochs that are there more than once)."""
    counts: dict[int, int] = {}
    for epoch in epochs:
        counts[epoch] = counts.get(epoch, 0) + 1
    missing = [epoch for epoch in range(first, last + 1) if epoch not in counts]
    return missing, sorted(epoch for epoch, count in counts.items() if count > 1)
