"""The time left, as the job's table shows it, and what it says of peers that fail."""

import pytest

from calm_ray.peers.status import PeerStatus
from calm_ray.summary import SummaryLimits, SwarmSummary, summarise
from launchers.watch import incident, with_measured_eta


@pytest.fixture
def summary() -> SwarmSummary:
    limits = SummaryLimits(config_hash="a", num_epochs=40, target_batch_size=64)
    return summarise([], now=0.0, limits=limits).model_copy(update={"epoch": 10})


def test_measured_eta_with_one_boundary_leaves_the_summary_alone(summary: SwarmSummary) -> None:
    assert with_measured_eta(summary, [(10, 5.0)]) == summary


def test_measured_eta_takes_the_median_and_divides_skipped_epochs(summary: SwarmSummary) -> None:
    boundaries = [(5, 0.0), (6, 4.0), (8, 12.0), (9, 100.0), (10, 104.0)]  # 4, 4, 88, 4 seconds per epoch
    assert with_measured_eta(summary, boundaries).seconds_to_end == 30 * 4.0


def _status(state: str, *, num_restarts: int = 0, detail: str = "") -> PeerStatus:
    return PeerStatus(role="trainer", state=state, num_restarts=num_restarts, detail=detail)


@pytest.mark.parametrize(
    ("before", "now", "line"),
    [
        (None, _status("starting"), None),
        (_status("training"), _status("training"), None),
        (_status("training"), _status("restarting", num_restarts=1, detail="killed"), "t: restart 1: killed"),
        (_status("restarting", num_restarts=1), _status("joining", num_restarts=1), None),
        (_status("joining", num_restarts=1), _status("training", num_restarts=1), "t: back, training"),
        (_status("joining"), _status("training"), None),
        (_status("training", num_restarts=1), _status("training", num_restarts=1), None),
    ],
)
def test_job_tells_of_restarts_once(before: PeerStatus | None, now: PeerStatus, line: str | None) -> None:
    assert incident("t", before=before, now=now) == line
