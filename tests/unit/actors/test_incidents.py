"""What people are told of a peer, once each."""

from typing import Any

import pytest

from calm_ray.actors.desired import ActorReport
from calm_ray.actors.incidents import incidents_of
from calm_ray.peers.status import PeerStatus


def report(
    state: str, *, worker: int = 1, adopted: bool = False, revivals: int = 0, pid: int = 7, **peer: Any
) -> ActorReport:
    status = PeerStatus(role="trainer", state=state, pid=pid, **peer)
    return ActorReport(peer=status, worker_pid=worker, is_adopted=adopted, num_revivals=revivals)


@pytest.mark.parametrize(
    ("before", "now", "lines"),
    [
        (None, report("starting"), []),
        (report("training"), report("training"), []),
        (report("training"), report("restarting", num_restarts=1, detail="killed"), ["t: restart 1: killed"]),
        (None, report("restarting", num_restarts=1, detail="killed"), ["t: restart 1: killed"]),
        (report("restarting", num_restarts=1), report("joining", num_restarts=1), []),
        (report("joining", num_restarts=1), report("training", num_restarts=1), ["t: back, training"]),
        (report("joining"), report("training"), []),
        (report("training", num_restarts=1), report("training", num_restarts=1), []),
        (report("training"), report("restarting", revivals=1, detail="gone"), ["t: starting it again: gone"]),
        (report("starting", revivals=1, pid=8), report("training", revivals=1, pid=8), ["t: back, training"]),
        (report("restarting"), report("parked", error="no disk"), ["t: has given up: no disk"]),
        (report("parked"), report("parked"), []),
        (report("watching"), report("starting", worker=2, pid=0), []),
        (
            report("starting", worker=2, pid=0),
            report("watching", worker=2, adopted=True, num_restarts=3),
            ["t: adopted, process 7 had gone on"],
        ),
        (None, report("watching", adopted=True, num_restarts=3), []),
    ],
)
def test_incident_is_told_once(before: ActorReport | None, now: ActorReport, lines: list[str]) -> None:
    assert list(incidents_of("t", before=before, now=now)) == lines


def test_trainer_whose_actor_was_lost_is_told_to_be_back() -> None:
    before, now = report("joining"), report("training")
    assert list(incidents_of("t", before=before, now=now, has_failed=True)) == ["t: back, training"]
