"""What a peer looks after: the words, and the decisions behind them, on a clock and in a swarm of the test's own."""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calm_ray.errors import CalmRayError, ConfigError, Moved, SwarmUnreachable
from calm_ray.peers import vigil
from calm_ray.peers.entry import Entry
from calm_ray.peers.known import KnownPeers, load_known
from calm_ray.peers.place import Place
from calm_ray.peers.vigil import LEAST_FREE_BYTES, Vigil, clock_words, disk_state, line_words, name_words
from calm_ray.report import PeerReport, encode
from calm_ray.swarm.clock_offset import ClockOffset

FOLDER = Path("/x")
OWN, FIRST, SECOND, THIRD = (f"QmQhps72kzA2DHfBJ6SAWvnXCaBW7KkMeNwt18AxgYxan{number}" for number in range(1, 5))
RELAYED = f"/ip4/1.2.3.4/tcp/4001/p2p/{FIRST}/p2p-circuit/p2p/{SECOND}"


def address(peer: str, *, port: int = 4001) -> str:
    return f"/ip4/44.77.0.{peer[-1]}/tcp/{port}/p2p/{peer}"


@dataclass
class World:
    """Time, line and machine of one peer. It answers as `Swarm` does, and to what the vigil asks besides."""

    folder: Path
    now: float = 1000.0
    wall_minus_now: float = 1_790_000_000.0
    company: dict[str, str] = field(default_factory=dict)
    """Peer id -> address, of those who are there; nobody while the line is cut."""
    is_cut: bool = False
    dead_ports: set[str] = field(default_factory=set)
    """Addresses where nobody accepts connections."""
    place: Place = field(default_factory=lambda: Place(source="192.168.1.5", hosts=frozenset({"192.168.1.5"})))
    stuck: list[str] = field(default_factory=list)
    """What the next looks at our processes find."""
    offsets: dict[str, float] = field(default_factory=dict)
    """Desk -> our clock minus its."""
    reports: list[tuple[str, bytes]] = field(default_factory=list)
    trouble: Exception | None = None
    """Of the DHT."""
    peer_id: str = OWN
    run_id: str = "r"
    warnings: dict[str, str] = field(default_factory=dict)
    dialled_at: list[float] = field(default_factory=list)
    dialled: list[str] = field(default_factory=list)
    is_lonely_in_dht: bool = False

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + self.wall_minus_now

    def routed_peers(self) -> frozenset[str]:
        if self.trouble is not None:
            raise self.trouble
        return frozenset() if self.is_cut or self.is_lonely_in_dht else frozenset(self.company)

    def neighbours(self) -> list[str]:
        return [] if self.is_cut else sorted(self.company.values())

    def snapshot(self) -> list[tuple[str, bytes]]:
        return self.reports

    def lost_process(self) -> str:
        return ""

    def stuck_process(self) -> str:
        return self.stuck.pop(0) if self.stuck else ""

    def call(self, action: Any, *, timeout_seconds: float) -> Any:
        if self.trouble is not None:
            raise self.trouble
        return action(None)

    def ask_clocks(self, p2p: object, desks: list[str], *, run_id: str) -> ClockOffset | None:
        told = [self.offsets[desk] for desk in desks if desk in self.offsets]
        if not told:
            return None
        return ClockOffset(offset_seconds=told[0], error_seconds=0.1, num_desks=len(told), num_agreeing=len(told))

    def reconnect(self, swarm: "World", addresses: list[str]) -> int:
        self.dialled_at.append(self.now)
        self.dialled = list(addresses)
        self.is_lonely_in_dht = self.is_cut
        return len(self.routed_peers())

    def live_addresses(self, addresses: list[str], *, timeout_seconds: float) -> list[str]:
        live = [text for text in addresses if text not in self.dead_ports]
        if not live:
            raise SwarmUnreachable("nobody")
        return live

    def warn(self, about: str, text: str) -> None:
        self.warnings[about] = text

    def vigil(
        self, *, bootstrap: tuple[str, ...] = (), former: KnownPeers | None = None, is_first: bool = False
    ) -> Vigil:
        run: Any = None
        swarm: Any = self
        entry = Entry(
            swarm=swarm, run=run, bundle=FOLDER, is_first=is_first, is_client_mode=False,
            former=former or KnownPeers(), known=KnownPeers(listen="/ip4/0.0.0.0/tcp/4001"), bootstrap=bootstrap,
        )  # fmt: skip
        return Vigil(entry, folder=self.folder, boot_id="b" * 32, warn=self.warn)

    def pass_time(self, watch: Vigil, seconds: float) -> None:
        """Look each second."""
        for _ in range(int(seconds)):
            self.now += 1.0
            watch.look()

    @property
    def saved(self) -> tuple[str, ...]:
        return load_known(self.folder).addresses


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    found = World(tmp_path)
    monkeypatch.setattr(vigil, "time", SimpleNamespace(monotonic=found.monotonic, time=found.time))
    for name in ("reconnect", "live_addresses", "ask_clocks"):
        monkeypatch.setattr(vigil, name, getattr(found, name))
    monkeypatch.setattr(vigil, "own_place", lambda: found.place)
    return found


# --- the line --------------------------------------------------------------------------------------------------------


def test_peer_that_is_alone_for_an_hour_says_so_dials_those_it_knew_and_keeps_them(world: World) -> None:
    world.company = {peer: address(peer) for peer in (FIRST, SECOND)}
    watch = world.vigil(bootstrap=(address(THIRD),))
    world.pass_time(watch, 60)
    assert world.warnings["line"] == ""
    assert world.saved == (address(FIRST), address(SECOND))

    world.is_cut, cut_at = True, world.now
    world.pass_time(watch, 3600)
    assert "cut off: nobody of the swarm has answered for 60 min; trying those" in world.warnings["line"]
    assert world.saved == (address(FIRST), address(SECOND))
    assert world.dialled == [address(THIRD), address(FIRST), address(SECOND)]
    pauses = [later - earlier for earlier, later in zip(world.dialled_at, world.dialled_at[1:], strict=False)]
    assert world.dialled_at[0] - cut_at < 2 * vigil.LOOK_SECONDS
    assert max(pauses) <= vigil.MAX_RECONNECT_PAUSE + vigil.LOOK_SECONDS
    assert len(pauses) > 3600 / (vigil.MAX_RECONNECT_PAUSE + vigil.LOOK_SECONDS)

    world.is_cut, num_dialled = False, len(world.dialled_at)
    world.pass_time(watch, vigil.MAX_RECONNECT_PAUSE + 3 * vigil.LOOK_SECONDS)
    assert world.warnings["line"] == ""
    assert len(world.dialled_at) == num_dialled + 1, "and then nobody is dialled any more"


def test_first_peer_of_a_run_is_not_cut_off_before_anybody_has_come(world: World) -> None:
    watch = world.vigil(is_first=True)
    world.pass_time(watch, 600)
    assert "line" not in world.warnings
    assert not world.dialled_at


def test_first_peer_that_knew_others_is(world: World) -> None:
    watch = world.vigil(is_first=True, former=KnownPeers(addresses=(address(FIRST),)))
    world.pass_time(watch, 60)
    assert "cut off" in world.warnings["line"]
    assert world.dialled == [address(FIRST)]


# --- who is remembered -----------------------------------------------------------------------------------------------


def test_neighbour_that_nobody_can_dial_is_not_remembered(world: World) -> None:
    """Of a peer that called us the port may be any, and nobody answers there."""
    world.company = {FIRST: address(FIRST, port=51234), SECOND: address(SECOND)}
    world.dead_ports = {address(FIRST, port=51234)}
    world.pass_time(world.vigil(), 60)
    assert world.saved == (address(SECOND),)


def test_auxiliary_peers_come_first_then_those_of_before_and_last_those_who_have_gone(world: World) -> None:
    world.company = {peer: address(peer) for peer in (FIRST, SECOND, THIRD)}
    world.reports = [(THIRD, report("auxiliary", THIRD)), (FIRST, b"rubbish")]
    gone = address("QmQhps72kzA2DHfBJ6SAWvnXCaBW7KkMeNwt18AxgYxan9")
    watch = world.vigil(former=KnownPeers(addresses=(gone, address(SECOND))))
    world.pass_time(watch, 90)
    assert world.saved == (address(THIRD), address(SECOND), address(FIRST), gone)


def report(role: Any, peer_id: str) -> bytes:
    return encode(
        PeerReport(
            peer_id=peer_id, boot_id="a" * 32, role=role, version="0", config_hash="c" * 64, is_client_mode=False,
            published_at=1_790_000_000.0, state="training", epoch=0,
        )
    )  # fmt: skip


# --- our own processes -----------------------------------------------------------------------------------------------


def test_process_that_hangs_ends_the_peer_and_one_that_is_slow_does_not(world: World) -> None:
    watch = world.vigil()
    world.stuck = ["the libp2p daemon does not answer"] * (vigil.NUM_UNANSWERED - 1)
    world.pass_time(watch, 60)
    world.stuck = ["the libp2p daemon does not answer"] * vigil.NUM_UNANSWERED
    with pytest.raises(CalmRayError, match="the libp2p daemon does not answer: starting again"):
        world.pass_time(watch, 60)


@pytest.mark.parametrize("trouble", [SwarmUnreachable("stuck"), TimeoutError(), ConnectionResetError(), EOFError()])
def test_whatever_the_dht_says_a_look_goes_on(
    world: World, trouble: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    world.company = {FIRST: address(FIRST)}
    world.trouble = trouble
    with caplog.at_level(logging.WARNING):
        world.pass_time(world.vigil(), 60)
    assert "vigil: " in caplog.text
    assert world.saved == (address(FIRST),)


def test_machine_that_has_moved_joins_again(world: World) -> None:
    watch = world.vigil()
    world.pass_time(watch, 10)
    world.place = Place(source="10.0.0.2", hosts=frozenset({"10.0.0.2", "172.17.0.1"}))
    with pytest.raises(Moved, match=r"has changed from 192\.168\.1\.5 to 10\.0\.0\.2: joining again"):
        world.pass_time(watch, 10)


# --- the clock -------------------------------------------------------------------------------------------------------


def test_clock_far_off_by_the_organisers_own_is_refused(world: World) -> None:
    world.offsets = {THIRD: 3600.0}
    with pytest.raises(ConfigError, match=r"3600\.0 s ahead of the swarm's"):
        world.vigil(bootstrap=(address(THIRD),)).check_clock()


@pytest.mark.parametrize("num_strangers", [1, 2, 3])
def test_clock_far_off_by_strangers_is_told_and_refused_only_by_three(world: World, num_strangers: int) -> None:
    """One that served a wrong time parked a run's first auxiliary peer."""
    strangers = (FIRST, SECOND, THIRD)
    world.offsets = dict.fromkeys(strangers[:num_strangers], -3600.0)
    watch = world.vigil(former=KnownPeers(addresses=tuple(map(address, strangers))))
    if num_strangers < vigil.NUM_STRANGERS:
        watch.check_clock()
        assert "3600.0 s behind the swarm's" in world.warnings["clock"]
    else:
        with pytest.raises(ConfigError, match="behind the swarm's"):
            watch.check_clock()


def test_strangers_are_not_asked_while_the_organisers_answer(world: World) -> None:
    world.offsets = {OWN: 7.0, THIRD: 0.0, **dict.fromkeys((FIRST, SECOND), 3600.0)}
    former = KnownPeers(addresses=(address(FIRST), address(SECOND)))
    world.vigil(bootstrap=(address(THIRD), RELAYED), former=former).check_clock()
    assert world.warnings["clock"] == ""


def test_clock_that_jumps_is_compared_at_once(world: World) -> None:
    watch = world.vigil(bootstrap=(address(THIRD),))
    world.pass_time(watch, 10)
    world.wall_minus_now += 10
    world.offsets = {THIRD: 10.0}
    world.pass_time(watch, vigil.LOOK_SECONDS + 1)
    assert "10.0 s ahead" in world.warnings["clock"]


# --- words -----------------------------------------------------------------------------------------------------------


def test_disk_is_told_with_what_is_lost() -> None:
    assert disk_state(FOLDER, free=LEAST_FREE_BYTES, is_writable=True) == ""
    assert disk_state(FOLDER, free=12_000_000, is_writable=True) == (
        "/x: less than 64 MB free: make room, or logs and checkpoints are lost"
    )
    assert "the disk may be read-only" in disk_state(FOLDER, free=10**12, is_writable=False)


def test_words_name_side_size_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert clock_words(10.04).startswith("this machine's clock is 10.0 s ahead of the swarm's; set it")
    assert clock_words(-3661.0).startswith("this machine's clock is 3661.0 s behind the swarm's")
    assert "for some seconds; trying" in line_words(31.2)
    assert "for 1 min; trying" in line_words(61.2)
    assert "delete identity.key in one of the two" in name_words(FOLDER)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "System Settings" in clock_words(10.0)
