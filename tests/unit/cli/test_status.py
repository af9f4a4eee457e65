"""What `calm-ray status` prints of one peer on this machine."""

from typing import Any

import pytest

from calm_ray.cli.status import _numbers
from calm_ray.peers.status import PeerStatus
from calm_ray.report import PeerReport, RoundCounts


def status(role: str, **changes: Any) -> PeerStatus:
    values: dict[str, Any] = {
        "peer_id": "Qma", "boot_id": "b1", "role": role, "version": "0.1.0", "config_hash": "ab", "state": "training",
        "is_client_mode": False, "epoch": 12, "samples_per_second": 14.25, "published_at": 1.0,
        "rounds": RoundCounts(averaged=40, timeout=1),
    }  # fmt: skip
    return PeerStatus(role=values["role"], report=PeerReport(**(values | changes)))


@pytest.mark.parametrize(
    ("role", "words"),
    [
        ("trainer", "  epoch 12, 14.2 samples/s, rounds: 40 averaged, 1 timed out"),
        ("auxiliary", "  epoch 12, rounds: 40 averaged, 1 timed out"),
        ("monitor", "  epoch 12"),
    ],
)
def test_numbers_of_a_role_are_what_it_does(role: str, words: str) -> None:
    assert _numbers(status(role)) == words


def test_numbers_of_a_peer_that_has_not_reported_are_none() -> None:
    assert _numbers(PeerStatus(role="trainer")) == ""
