"""Volunteers behind NAT, as most are: two home networks and two public hosts, joined by nothing but the invite.

Everything runs in network namespaces (root, `ip`, `iptables`); the peers are started as volunteers start them. The
tests share one swarm of four peers and read it in the order in which they are written.
"""

import re
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping

import pytest

from calm_ray.peers.status import PeerStatus
from calm_ray.report import RoundCounts
from tests.eventually import eventually
from tests.integration.internet import START_SECONDS, Round, VolunteerSwarm, volunteers
from tests.integration.namespaces import FIRST_GATEWAY, PUBLIC_NET, Internet

pytestmark = [
    pytest.mark.slow(shard=1),
    pytest.mark.needs(root=True, programs=("ip", "iptables")),
    pytest.mark.timeout(600),
]

EPOCH_SECONDS = 60.0
"""Four peers on two cores that may be busy: far more than the five seconds that an epoch takes alone."""
NUM_EPOCHS_WATCHED = 3
HOMES = ("home1", "home2")
VOLUNTEERS = (*HOMES, "public")


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VolunteerSwarm]:
    def places(net: Internet) -> Mapping[str, str]:
        return {
            "auxiliary": net.public_host(1),
            "public": net.public_host(2),
            "home1": net.host_behind_nat(1, drops_strangers=True),
            "home2": net.host_behind_nat(2, drops_strangers=False),
        }

    with volunteers(tmp_path_factory.mktemp("nat"), run_id="nat", places=places) as found:
        yield found


def test_auxiliary_peer_names_its_public_address_first(swarm: VolunteerSwarm) -> None:
    assert swarm.status("auxiliary").addresses[0].startswith(f"/ip4/{PUBLIC_NET}.1/tcp/4001/p2p/")


@pytest.mark.parametrize("name", HOMES)
def test_volunteer_behind_nat_learns_it_by_dial_back_and_is_a_client(swarm: VolunteerSwarm, name: str) -> None:
    status = swarm.wait(name, _has_joined, START_SECONDS)
    assert status.is_client_mode and not status.addresses
    assert "others cannot reach this machine (nobody answers at the observed address" in swarm.peers[name].output()
    assert f"(seen as {PUBLIC_NET}.{FIRST_GATEWAY + HOMES.index(name) + 1})" in swarm.peers[name].output()


def test_volunteer_on_a_public_host_is_dialled_back_and_is_a_full_peer(swarm: VolunteerSwarm) -> None:
    """Three ask at once and one desk dials one at a time: the answer "busy" must not make anyone a client."""
    status = swarm.wait("public", _has_joined, START_SECONDS)
    assert not status.is_client_mode
    assert status.addresses[0].startswith(f"/ip4/{PUBLIC_NET}.2/tcp/")
    assert f"others can reach this machine at {PUBLIC_NET}.2:" in swarm.peers["public"].output()


@pytest.mark.parametrize("name", HOMES)
def test_volunteer_behind_nat_contributes_epoch_after_epoch(swarm: VolunteerSwarm, name: str) -> None:
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
def test_every_round_is_counted_as_it_ended_and_none_without_data_as_whole(swarm: VolunteerSwarm, name: str) -> None:
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


def test_peers_agree_on_the_epoch(swarm: VolunteerSwarm) -> None:
    """Clients follow the full peers; one epoch apart is a transition under way."""

    def is_in_step() -> bool:
        epochs = {name: report.epoch for name in swarm.peers if (report := swarm.status(name).report)}
        assert len(epochs) == len(swarm.peers) and max(epochs.values()) - min(epochs.values()) <= 1, epochs
        return True

    eventually(is_in_step, EPOCH_SECONDS, interval=0.2)


def test_volunteer_that_presses_ctrl_c_leaves_at_once_with_thanks(swarm: VolunteerSwarm) -> None:
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
