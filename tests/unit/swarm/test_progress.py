"""Who ends an epoch when there are only clients: nobody, for nobody could hand the result to a newcomer."""

import math
from typing import Any

import pytest
from hivemind.p2p import PeerID
from hivemind.utils import ValueWithExpiration, get_dht_time

from calm_ray.swarm.progress import ProgressTracker

TARGET = 100


class NoDHT:
    """The tracker's own peer, and no records: what it reads is handed to it by the tests."""

    client_mode = False
    peer_id = PeerID(b"self")

    def add_validators(self, validators: Any) -> None: ...
    def get(self, key: str, *, latest: bool) -> None: ...


def tracker(*, is_follower: bool) -> ProgressTracker:
    return ProgressTracker(NoDHT(), "tiny", TARGET, is_follower=is_follower, start=False)


def see(tracker: ProgressTracker, *peers: tuple[int, int, bool]) -> None:
    """Let the tracker read records of (epoch, samples, client mode), as its thread does every few seconds."""
    now = get_dht_time()
    metadata = {
        f"key {number}".encode(): ValueWithExpiration(
            {
                "peer_id": b"peer %d" % number, "epoch": epoch, "samples_accumulated": num_samples,
                "samples_per_second": 0.001, "time": now, "client_mode": client_mode,
            },
            now + 60,
        )
        for number, (epoch, num_samples, client_mode) in enumerate(peers)
    }  # fmt: skip
    metadata[b"one that has left"] = ValueWithExpiration(None, now + 60)
    tracker.global_progress = tracker._parse_swarm_progress_data(metadata)


CLIENT, FULL = True, False


@pytest.mark.parametrize("peers", [(), ((0, TARGET, CLIENT),), ((0, 80, CLIENT), (0, 80, CLIENT))])
def test_follower_among_clients_does_not_end_an_epoch(peers: tuple[tuple[int, int, bool], ...]) -> None:
    follower = tracker(is_follower=True)
    see(follower, *peers)
    follower.report_local_progress(local_epoch=0, samples_accumulated=2 * TARGET)
    assert follower.awaits_full_peer
    assert not follower.ready_to_update_epoch
    assert follower.estimated_next_update_time == math.inf


def test_follower_goes_on_when_a_full_peer_comes() -> None:
    follower = tracker(is_follower=True)
    see(follower, (0, TARGET, CLIENT))
    see(follower, (0, TARGET, CLIENT), (0, 1, FULL))
    assert not follower.awaits_full_peer
    assert follower.ready_to_update_epoch
    assert follower.estimated_next_update_time < math.inf


def test_full_peer_ends_an_epoch_whoever_is_there() -> None:
    full = tracker(is_follower=False)
    for others in ((), ((0, 1, CLIENT),), ((0, 1, FULL),)):
        see(full, (0, TARGET, FULL), *others)
        assert not full.awaits_full_peer
        assert full.ready_to_update_epoch


def test_newcomer_learns_of_the_epoch_that_only_clients_have() -> None:
    """Then it asks for their state, gets none, and says so. Stock would start at epoch 0, and average with them."""
    newcomer = tracker(is_follower=False)
    see(newcomer, (7, 10, CLIENT), (6, 10, CLIENT))
    assert newcomer.global_epoch == 7
    assert newcomer.global_progress.num_peers == newcomer.global_progress.num_clients == 2


def test_client_cannot_lead_full_peers_away() -> None:
    """As stock: what clients say of their epoch counts for nothing while a full peer trains."""
    full = tracker(is_follower=False)
    see(full, (3, 10, FULL), (1_000_000, 10, CLIENT))
    assert full.global_epoch == 3
    assert full.global_progress.num_clients == 1
