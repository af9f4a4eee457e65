"""What `calm-ray status` prints of one peer on this machine."""

from typing import Any

import pytest

from calm_ray.cli.status import details, headline
from calm_ray.peers.status import PeerStatus
from calm_ray.report import PeerReport, RoundCounts

NOW = 1000.0


def status(role: str, **changes: Any) -> PeerStatus:
    values: dict[str, Any] = {
        "peer_id": "Qma", "boot_id": "b1", "role": role, "version": "0.1.0", "config_hash": "ab", "state": "training",
        "is_client_mode": False, "epoch": 12, "samples_per_second": 14.25, "published_at": 1.0,
        "rounds": RoundCounts(averaged=40, timeout=1),
    }  # fmt: skip
    return PeerStatus(role=values["role"], report=PeerReport(**values), **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state": "starting"}, "trainer: starting"),
        ({"state": "joining", "detail": "run bundle 43 %", "run_id": "r"}, "trainer of r: joining: run bundle 43 %"),
        ({"state": "training", "run_id": "r"}, "trainer of r: training"),
        (
            {"state": "training", "doing": "waiting for 2 more peers to average with", "run_id": "r"},
            "trainer of r: training: waiting for 2 more peers to average with",
        ),
        (
            {"state": "stalled", "detail": "no progress within 300 s: micro-batches", "run_id": "r"},
            "trainer of r: stalled: no progress within 300 s: micro-batches",
        ),
        ({"state": "parked", "error": "boom (3 times in a row)"}, "trainer: parked: boom (3 times in a row)"),
        (
            {"state": "training", "run_id": "r", "is_other_version": True},
            "trainer of r, of another version of calm-ray: training",
        ),
    ],
)
def test_headline_says_what_a_peer_does_now(changes: dict[str, Any], words: str) -> None:
    assert headline(PeerStatus(role="trainer", **changes)) == words


@pytest.mark.parametrize(
    ("role", "words"),
    [
        ("trainer", "epoch 12, 14.2 samples/s, 0 contributed, rounds: 40 averaged, 1 timed out"),
        ("auxiliary", "epoch 12, rounds: 40 averaged, 1 timed out"),
        ("monitor", "epoch 12"),
    ],
)
def test_numbers_of_a_role_are_what_it_does(role: str, words: str) -> None:
    assert details(status(role), now=NOW) == [words]


def test_peer_that_has_not_reported_has_no_details() -> None:
    assert details(PeerStatus(role="trainer"), now=NOW) == []


def test_success_failures_and_what_is_wrong_have_a_line_each() -> None:
    lines = details(
        status("auxiliary", last_success_at=NOW - 12, restarts={"killed": 2, "stalled": 1}, warnings=("a", "b")),
        now=NOW,
    )
    assert lines[1:] == ["last true round 12 s ago", "restarts: 2 killed, 1 stalled", "warning: a", "warning: b"]
    assert details(status("monitor", last_success_at=NOW + 1), now=NOW)[1] == "last reading 0 s ago"


def test_parked_peer_says_how_it_goes_on() -> None:
    assert "parked.log" in details(PeerStatus(role="trainer", state="parked", error="x"), now=NOW)[-1]
