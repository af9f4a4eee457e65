"""How the first peer of a run begins: alone, back among those it knew, or cut off from them. libp2p is faked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calm_ray.errors import SwarmUnreachable
from calm_ray.peers import entry as entry_module
from calm_ray.peers.entry import ALONE_SECONDS, Entry, alone_words, enter
from calm_ray.peers.known import KnownPeers, save_known
from calm_ray.peers.spec import PeerSpec
from calm_ray.swarm.node import NobodyThere

OWN, FIRST, SECOND = (f"QmQhps72kzA2DHfBJ6SAWvnXCaBW7KkMeNwt18AxgYxan{number}" for number in range(1, 4))
ADDRESSES = tuple(f"/ip4/44.77.0.{peer[-1]}/tcp/4001/p2p/{peer}" for peer in (FIRST, SECOND))
OWN_ADDRESS = f"/ip4/44.77.0.9/tcp/4001/p2p/{OWN}"


@dataclass
class Line:
    """What there is at the addresses that were known."""

    live: tuple[str, ...] = ()
    """These accept connections when we start."""
    problem: Exception | None = None
    """Of joining them."""
    all_refuse: bool = False
    back_at: float = float("inf")
    """Seconds after which they can be reached, or come to us."""
    now: float = 0.0
    joined: list[tuple[str, ...]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    longest_silence: float = 0.0
    _said_at: float = 0.0

    def join(self, run_id: str, *, initial_peers: Sequence[str], options: object) -> Any:
        self.joined.append(tuple(initial_peers))
        if initial_peers and self.problem is not None:
            raise self.problem
        return SimpleNamespace(peer_id=OWN, addresses=list)

    def reconnect(self, swarm: object, addresses: Sequence[str]) -> int:
        assert OWN_ADDRESS not in addresses
        return int(self.now >= self.back_at)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def say(self, words: str) -> None:
        self.said.append(words)
        self.longest_silence = max(self.longest_silence, self.now - self._said_at)
        self._said_at = self.now


Start = Callable[[Line], Entry]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Enter with the bundle, having known ADDRESSES."""
    save_known(tmp_path, KnownPeers(listen="/ip4/0.0.0.0/tcp/4001", addresses=(*ADDRESSES, OWN_ADDRESS)))
    monkeypatch.setattr(entry_module, "open_bundle", lambda folder: (None, SimpleNamespace(run_id="r")))
    monkeypatch.setattr(entry_module, "place_sockets", lambda prefix: None)

    def enter_on(line: Line) -> Entry:
        monkeypatch.setattr(KnownPeers, "live", lambda known: line.live)
        monkeypatch.setattr(entry_module, "Swarm", SimpleNamespace(join=line.join))
        monkeypatch.setattr(entry_module, "reconnect", line.reconnect)
        monkeypatch.setattr(entry_module, "all_refuse", lambda addresses: line.all_refuse)
        monkeypatch.setattr(entry_module, "time", SimpleNamespace(monotonic=lambda: line.now, sleep=line.sleep))
        return enter(PeerSpec(role="auxiliary", folder=tmp_path, bundle=tmp_path), say=line.say)

    return enter_on


def test_peer_that_finds_those_it_knew_is_not_the_first(start: Start) -> None:
    line = Line(live=ADDRESSES)
    assert not start(line).is_first
    assert line.joined == [ADDRESSES]


def test_peer_that_knew_nobody_is_the_first_at_once(start: Start, tmp_path: Path) -> None:
    (tmp_path / "known-peers.json").unlink()
    line = Line()
    assert start(line).is_first
    assert line.now == 0


def test_peer_whose_line_is_cut_waits_for_those_it_knew(start: Start) -> None:
    """It would serve the desk at epoch 0, and the swarm would be two."""
    line = Line(back_at=100.0)
    assert not start(line).is_first
    assert line.now == pytest.approx(100.0, abs=10.0)
    assert "none of the 2 peers that it knew answers; trying again, and going on alone in 2 min" in line.said[0]


def test_peer_that_nobody_answers_for_long_goes_on_alone_and_never_falls_silent(start: Start) -> None:
    line = Line()
    assert start(line).is_first
    assert line.now == pytest.approx(ALONE_SECONDS, abs=10.0)
    assert line.longest_silence < 60, "its watchdog would take it for hung"


def test_peer_whose_swarm_has_ended_does_not_wait(start: Start) -> None:
    line = Line(all_refuse=True)
    assert start(line).is_first
    assert line.now == 0


def test_peer_whose_addresses_have_other_owners_now_looks_on(start: Start) -> None:
    line = Line(live=ADDRESSES, problem=NobodyThere("answers, but libp2p cannot connect"), back_at=50.0)
    assert not start(line).is_first
    assert line.joined == [ADDRESSES, ()]


@pytest.mark.parametrize("words", ["libp2p did not start", "the swarm cannot call this peer back"])
def test_trouble_of_our_own_begins_no_swarm(start: Start, words: str) -> None:
    line = Line(live=ADDRESSES, problem=SwarmUnreachable(words))
    with pytest.raises(SwarmUnreachable, match=words):
        start(line)
    assert line.joined == [ADDRESSES]


def test_words_tell_how_long_and_what_to_do() -> None:
    assert "the one peer that it knew does not answer; trying again, and going on alone in 1 min" in alone_words(1, 9.0)
    assert "without known-peers.json" in alone_words(3, 200.0)
