"""What a measured swarm really did, from its processes' journals. Pure: lists of events in, numbers out.

Useful samples are those in the average of a true round, computed with parameters at most one epoch old.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Events = Sequence[Mapping[str, Any]]

FIRST_BOUNDARY = 1
"""The clock starts when epoch 1 is reached: before that, peers are still finding each other."""
MAX_STALENESS = 1


@dataclass(frozen=True, kw_only=True)
class TrueRound:
    """A round that every trainer got whole."""

    epoch: int
    samples: Mapping[int, int]
    """Trainer -> its samples in the average."""
    group: str = ""
    """Of a bare round: its group's id."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """One run of one kind of swarm."""

    seconds: float
    """From the first to the last boundary, mean of the trainers."""
    useful_samples: int
    useful_by_trainer: tuple[int, ...]
    num_true_rounds: int
    num_rounds: int
    """Epochs in the clock."""
    num_stale_samples: int
    loss: float
    """Held-out, after the last round has been stepped; mean of the trainers."""
    cpu: tuple[Mapping[str, float], ...]
    """By trainer: CPU seconds in the clock, and `num_samples` computed."""

    @property
    def samples_per_second(self) -> float:
        return self.useful_samples / self.seconds


def account(trainers: Sequence[Events], *, num_epochs: int, rounds: Sequence[TrueRound]) -> Account:
    """Count what happened between boundaries FIRST_BOUNDARY and `num_epochs`."""
    clocked = [r for r in rounds if FIRST_BOUNDARY <= r.epoch < num_epochs]
    stale = [stale_samples(events, trainer=i, rounds=rounds) for i, events in enumerate(trainers)]
    by_trainer = [
        sum(r.samples.get(i, 0) - stale[i][r.epoch] for r in clocked) for i in range(len(trainers))
    ]  # fmt: skip
    spans = [(boundary(events, FIRST_BOUNDARY), boundary(events, num_epochs)) for events in trainers]
    ends = [next(e for e in events if e["event"] == "end") for events in trainers]
    return Account(
        seconds=sum(b["clock"] - a["clock"] for a, b in spans) / len(spans),
        useful_samples=sum(by_trainer),
        useful_by_trainer=tuple(by_trainer),
        num_true_rounds=len(clocked),
        num_rounds=num_epochs - FIRST_BOUNDARY,
        num_stale_samples=sum(s[r.epoch] for s in stale for r in clocked),
        loss=sum(end["loss"] for end in ends) / len(ends),
        cpu=tuple(_difference(a["cpu"], b["cpu"]) for a, b in spans),
    )


def boundary(events: Events, epoch: int) -> Mapping[str, Any]:
    """When this trainer first was at `epoch` or beyond it."""
    return next(e for e in events if e["event"] == "boundary" and e["epoch"] >= epoch)


def bare_rounds(trainers: Sequence[Events]) -> list[TrueRound]:
    """Bare hivemind's rounds that are true: one group of all, all of the vector came back to each, nobody banned."""
    told: dict[str, dict[int, Mapping[str, Any]]] = {}
    for trainer, events in enumerate(trainers):
        for event in events:
            if event["event"] == "bare_round" and "group" in event:
                told.setdefault(event["group"], {})[trainer] = event
    found = []
    for members in told.values():
        is_whole = all(m["received"] >= 1.0 and not m["num_banned"] for m in members.values())
        if is_whole and len(members) == len(trainers) == members[0]["group_size"]:
            # `weight` is what the all-reduce used; `num_samples` what the trainer thinks it gave.
            samples = {i: int(m["weight"]) for i, m in members.items()}
            if all(samples.values()):
                epoch = max(m["epoch"] for m in members.values())
                found.append(TrueRound(epoch=epoch, samples=samples, group=members[0]["group"]))
    return sorted(found, key=lambda r: r.epoch)


def our_rounds(trainers: Sequence[Events]) -> list[TrueRound]:
    """Our rounds that are true for every trainer, with one digest, as each trainer's own reports say."""
    names = [next(e["peer_id"] for e in events if e["event"] == "ready") for events in trainers]
    by_epoch: dict[int, list[Mapping[str, Any]]] = {}
    for events in trainers:
        for event in events:
            if event["event"] == "round" and event["is_true"]:
                by_epoch.setdefault(event["epoch"], []).append(event)
    found = []
    for epoch, told in sorted(by_epoch.items()):
        if len(told) == len(trainers) and len({t["digest"] for t in told}) == 1:
            weights = told[0]["weights"]
            found.append(
                TrueRound(epoch=epoch, samples={i: int(weights[n]) for i, n in enumerate(names) if n in weights})
            )
    return found


def control_rounds(trainers: Sequence[Events], *, target_batch_size: int) -> list[TrueRound]:
    """What the control claims: that everybody's samples were in an average. The loss has to show that it lies."""
    share = target_batch_size // len(trainers)
    epochs = {e["epoch"] - 1 for events in trainers for e in events if e["event"] == "boundary" and e["epoch"]}
    return [TrueRound(epoch=e, samples=dict.fromkeys(range(len(trainers)), share)) for e in sorted(epochs)]


def stale_samples(events: Events, *, trainer: int, rounds: Sequence[TrueRound]) -> Counter[int]:
    """Epoch -> samples of this trainer in its average that were computed more than MAX_STALENESS epochs before.

    Samples enter averages in the order in which they were computed. Bare hivemind clears its accumulators when it
    begins to average, whatever comes of it, so untrue rounds take their samples with them; ours give them back.
    """
    queue = deque((e["epoch"], e["num_samples"]) for e in events if e["event"] == "micro")
    stale: Counter[int] = Counter()
    for epoch, left in _taken(events, trainer=trainer, rounds=rounds):
        while left > 0 and queue:
            computed_at, number = queue.popleft()
            taken = min(left, number)
            left -= taken
            if taken < number:
                queue.appendleft((computed_at, number - taken))
            if epoch is not None and epoch - computed_at > MAX_STALENESS:
                stale[epoch] += taken
    return stale


def _taken(events: Events, *, trainer: int, rounds: Sequence[TrueRound]) -> list[tuple[int | None, int]]:
    """What left this trainer's accumulator, in order: (epoch, or None if the round was not true; samples)."""
    begun = [e for e in events if e["event"] == "bare_round"]
    if not begun:
        return [(each.epoch, each.samples.get(trainer, 0)) for each in rounds]
    epochs = {each.group: each.epoch for each in rounds}
    return [(epochs.get(e.get("group", "")), e["num_samples"]) for e in begun]


def _difference(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {key: after[key] - before.get(key, 0.0) for key in after}
