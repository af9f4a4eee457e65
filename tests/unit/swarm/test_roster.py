"""Who holds the state, as the DHT's record says it: strangers write it, so anything may stand in it."""

import math
import threading
from typing import Any, cast

import pytest
from hivemind.p2p import PeerID
from hivemind.utils import ValueWithExpiration, get_dht_time

from calm_ray.errors import SwarmUnreachable
from calm_ray.swarm.node import Swarm
from calm_ray.swarm.roster import LIFETIME_SECONDS, MAX_PEERS, RENEW_SECONDS, Roster, parse_roster
from tests.eventually import eventually

WAIT_SECONDS = 30.0


def peer(number: int) -> bytes:
    """A peer id as libp2p writes those of RSA keys: a SHA-256 multihash."""
    return b"\x12\x20" + number.to_bytes(32, "big")


def name(number: int) -> str:
    return str(PeerID(peer(number)).to_base58())


def entry(value: Any, *, expires_in: float = LIFETIME_SECONDS) -> ValueWithExpiration[Any]:
    return ValueWithExpiration(value, get_dht_time() + expires_in)


def test_trainers_and_auxiliary_peers_are_told_apart() -> None:
    found = parse_roster({peer(1): entry(7.0), peer(2): entry(7.5), peer(3): entry(6)}, own_peer_id=name(9))
    assert {key: (holder.epoch, holder.is_auxiliary) for key, holder in found.items()} == {
        name(1): (7, False), name(2): (7, True), name(3): (6, False),
    }  # fmt: skip


def test_own_entry_is_left_out() -> None:
    assert parse_roster({peer(1): entry(7.0)}, own_peer_id=name(1)) == {}


@pytest.mark.parametrize(
    "value", [None, "7", b"7", -1.0, -0.5, 1e9, 10**30, math.nan, math.inf, -math.inf, [], {}, (7,), 7j]
)
def test_what_is_no_epoch_is_left_out(value: Any) -> None:
    assert parse_roster({peer(1): entry(value), peer(2): entry(7.0)}, own_peer_id=name(9)).keys() == {name(2)}


@pytest.mark.parametrize("key", ["text", 5, None, (1, 2)])
def test_what_is_no_peer_is_left_out(key: Any) -> None:
    assert parse_roster({key: entry(7.0), peer(2): entry(7.0)}, own_peer_id=name(9)).keys() == {name(2)}


@pytest.mark.parametrize("entries", [None, [], 5, "text", b"bytes", {}, {peer(1): 7.0}, {peer(1): None}])
def test_what_is_no_record_holds_nobody(entries: Any) -> None:
    assert parse_roster(entries, own_peer_id=name(9)) == {}


def test_odd_peer_ids_do_no_harm() -> None:
    for key in (b"", b"\0", b"x" * 10_000):
        parse_roster({key: entry(7.0)}, own_peer_id=name(9))


def test_number_of_holders_is_bounded() -> None:
    entries = {peer(number): entry(1.0) for number in range(MAX_PEERS + 500)}
    assert len(parse_roster(entries, own_peer_id=name(10**6))) == MAX_PEERS


def test_holder_is_fresh_while_it_renews_its_offer() -> None:
    """One renewal may get lost; after two, it has probably gone."""
    now = get_dht_time()
    for age, is_fresh in ((0.0, True), (1.5 * RENEW_SECONDS, True), (LIFETIME_SECONDS - 1, False)):
        (holder,) = parse_roster(
            {peer(1): ValueWithExpiration(7.5, now - age + LIFETIME_SECONDS)}, own_peer_id=name(9)
        ).values()
        assert holder.is_fresh(now=now) is is_fresh


class FakeDHT:
    peer_id = PeerID(peer(9))


class FakeSwarm:
    """One record, as far as the roster knows the DHT."""

    run_id, peer_id = "tiny", name(9)

    def __init__(self) -> None:
        self.record: dict[Any, Any] = {peer(1): entry(3.0)}
        self.written: list[float | None] = []
        self.is_down = False
        self.dht = FakeDHT()

    def get(self, key: str) -> dict[Any, Any]:
        assert key == "tiny_state_averager.all_averagers"
        if self.is_down:
            raise SwarmUnreachable("the DHT did not answer")
        return self.record

    def store(self, key: str, *, subkey: bytes, value: Any, expiration_time: float) -> bool:
        assert expiration_time <= get_dht_time() + LIFETIME_SECONDS
        if self.is_down:
            raise SwarmUnreachable("the DHT did not answer")
        self.written.append(value)
        return True


@pytest.fixture
def swarm() -> FakeSwarm:
    return FakeSwarm()


def roster_of(swarm: FakeSwarm, *, refresh_seconds: float = 0.05) -> Roster:
    return Roster(cast(Swarm, swarm), refresh_seconds=refresh_seconds)


def test_offer_is_written_when_it_changes_and_withdrawn_at_the_end(swarm: FakeSwarm) -> None:
    roster, epoch = roster_of(swarm), [0.5]
    roster.offer(lambda: epoch[0])
    eventually(lambda: swarm.written == [0.5], WAIT_SECONDS)
    epoch[0] = 1.5
    roster.wake()
    eventually(lambda: swarm.written == [0.5, 1.5], WAIT_SECONDS)
    roster.close()
    assert swarm.written == [0.5, 1.5, None]


def test_peer_without_an_offer_writes_nothing(swarm: FakeSwarm) -> None:
    roster = roster_of(swarm)
    assert roster.refresh(timeout_seconds=WAIT_SECONDS).keys() == {name(1)}
    roster.close()
    assert swarm.written == []


def test_refresh_reads_anew(swarm: FakeSwarm) -> None:
    roster = roster_of(swarm, refresh_seconds=1000.0)
    roster.refresh(timeout_seconds=WAIT_SECONDS)
    swarm.record = {peer(1): entry(3.0), peer(2): entry(4.5)}
    assert roster.refresh(timeout_seconds=WAIT_SECONDS).keys() == {name(1), name(2)}
    roster.close()


def test_dht_that_does_not_answer_is_asked_again(swarm: FakeSwarm) -> None:
    """Meanwhile what was read last counts, and our own offer is written when it can be."""
    roster = roster_of(swarm)
    roster.refresh(timeout_seconds=WAIT_SECONDS)
    swarm.is_down = True
    roster.offer(lambda: 5.0)
    assert roster.refresh(timeout_seconds=0.2).keys() == {name(1)}
    swarm.is_down = False
    eventually(lambda: swarm.written == [5.0], WAIT_SECONDS)
    roster.close()


def test_refresh_ends_with_the_roster(swarm: FakeSwarm) -> None:
    swarm.is_down = True
    roster = roster_of(swarm)
    waiting = threading.Thread(target=roster.refresh, kwargs={"timeout_seconds": 1000.0}, daemon=True)
    waiting.start()
    roster.close()
    waiting.join(WAIT_SECONDS)
    assert not waiting.is_alive()
