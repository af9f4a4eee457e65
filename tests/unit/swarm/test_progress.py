"""Where the swarm is, as its records say: when an epoch is full, who may end it, and how often we write."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.optim import progress_tracker as stock
from hivemind.p2p import PeerID
from hivemind.utils import ValueWithExpiration
from hivemind.utils.crypto import RSAPrivateKey

from calm_ray.swarm import progress
from calm_ray.swarm.progress import (
    MAX_PAUSE_SECONDS,
    MAX_RECORDS,
    MAX_REPORT_SECONDS,
    MIN_REPORT_SECONDS,
    MIN_REPORTED_SHARE,
    ProgressTracker,
)
from calm_ray.swarm.records import owner_of

TARGET = 100
CLIENT, FULL = True, False
START = 1_000_000.0
Record = tuple[int, int, bool]
"""Epoch, samples, client mode."""


class NoDHT:
    """The tracker's own peer, and no records: what it reads is handed to it by the tests."""

    peer_id = PeerID(b"self")

    def __init__(self, *, client_mode: bool) -> None:
        self.client_mode = client_mode

    def add_validators(self, validators: Any) -> None: ...
    def get(self, key: str, **kwargs: Any) -> None: ...


class Clock:
    now = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(progress, "get_dht_time", clock)
    monkeypatch.setattr(stock, "get_dht_time", clock)
    return clock


def tracker(*, client_mode: bool = FULL, holders: bool = False) -> ProgressTracker:
    return ProgressTracker(
        NoDHT(client_mode=client_mode), "tiny", TARGET, client_mode=client_mode, start=False,
        has_holders=lambda: holders,
    )  # fmt: skip


def record(number: int, peer: Record, *, time: float = START, **changes: Any) -> dict[str, Any]:
    epoch, num_samples, client_mode = peer
    return {
        "peer_id": b"peer %d" % number, "epoch": epoch, "samples_accumulated": num_samples,
        "samples_per_second": 0.001, "time": time, "client_mode": client_mode, **changes,
    }  # fmt: skip


def see(tracker: ProgressTracker, *peers: Record, **changes: Any) -> None:
    """Let the tracker read these records, as its thread does every few seconds."""
    metadata = {
        f"key {number}".encode(): ValueWithExpiration(record(number, peer, **changes), START + 60)
        for number, peer in enumerate(peers)
    }
    metadata[b"one that has left"] = ValueWithExpiration(None, START + 60)
    tracker.global_progress = tracker._parse_swarm_progress_data(metadata)


# --- when an epoch is full -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "is_full"), [((99,), False), ((100,), True), ((50, 49), False), ((50, 50), True), ((0, 0), False)]
)
def test_epoch_is_full_when_records_of_it_say_so(clock: Clock, samples: tuple[int, ...], is_full: bool) -> None:
    found = tracker()
    see(found, *((0, number, FULL) for number in samples))
    assert found.is_epoch_full is is_full
    assert found.share_done == pytest.approx(sum(samples) / TARGET)


def test_samples_of_other_epochs_do_not_fill_this_one(clock: Clock) -> None:
    found = tracker()
    see(found, (4, 60, FULL), (5, 60, FULL))
    assert found.global_epoch == 5
    assert not found.is_epoch_full


def test_epoch_is_foreseen_by_rates_between_two_reads(clock: Clock) -> None:
    """Records are seconds old; waiting for the next read would waste what was computed since."""
    found = tracker()
    see(found, (0, 80, FULL), samples_per_second=10.0)
    assert not found.is_epoch_full
    clock.now += 2.1
    assert found.is_epoch_full


def test_epoch_is_not_full_by_rates_alone(clock: Clock) -> None:
    """Trainers that have stopped, or left, would go on in our extrapolation: rounds in which nobody brings anything."""
    found = tracker()
    see(found, (0, int(MIN_REPORTED_SHARE * TARGET) - 1, FULL), samples_per_second=10.0)
    clock.now += 3600
    assert found.global_progress.eta_next_epoch < clock.now
    assert not found.is_epoch_full


def test_trainers_that_stopped_at_the_epochs_begin_never_fill_it(clock: Clock) -> None:
    found = tracker()
    see(found, (7, 0, FULL), (7, 0, FULL), samples_per_second=100.0)
    clock.now += 3600
    see(found, (7, 0, FULL), (7, 0, FULL), samples_per_second=100.0, time=START)
    assert not found.is_epoch_full


def test_epoch_is_nearly_full_only_for_wires_that_look_ahead(clock: Clock) -> None:
    found = tracker()
    see(found, (0, 50, FULL), samples_per_second=10.0)
    assert found.is_nearly_full(6.0)
    assert not found.is_nearly_full(4.0)
    clock.now += 100
    assert not found.is_nearly_full(0.0), "our own wire needs no time ahead"


def test_absurd_rates_and_counts_are_only_absurd(clock: Clock) -> None:
    """Whatever a record says, reading it does not fail."""
    found = tracker()
    for changes in (
        {"samples_per_second": math.inf}, {"samples_accumulated": 2**63}, {"time": math.nan}, {"time": -1e300},
        {"time": 1e300}, {"samples_per_second": 1e308, "time": -1e308}, {"peer_id": b""},
    ):  # fmt: skip
        see(found, (0, 10, FULL), (0, 10, FULL), **changes)
        assert found.is_epoch_full in (True, False)
        assert found.global_progress.next_fetch_time < clock.now + 60


def test_epoch_that_nobody_can_show_is_left_out_for_a_while(clock: Clock) -> None:
    """One false record would else stall the swarm: samples count for the newest epoch alone."""
    found, honest, liar = tracker(), (0, 60, FULL), (10**9, 10, FULL)
    see(found, honest, honest, liar)
    assert found.global_epoch == 10**9
    assert not found.is_epoch_full
    found.disbelieve(10**9, seconds=30)
    assert found.global_epoch == 0
    assert not found.is_epoch_full, "not before the records are read again, which is now"
    assert found.global_state_updated.is_set() and found.global_progress.next_fetch_time <= clock.now
    see(found, honest, honest, liar)
    assert found.is_epoch_full
    assert len(found.records) == 3, "whoever wrote it is there all the same"
    see(found, honest, (1, 60, FULL), (1, 60, FULL))
    assert found.global_epoch == 1, "an earlier epoch is still believed"
    clock.now += 31
    see(found, honest, liar)
    assert found.global_epoch == 10**9


def test_records_that_are_read_are_bounded(clock: Clock) -> None:
    found = tracker()
    see(found, *((0, 1, FULL) for _ in range(MAX_RECORDS + 100)))
    assert len(found.records) <= MAX_RECORDS
    assert found.global_progress.next_fetch_time >= clock.now + MAX_PAUSE_SECONDS, "and read seldom"


def test_larger_swarm_reads_and_writes_less_often_and_is_patient(clock: Clock) -> None:
    """What is read and written grows with the swarm, and everybody reads and writes: the N^2 term."""
    small, large = tracker(), tracker()
    see(small, *((0, 1, FULL) for _ in range(10)))
    see(large, *((0, 1, FULL) for _ in range(400)))
    assert 0 < small.pause_seconds < 1 < 10 < large.pause_seconds < 60 / 2, "records live for 60 s"
    assert small.live_seconds < large.live_seconds < 60
    for found in (small, large):
        found.begin_epoch(1)
    clock.now += small.pause_seconds + MAX_REPORT_SECONDS
    assert [is_written(found) for found in (small, large)] == [True, True], "the new epoch, at once"
    for found in (small, large):
        found.report(epoch=1, samples_accumulated=1)
    assert [is_written(found) for found in (small, large)] == [True, False]


def test_record_that_its_peer_signed_wins_over_what_others_say_of_it(clock: Clock) -> None:
    """Else a stranger's record would make a live peer dead to everybody. Bare peers sign with keys of their own."""
    key = RSAPrivateKey()
    subkey = RSASignatureValidator(key).local_public_key
    peer_id = PeerID.from_base58(owner_of(subkey)).to_bytes()
    true = {**record(0, (3, 10, FULL)), "peer_id": peer_id}
    lie = {**true, "time": 0.0, "client_mode": True}
    bare = record(1, (3, 10, FULL))
    for order in (1, -1):
        found = tracker()
        entries = [(b"a stranger's key", lie), (subkey, true), (b"a bare peer's key", bare)][::order]
        found._parse_swarm_progress_data({k: ValueWithExpiration(value, START + 60) for k, value in entries})
        assert found.records[PeerID(peer_id).to_base58()].time == START
        assert len(found.records) == 2


# --- what we write ---------------------------------------------------------------------------------------------------


def is_written(tracker: ProgressTracker) -> bool:
    """Whether the tracker's thread was told to write, since the last time we asked."""
    was_set = tracker.should_report_progress.is_set()
    tracker.should_report_progress.clear()
    return was_set


def test_own_samples_count_at_once_and_are_written_seldom(clock: Clock) -> None:
    found = tracker()
    see(found, (0, 40, FULL))
    written = []
    for count in range(10, 60, 10):
        found.report(epoch=0, samples_accumulated=count)
        written.append(is_written(found))
        clock.now += MIN_REPORT_SECONDS / 4
    assert written == [True, False, False, False, True]
    assert found.share_done == pytest.approx(0.9)
    assert found.local_progress.samples_accumulated == 50


def test_new_epoch_is_written_at_once_and_starts_from_what_is_there(clock: Clock) -> None:
    found = tracker()
    see(found, (0, 90, FULL))
    found.report(epoch=0, samples_accumulated=10)
    assert is_written(found)
    found.begin_epoch(1, samples_accumulated=8)
    assert is_written(found)
    assert (found.global_epoch, found.local_progress.epoch) == (1, 1)
    assert not found.is_epoch_full, "the old epoch's samples are gone"
    assert found.global_progress.eta_next_epoch == math.inf
    found.report(epoch=1, samples_accumulated=16)
    assert not is_written(found)


def test_epoch_that_others_began_before_us_keeps_what_they_have(clock: Clock) -> None:
    found = tracker()
    see(found, (1, 30, FULL))
    found.begin_epoch(1)
    assert found.share_done == pytest.approx(0.3)


def test_rate_is_of_computing_time(clock: Clock) -> None:
    found = tracker()
    rate = found.performance_ema.samples_per_second
    found.note_samples(0)
    assert found.performance_ema.samples_per_second == rate
    for _ in range(50):
        found.note_samples(1000)
    assert found.performance_ema.samples_per_second > 100 * rate


# --- who ends an epoch when there are only clients --------------------------------------------------------------------


@pytest.mark.parametrize("peers", [(), ((0, TARGET, CLIENT),), ((0, 80, CLIENT), (0, 80, CLIENT))])
def test_client_among_clients_does_not_end_an_epoch(clock: Clock, peers: tuple[Record, ...]) -> None:
    """Nobody could hand the result to a newcomer."""
    client = tracker(client_mode=CLIENT)
    see(client, *peers)
    client.report(epoch=0, samples_accumulated=2 * TARGET)
    assert client.awaits_full_peer
    assert not client.is_epoch_full


def test_client_goes_on_when_a_full_peer_comes(clock: Clock) -> None:
    client = tracker(client_mode=CLIENT)
    see(client, (0, TARGET, CLIENT))
    see(client, (0, TARGET, CLIENT), (0, 1, FULL))
    assert not client.awaits_full_peer
    assert client.is_epoch_full


def test_clients_end_epochs_with_an_auxiliary_peer_that_holds_the_state(clock: Clock) -> None:
    client = tracker(client_mode=CLIENT, holders=True)
    see(client, (0, TARGET, CLIENT), (0, 1, CLIENT))
    assert not client.awaits_full_peer
    assert client.is_epoch_full


def test_full_peer_ends_an_epoch_whoever_is_there(clock: Clock) -> None:
    full = tracker()
    for others in ((), ((0, 1, CLIENT),), ((0, 1, FULL),)):
        see(full, (0, TARGET, FULL), *others)
        assert not full.awaits_full_peer
        assert full.is_epoch_full


def test_newcomer_learns_of_the_epoch_that_only_clients_have(clock: Clock) -> None:
    """Then it asks for their state, gets none, and says so. Stock would start at epoch 0, and average with them."""
    newcomer = tracker()
    see(newcomer, (7, 10, CLIENT), (6, 10, CLIENT))
    assert newcomer.global_epoch == 7
    assert newcomer.global_progress.num_peers == newcomer.global_progress.num_clients == 2
    assert {found.epoch for found in newcomer.records.values()} == {6, 7}
    assert all(found.client_mode for found in newcomer.records.values())


def test_client_cannot_lead_full_peers_away(clock: Clock) -> None:
    """As stock: what clients say of their epoch counts for nothing while a full peer trains."""
    full = tracker()
    see(full, (3, 10, FULL), (1_000_000, 10, CLIENT))
    assert full.global_epoch == 3
    assert full.global_progress.num_clients == 1
