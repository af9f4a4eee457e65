"""What must hold in the journals of a swarm's peers, whatever happened to it."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Events = Sequence[Mapping[str, Any]]


def of_kind(events: Events, kind: str) -> list[Mapping[str, Any]]:
    return [event for event in events if event["event"] == kind]


def true_rounds(peers: Iterable[Events]) -> dict[int, Mapping[str, Any]]:
    """Epoch -> one peer's account of its true round. AssertionError if two peers' averages differ in a bit."""
    found: dict[int, Mapping[str, Any]] = {}
    for events in peers:
        for event in of_kind(events, "round"):
            if event["is_true"]:
                known = found.setdefault(event["epoch"], event)
                assert known["digest"] == event["digest"], f"epoch {event['epoch']}: two averages"
    return found


def assert_equal_parameters(peers: Mapping[str, Events]) -> dict[int, str]:
    """All peers hold the same bits at the end of each epoch, however they came to them. Return epoch -> digest."""
    at_epoch: dict[int, dict[str, set[str]]] = {}
    for name, events in peers.items():
        last_of_epoch = {event["epoch"]: event["digest"] for event in of_kind(events, "parameters")}
        for epoch, digest in last_of_epoch.items():
            at_epoch.setdefault(epoch, {}).setdefault(digest, set()).add(name)
    unequal = {epoch: digests for epoch, digests in at_epoch.items() if len(digests) > 1}
    assert not unequal, f"parameters differ: {unequal}"
    return {epoch: next(iter(digests)) for epoch, digests in at_epoch.items()}


def assert_every_change_is_a_true_round(peers: Mapping[str, Events]) -> int:
    """No silent local step: parameters change by the average of a true round, and by what is loaded from others.

    Each step's gradient must be the average that some round of that epoch ended with, as told by its digest; between
    two changes the parameters must stay what they were. What is loaded must be what somebody came to by steps. Return
    the number of steps checked.
    """
    made = {
        (event["epoch"], event["digest"])
        for events in peers.values()
        for event in of_kind(events, "parameters")
        if event["by"] != "load"
    }
    digests = {epoch: event["digest"] for epoch, event in true_rounds(peers.values()).items()}
    num_steps = 0
    for name, events in peers.items():
        before: str | None = None
        for event in events:
            if event["event"] == "ready":
                before = None  # a new life
            if event["event"] != "parameters":
                continue
            assert before in (None, event["before"]), f"{name}: parameters changed by themselves before {event}"
            before = event["digest"]
            if event["by"] == "load":
                assert (event["epoch"], event["digest"]) in made, f"{name}: loaded what nobody came to: {event}"
            if event["by"] == "step":
                epoch = event["epoch"] - 1
                assert event["given"] == digests.get(epoch), f"{name}: a step of its own at the end of epoch {epoch}"
                num_steps += 1
    return num_steps


def assert_bounds_hold(peers: Mapping[str, Events], *, slack_seconds: float) -> float:
    """No round lasts longer than its limits say. `slack_seconds`: for a busy machine. Return the longest."""
    longest = 0.0
    for name, events in peers.items():
        for event in of_kind(events, "averaging"):
            assert event["seconds"] <= event["bound_seconds"] + slack_seconds, f"{name}: {event}"
            longest = max(longest, event["seconds"])
    return longest


def batches_by_round(events: Events, *, peer_id: str, rounds: Mapping[int, Mapping[str, Any]]) -> dict[int, list[int]]:
    """Epoch -> this trainer's micro-batches in its average: they enter in the order in which they were computed.

    Only for a trainer that never dropped a sample.
    """
    queue = deque((event["batch"], event["num_samples"]) for event in of_kind(events, "micro"))
    found: dict[int, list[int]] = {}
    for epoch in sorted(rounds):
        left = rounds[epoch]["weights"].get(peer_id, 0.0)
        found[epoch] = []
        while left > 0:
            batch, num_samples = queue.popleft()
            found[epoch].append(batch)
            left -= num_samples
        assert left == 0, f"epoch {epoch}: a round took part of a micro-batch"
    return found


def group_shares(peers: Mapping[str, Events], *, num_epochs: int) -> dict[int, float]:
    """Epoch -> size of its true round's group as a share of the peers that were live then.

    Live is who had begun before the round before this one ended, and has not left, died or failed before it ended. A
    newcomer is thus given one epoch to be heard of, and somebody who dies during a round is missed by it.
    """
    ends = {}
    for epoch in range(num_epochs):
        clocks = [
            event["clock"]
            for events in peers.values()
            for event in of_kind(events, "round")
            if event["is_true"] and event["epoch"] == epoch
        ]
        if clocks:
            ends[epoch] = min(clocks)
    rounds = true_rounds(peers.values())
    lives = [life for events in peers.values() for life in _lives(events)]
    shares = {}
    for epoch, end in ends.items():
        known_before = ends.get(epoch - 1, float("-inf"))
        num_live = sum(begun <= known_before and end < over for begun, over in lives)
        if num_live:
            shares[epoch] = rounds[epoch]["group_size"] / num_live
    return shares


def _lives(events: Events) -> list[tuple[float, float]]:
    """(clock of beginning, clock of its end) of each life of a peer; one that was killed ends with its last line."""
    lives: list[tuple[float, float]] = []
    begun: float | None = None
    last = 0.0
    for event in events:
        if event["event"] == "ready" and begun is not None:
            lives.append((begun, last))
            begun = None
        if event["event"] == "begin":
            begun = event["clock"]
        if event["event"] in ("leaving", "failed") and begun is not None:
            lives.append((begun, event["clock"]))
            begun = None
        last = event["clock"]
    if begun is not None:
        lives.append((begun, last))
    return lives
