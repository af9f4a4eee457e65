"""What kills or cheats a peer from outside: the swarm goes on, and the peer comes back."""

import signal
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.swarm_lab import Lab
from calm_ray.errors import ConfigError
from calm_ray.peers.control import socket_path
from calm_ray.peers.status import PeerStatus
from calm_ray.tables import AveragingTable
from tests.eventually import Children, eventually
from tests.integration.lab_checks import assert_every_change_is_a_true_round
from tests.integration.lab_swarm import SmallSwarm
from tests.integration.runs import tiny_swarm

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
HUNG_SECONDS = 90.0
"""It is noticed within little more than a minute."""
NUM_LIED_TO = 4
"""Epochs that the swarm makes after the lie."""


@pytest.mark.parametrize("victim", ["p2pd", "dht"])
def test_peer_whose_libp2p_died_starts_again(tmp_path: Path, victim: str) -> None:
    """Otherwise hivemind trains on alone for ever, and the peer still says "training"."""
    with tiny_swarm(tmp_path) as swarm:
        helpers = psutil.Process(swarm.handles["auxiliary"].pid).children(recursive=True)
        daemon, sockets = next(p for p in helpers if p.name() == "p2pd"), _sockets(tmp_path / "auxiliary")
        assert len(sockets) >= 2
        (daemon if victim == "p2pd" else psutil.Process(daemon.ppid())).kill()
        swarm.wait("auxiliary", lambda s: s.num_restarts >= 1 and s.state == "assisting", 60)
        eventually(lambda: not any(p.is_running() for p in helpers), 10, lambda: f"left: {helpers}")
        assert not sockets & _sockets(tmp_path / "auxiliary"), "nobody listens there any more"


@pytest.mark.slow(shard=3)
@pytest.mark.parametrize("victim", ["p2pd", "dht"])
def test_peer_whose_libp2p_hangs_starts_again(tmp_path: Path, victim: str) -> None:
    """It is there and does not answer: to the peer that looks like a line that is cut, for ever."""
    with tiny_swarm(tmp_path) as swarm:
        helpers = psutil.Process(swarm.handles["auxiliary"].pid).children(recursive=True)
        daemon = next(p for p in helpers if p.name() == "p2pd")
        (daemon if victim == "p2pd" else psutil.Process(daemon.ppid())).send_signal(signal.SIGSTOP)
        swarm.wait("auxiliary", lambda s: "does not answer: starting again" in s.error + s.detail, HUNG_SECONDS)
        swarm.wait("auxiliary", lambda s: s.num_restarts >= 1 and s.state == "assisting", 60)
        eventually(lambda: not any(p.is_running() for p in helpers), 10, lambda: f"left: {helpers}")


@pytest.mark.slow(shard=3)
@pytest.mark.needs(root=False, programs=("faketime",))
def test_clock_that_is_off_at_the_start_is_told_or_refused(tmp_path: Path) -> None:
    """hivemind lets nobody in who is off by 3 s, and says that only to its own log."""
    with tiny_swarm(tmp_path) as swarm:
        for name, offset in (("late", -10), ("mad", 60)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "clock").write_text(f"{offset:+d}\n")
            swarm.start(name, role="trainer", reach="public", environment={
                "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(tmp_path / name / "clock"),
                "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_NO_CACHE": "1", "DONT_FAKE_MONOTONIC": "1",
            })  # fmt: skip
        late = swarm.wait("late", lambda s: s.state == "training", 90)
        assert any("clock is 10.0 s behind the swarm's; set it by the network" in text for text in late.warnings)
        mad = eventually(lambda: (s := swarm.handles["mad"].status()).exit_code is not None and s, 90)
        assert isinstance(mad, PeerStatus)
        assert (mad.state, mad.exit_code) == ("parked", ConfigError.exit_code)
        assert "clock is 60.0 s ahead of the swarm's" in mad.error


def test_auxiliary_peer_that_starts_again_finds_its_swarm_and_keeps_its_address(tmp_path: Path) -> None:
    """It has no invite. Alone on another port it would be a second swarm, and invites would lead to nobody."""
    with tiny_swarm(tmp_path, target_batch_size=64) as swarm:
        swarm.start("trainer", role="trainer", wait_for="training")
        before = swarm.wait_for_epoch("auxiliary", 3, 90).addresses
        helpers = psutil.Process(swarm.handles["auxiliary"].pid).children(recursive=True)
        known = tmp_path / "auxiliary" / "known-peers.json"
        eventually(known.exists, 30)
        next(p for p in helpers if p.name() == "p2pd").kill()
        swarm.wait("auxiliary", lambda s: s.num_restarts >= 1 and s.state == "assisting", 60)
        report = swarm.handles["trainer"].status().report
        assert report is not None
        again = swarm.wait_for_epoch("auxiliary", report.epoch, 60)
        assert again.addresses == before
        swarm.start("newcomer", role="trainer", wait_for="training")
        swarm.wait_for_epoch("newcomer", report.epoch + 1, 60)


def test_swarm_goes_on_when_a_stranger_claims_an_epoch_that_it_cannot_show(tmp_path: Path) -> None:
    """Stock counts samples of the newest epoch only, so that one false record ends everybody's training."""
    table = AveragingTable(network="lan", max_staleness=1)
    with Lab() as lab, Children(tmp_path) as children:
        swarm = SmallSwarm(lab=lab, folder=tmp_path, averaging=table)
        swarm.start_all(2)
        swarm.wait_for_epoch("aux", 2)
        liar = (sys.executable, "-W", "ignore", "-m", "tests.integration.liar", swarm.run_id, str(10**6))
        children.start([*liar, *swarm.addresses], cwd=Path(__file__).parents[2])
        believed = "epoch 1000000 is claimed"
        eventually(lambda: believed in swarm.peers["t0"].log(), 60, lambda: swarm.peers["t0"].log()[-3000:])
        reached = max(event["epoch"] for event in swarm.peers["t0"].events("boundary"))
        swarm.wait_for_epoch("t0", reached + NUM_LIED_TO)
        journals = {name: peer.all_events() for name, peer in swarm.peers.items()}
    assert_every_change_is_a_true_round(journals)
    assert not any(event["event"] == "failed" for events in journals.values() for event in events)


def _sockets(folder: Path) -> set[Path]:
    """hivemind's, of the peer in `folder`."""
    prefix = socket_path(folder).with_suffix("")
    return set(prefix.parent.glob(f"{prefix.name}-p2p*.sock"))
