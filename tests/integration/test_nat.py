"""Volunteers behind NAT, as most are: two home networks and two public hosts, joined by nothing but the invite.

Everything runs in network namespaces (root, `ip`, `iptables`); the peers are started as volunteers start them. The
tests share one swarm of four peers and read it in the order in which they are written.
"""

import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from calm_ray.bundle import seal_bundle
from calm_ray.config import load_config
from calm_ray.invite import Invite
from calm_ray.peers.control import ControlClient
from calm_ray.peers.status import PeerStatus
from calm_ray.report import RoundCounts
from calm_ray.signing import load_or_create_key, public_bytes
from calm_ray.training.prepare import write_parts
from tests.eventually import Child, Children, eventually
from tests.integration.namespaces import FIRST_GATEWAY, PUBLIC_NET, Internet, NamespacesRefused
from tests.integration.runs import write_config

pytestmark = [
    pytest.mark.slow(shard=1),
    pytest.mark.needs(root=True, programs=("ip", "iptables")),
    pytest.mark.timeout(600),
]

START_SECONDS = 120.0
EPOCH_SECONDS = 60.0
"""Four peers on two cores that may be busy: far more than the five seconds that an epoch takes alone."""
NUM_EPOCHS_WATCHED = 3
HOMES = ("home1", "home2")
VOLUNTEERS = (*HOMES, "public")

_ROUND = re.compile(r"round epoch=(\d+) outcome=(\w+)(.*)")


@dataclass(frozen=True, kw_only=True)
class Round:
    """One line of a peer's log about a gradient round."""

    epoch: int
    outcome: str
    group_size: int
    num_bytes: int
    """Received from others."""
    num_banned: int
    digest: str


@dataclass
class NatSwarm:
    """One auxiliary peer and three volunteers, each in its namespace."""

    folder: Path
    net: Internet
    children: Children
    namespaces: dict[str, str] = field(default_factory=dict)
    peers: dict[str, Child] = field(default_factory=dict)

    def start(self, name: str, *argv: str | Path) -> None:
        command = (sys.executable, "-W", "ignore", "-m", "calm_ray", *argv, "--folder", self.folder / name)
        self.peers[name] = self.children.start(self.net.inside(self.namespaces[name], *command))

    def status(self, name: str) -> PeerStatus:
        child = self.peers[name]
        try:
            client = ControlClient(self.folder / name)
        except OSError:
            if not child.is_running():
                raise RuntimeError(f"{name} has left:\n{child.tail()}\n{self.log(name)[-3000:]}") from None
            return PeerStatus(role="trainer")
        try:
            return client.call("status")
        finally:
            client.close()

    def wait(self, name: str, predicate: Callable[[PeerStatus], object], timeout: float) -> PeerStatus:
        def holds() -> PeerStatus | None:
            status = self.status(name)
            return status if predicate(status) else None

        found = eventually(
            holds, timeout, lambda: f"{name}: {self.status(name)}\n{self.log(name)[-3000:]}", interval=0.5
        )
        assert found is not None
        return found

    def log(self, name: str) -> str:
        path = self.folder / name / "peer.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def rounds(self, name: str) -> list[Round]:
        """All gradient rounds in the peer's log. One that never began has no group and received nothing."""
        found = []
        for epoch, outcome, rest in _ROUND.findall(self.log(name)):
            fields = dict(re.findall(r"(\w+)=(\S*)", rest))
            found.append(
                Round(
                    epoch=int(epoch),
                    outcome=outcome,
                    group_size=int(fields["group_size"]),
                    num_bytes=int(fields["received"]),
                    num_banned=int(fields["banned"]),
                    digest=fields["digest"],
                )
            )
        return found


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatSwarm]:
    folder = tmp_path_factory.mktemp("nat")
    config = load_config(write_config(folder / "run.toml", run_id="nat", target_batch_size=256))
    bundle, key = folder / "bundle", load_or_create_key(folder / "organiser.key")
    write_parts(config.run, config_dir=folder, out_dir=bundle)
    seal_bundle(bundle, run=config.run, key=key)
    machine = 'device = "cpu"\nnum_threads = 1\nmicro_batch_size = 4\n'
    (folder / "auxiliary.toml").write_text(f'[peer]\n{machine}listen = "/ip4/0.0.0.0/tcp/4001"\n')
    (folder / "volunteer.toml").write_text(f"[peer]\n{machine}")
    with _internet() as net, Children(folder) as children:
        namespaces = {
            "auxiliary": net.public_host(1),
            "public": net.public_host(2),
            "home1": net.host_behind_nat(1, drops_strangers=True),
            "home2": net.host_behind_nat(2, drops_strangers=False),
        }
        swarm = NatSwarm(folder, net, children, namespaces)
        options = ("--role", "auxiliary", "--bundle", bundle, "--config", folder / "auxiliary.toml")
        swarm.start("auxiliary", "peer", *options)
        try:
            addresses = swarm.wait("auxiliary", lambda s: s.state == "assisting", START_SECONDS).addresses
            invite = Invite(run_id="nat", addresses=addresses, organiser_key=public_bytes(key)).encode()
            for name in VOLUNTEERS:
                swarm.start(name, "join", invite, "--config", folder / "volunteer.toml")
            yield swarm
        finally:
            for child in swarm.peers.values():
                child.signal_group(signal.SIGTERM)  # to all at once; `children` then waits for each


@contextmanager
def _internet() -> Iterator[Internet]:
    try:
        net = Internet().__enter__()
    except NamespacesRefused as exc:
        pytest.skip(f"no network namespaces here: {exc}")
    try:
        yield net
    finally:
        net.close()


def test_auxiliary_peer_names_its_public_address_first(swarm: NatSwarm) -> None:
    assert swarm.status("auxiliary").addresses[0].startswith(f"/ip4/{PUBLIC_NET}.1/tcp/4001/p2p/")


@pytest.mark.parametrize("name", HOMES)
def test_volunteer_behind_nat_learns_it_by_dial_back_and_is_a_client(swarm: NatSwarm, name: str) -> None:
    status = swarm.wait(name, _has_joined, START_SECONDS)
    assert status.is_client_mode and not status.addresses
    assert "others cannot reach this machine (nobody answers at the observed address" in swarm.peers[name].output()
    assert f"(seen as {PUBLIC_NET}.{FIRST_GATEWAY + HOMES.index(name) + 1})" in swarm.peers[name].output()


def test_volunteer_on_a_public_host_is_dialled_back_and_is_a_full_peer(swarm: NatSwarm) -> None:
    """Three ask at once and one desk dials one at a time: the answer "busy" must not make anyone a client."""
    status = swarm.wait("public", _has_joined, START_SECONDS)
    assert not status.is_client_mode
    assert status.addresses[0].startswith(f"/ip4/{PUBLIC_NET}.2/tcp/")
    assert f"others can reach this machine at {PUBLIC_NET}.2:" in swarm.peers["public"].output()


@pytest.mark.parametrize("name", HOMES)
def test_volunteer_behind_nat_contributes_epoch_after_epoch(swarm: NatSwarm, name: str) -> None:
    first = swarm.wait(name, lambda s: s.report and s.report.samples_contributed, START_SECONDS + EPOCH_SECONDS).report
    assert first is not None
    wanted = first.rounds.averaged + NUM_EPOCHS_WATCHED
    later = swarm.wait(
        name, lambda s: s.report and s.report.rounds.averaged >= wanted, NUM_EPOCHS_WATCHED * EPOCH_SECONDS
    ).report
    assert later is not None
    assert later.samples_contributed > first.samples_contributed
    assert later.epoch > first.epoch
    in_company = [r for r in swarm.rounds(name) if r.outcome == "averaged" and r.group_size >= 3]
    assert len(in_company) >= NUM_EPOCHS_WATCHED, swarm.rounds(name)


@pytest.mark.parametrize("name", ["auxiliary", *VOLUNTEERS])
def test_every_round_is_counted_as_it_ended_and_none_without_data_as_whole(swarm: NatSwarm, name: str) -> None:
    """Stock hivemind reports a round of NATed peers in which 0 % came back as a success."""
    rounds: list[Round] = []

    def report_agrees_with_log() -> bool:
        nonlocal rounds
        status = swarm.status(name)
        rounds = swarm.rounds(name)
        assert status.report is not None and not status.num_restarts, status
        seen = Counter(r.outcome for r in rounds)
        assert status.report.rounds == RoundCounts(**seen), (status.report.rounds, seen)
        return True

    eventually(report_agrees_with_log, EPOCH_SECONDS, interval=0.2)
    whole = [r for r in rounds if r.outcome == "averaged"]
    assert whole and all(r.num_bytes and not r.num_banned and r.group_size >= 2 for r in whole), whole

    def others_hold_the_same() -> bool:
        held = {(r.epoch, r.digest) for other in swarm.peers if other != name for r in swarm.rounds(other)}
        mine = {(r.epoch, r.digest) for r in whole}
        assert mine <= held, mine - held
        return True

    eventually(others_hold_the_same, EPOCH_SECONDS, interval=0.2)


def test_peers_agree_on_the_epoch(swarm: NatSwarm) -> None:
    """Clients follow the full peers; one epoch apart is a transition under way."""

    def is_in_step() -> bool:
        epochs = {name: report.epoch for name in swarm.peers if (report := swarm.status(name).report)}
        assert len(epochs) == len(swarm.peers) and max(epochs.values()) - min(epochs.values()) <= 1, epochs
        return True

    eventually(is_in_step, EPOCH_SECONDS, interval=0.2)


def test_volunteer_that_presses_ctrl_c_leaves_at_once_with_thanks(swarm: NatSwarm) -> None:
    """Last in this file: it sends a peer home."""
    name, namespace = "home1", swarm.namespaces["home1"]
    assert swarm.net.pids([namespace])
    started = time.monotonic()
    swarm.peers[name].signal_group(signal.SIGINT)
    assert swarm.peers[name].wait(15) == 0
    assert time.monotonic() - started < 10
    thanks = re.search(r"Left the run. You contributed (\d+) samples. Thank you!", swarm.peers[name].output())
    assert thanks and int(thanks[1]) > 0
    eventually(lambda: not swarm.net.pids([namespace]), 5)


def _has_joined(status: PeerStatus) -> bool:
    return status.state in ("training", "waiting") and status.report is not None
