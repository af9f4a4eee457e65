"""The time left, as the job's table shows it, and what it says of peers that fail."""

import re
from pathlib import Path
from typing import Any

import pytest

from calm_ray.actors.desired import ActorReport, Desired, Incident, Member, SupervisorStatus
from calm_ray.peers.status import PeerStatus
from calm_ray.summary import SummaryLimits, SwarmSummary, summarise
from launchers.watch import dead_end, final_checkpoint, news, with_measured_eta

ASKED_AT = 7.0


@pytest.fixture
def summary() -> SwarmSummary:
    limits = SummaryLimits(config_hash="a", num_epochs=40, target_batch_size=64)
    return summarise([], now=0.0, limits=limits).model_copy(update={"epoch": 10})


def test_measured_eta_with_one_boundary_leaves_the_summary_alone(summary: SwarmSummary) -> None:
    assert with_measured_eta(summary, [(10, 5.0)]) == summary


def test_measured_eta_takes_the_median_and_divides_skipped_epochs(summary: SwarmSummary) -> None:
    boundaries = [(5, 0.0), (6, 4.0), (8, 12.0), (9, 100.0), (10, 104.0)]  # 4, 4, 88, 4 seconds per epoch
    assert with_measured_eta(summary, boundaries).seconds_to_end == 30 * 4.0


def member(name: str, state: str = "training", **peer: Any) -> Member:
    role: Any = name.partition("-")[0]
    status = PeerStatus(role=role, state=state, **peer)
    return Member(name=name, role=role, is_there=True, report=ActorReport(peer=status, asked_at=ASKED_AT))


def test_incident_is_told_once_with_its_time() -> None:
    desired = Desired.model_construct()
    first, second = Incident(at=1.0, text="a"), Incident(at=2.0, text="a")
    told: set[Incident] = set()
    for incidents, lines in (((first,), 1), ((first, second), 1), ((second,), 0)):
        status = SupervisorStatus.model_construct(desired=desired, incidents=incidents)
        found = list(news(status, told=told))
        assert len(found) == lines
        assert all(re.fullmatch(r"\d\d:\d\d:\d\d a", line) for line in found)


def test_run_goes_on_while_one_of_each_does(summary: SwarmSummary) -> None:
    gone = {"state": "parked", "error": "no disk"}
    members = [member("auxiliary-0"), member("monitor-0", summary=summary), member("trainer-0")]
    assert end(members) == ""
    assert end([*members, member("auxiliary-1", **gone), member("trainer-1", **gone)]) == ""
    assert "monitor-0 has given up: no disk" in end([members[0], member("monitor-0", **gone), members[2]])
    assert "nobody can join" in end([member("auxiliary-0", **gone), *members[1:]])
    assert "nobody trains" in end([*members[:2], member("trainer-0", **gone)])
    assert end(members[:2]) == "", "volunteers may come"
    assert end([members[0], member("monitor-0"), member("trainer-0", **gone)]) == "", "and nobody knows of them yet"


def test_run_that_is_asked_for_again_has_not_ended_while_its_peers_are_tried_again(summary: SwarmSummary) -> None:
    parked = [member("auxiliary-0", state="parked", error="no disk")]
    assert dead_end(parked, asked_at=ASKED_AT + 1) == "", "it had given up before"
    assert "has given up: no disk" in dead_end(parked, asked_at=ASKED_AT)


def end(members: list[Member]) -> str:
    return dead_end(members, asked_at=ASKED_AT)


def test_last_checkpoint_ends_the_run() -> None:
    assert final_checkpoint([member("monitor-0")], num_epochs=40) is None
    assert final_checkpoint([member("monitor-0", last_checkpoint="/c/epoch-00000039")], num_epochs=40) is None
    found = final_checkpoint([member("monitor-0", last_checkpoint="/c/epoch-00000040")], num_epochs=40)
    assert found == Path("/c/epoch-00000040")
