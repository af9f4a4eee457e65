"""What a peer looks after: the words, and the decisions behind them."""

from pathlib import Path

import pytest

from calm_ray.peers.vigil import LEAST_FREE_BYTES, clock_words, disk_state, has_moved, line_words, name_words, own_hosts

FOLDER = Path("/x")


def test_disk_is_told_with_what_is_lost() -> None:
    assert disk_state(FOLDER, free=LEAST_FREE_BYTES, is_writable=True) == ""
    assert disk_state(FOLDER, free=12_000_000, is_writable=True) == (
        "/x: less than 64 MB free: make room, or logs and checkpoints are lost"
    )
    assert "the disk may be read-only" in disk_state(FOLDER, free=10**12, is_writable=False)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({"1.2.3.4"}, {"1.2.3.4"}, False),
        ({"1.2.3.4"}, {"1.2.3.4", "10.0.0.2"}, False),
        ({"1.2.3.4", "10.0.0.2"}, {"10.0.0.2"}, False),
        ({"1.2.3.4"}, {"10.0.0.2"}, True),
        ({"1.2.3.4"}, set(), False),
        (set(), {"10.0.0.2"}, False),
    ],
)
def test_machine_has_moved_once_it_has_only_other_addresses(before: set[str], now: set[str], expected: bool) -> None:
    assert has_moved(frozenset(before), frozenset(now)) is expected


def test_own_hosts_are_those_that_others_could_see() -> None:
    assert not {host for host in own_hosts() if host.startswith(("127.", "fe80", "::1"))}


def test_words_name_side_size_and_remedy() -> None:
    assert clock_words(10.04).startswith("this machine's clock is 10.0 s ahead of the swarm's; set it")
    assert clock_words(-3661.0).startswith("this machine's clock is 3661.0 s behind the swarm's")
    assert "for some seconds; trying" in line_words(31.2)
    assert "for 1 min; trying" in line_words(61.2)
    assert "delete identity.key in one of the two" in name_words(FOLDER)
