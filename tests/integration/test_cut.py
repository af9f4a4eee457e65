"""Peers whose line is cut, for a minute or for long, and one that moves: what they say, and that they are back in step.

One swarm for all: an auxiliary peer and two volunteers, each in its namespace; each test leaves them in step.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from calm_ray.peers.status import PeerStatus
from calm_ray.report import PeerReport
from tests.eventually import eventually
from tests.integration.internet import START_SECONDS, VolunteerSwarm, volunteers
from tests.integration.namespaces import PUBLIC_NET, Internet
from tests.shards import ROOT

pytestmark = [
    pytest.mark.slow(shard=3), pytest.mark.needs(root=True, programs=("ip", "iptables")), pytest.mark.timeout(480),
]  # fmt: skip

CUT_SECONDS = 60.0
BACK_SECONDS = 90.0
NUMBERS = {"auxiliary": 1, "left": 2, "right": 3}
NEW_NUMBER = 33
IMPATIENT_SECONDS = 20.0
IMPATIENT = f"""
import sys, threading, time
from pathlib import Path

def shorten():
    order = Path(__file__).with_name("impatient")
    while not order.exists():
        time.sleep(0.5)  # sleep: until the test puts a file there
    sys.modules["calm_ray.swarm.averaging"].SOLO_SECONDS = {IMPATIENT_SECONDS}

if "calm_ray.peers.child" in sys.orig_argv:
    threading.Thread(target=shorten, daemon=True).start()
"""
"""Not five minutes, as soon as a file is there."""


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stub")
    (folder / "sitecustomize.py").write_text(IMPATIENT)
    return folder


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory, stub: Path) -> Iterator[VolunteerSwarm]:
    def places(net: Internet) -> Mapping[str, str]:
        hosts = {name: net.public_host(number) for name, number in NUMBERS.items()}
        for command in (
            "ip link add docker0 type bridge", "ip addr add 172.17.0.1/16 dev docker0", "ip link set docker0 up",
            "ip route add default dev eth0",
        ):  # fmt: skip
            net.run(hosts["right"], *command.split())
        return hosts

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{stub}:{ROOT}")
        with volunteers(tmp_path_factory.mktemp("cut"), run_id="cut", places=places, target_batch_size=1500) as found:
            yield found


def test_volunteer_that_is_cut_off_waits_and_is_back_in_step(swarm: VolunteerSwarm) -> None:
    before = _in_step(swarm, "right", epochs=3)
    said = _cut(swarm, "right")
    others = _report(swarm, "left").epoch
    swarm.net.mend(NUMBERS["right"])
    assert any("cut off: nobody of the swarm has answered" in text for text in said), said
    after = _in_step(swarm, "right", epochs=3)
    assert after.epoch > others, "the others had gone on"
    assert after.rounds.alone == before.rounds.alone, "it made no model of its own"
    assert after.boot_id == before.boot_id, "nothing was started again"
    swarm.wait("right", lambda status: not status.warnings, BACK_SECONDS)


def test_auxiliary_peer_that_starts_again_while_it_is_cut_off_begins_no_second_swarm(swarm: VolunteerSwarm) -> None:
    """It has the bundle, and would hand it out at epoch 0."""
    before = _in_step(swarm, "auxiliary", epochs=2)
    others = {swarm.status(name).peer_id for name in ("left", "right")}
    known = swarm.folder / "auxiliary" / "known-peers.json"
    eventually(lambda: all(peer in known.read_text() for peer in others), BACK_SECONDS, known.read_text)
    swarm.net.cut(NUMBERS["auxiliary"])
    (child,) = psutil.Process(swarm.peers["auxiliary"].pid).children()
    child.kill()
    words = "none of the 2 peers that it knew answers; trying again, and going on alone in"
    swarm.wait("auxiliary", lambda status: words in status.detail, START_SECONDS)
    states = {swarm.status("auxiliary").state}
    _until(lambda: states.add(swarm.status("auxiliary").state), seconds=CUT_SECONDS / 2)
    swarm.net.mend(NUMBERS["auxiliary"])
    assert states == {"joining"}
    epoch = _report(swarm, "left").epoch
    swarm.wait("auxiliary", lambda status: status.state == "assisting" and status.report, BACK_SECONDS)
    assert _in_step(swarm, "auxiliary", epochs=2).epoch >= epoch > before.epoch
    assert swarm.status("auxiliary").restarts == {"killed": 1}


def test_volunteer_that_was_alone_for_long_takes_the_others_model(swarm: VolunteerSwarm, stub: Path) -> None:
    """It has trained one of its own by then."""
    before = _in_step(swarm, "right", epochs=2)
    (stub / "impatient").touch()
    swarm.net.cut(NUMBERS["right"])
    swarm.wait("right", lambda status: _alone(status) >= before.rounds.alone + 2, START_SECONDS + BACK_SECONDS)
    others = _report(swarm, "left").epoch
    swarm.net.mend(NUMBERS["right"])
    after = _in_step(swarm, "right", epochs=3)
    assert after.epoch > others
    assert after.boot_id == before.boot_id
    last = {name: _report(swarm, name) for name in NUMBERS}
    assert last["right"].rounds.alone == after.rounds.alone, "it steps with the others again"


def test_volunteer_that_moves_joins_again_where_it_is(swarm: VolunteerSwarm) -> None:
    """Docker's bridge has an address, too, and keeps it wherever the machine goes."""
    _in_step(swarm, "right", epochs=1)
    before, said = swarm.status("right"), set[str]()
    host, device = swarm.namespaces["right"], ("dev", "eth0")
    swarm.net.run(host, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/eth0/promote_secondaries")
    swarm.net.run(host, "ip", "addr", "add", f"{PUBLIC_NET}.{NEW_NUMBER}/24", *device)
    swarm.net.run(host, "ip", "addr", "del", f"{PUBLIC_NET}.{NUMBERS['right']}/24", *device)

    def has_moved(status: PeerStatus) -> bool:
        said.update((status.detail, status.error))
        return status.restarts.get("moved") == 1 and status.state == "training"

    after = swarm.wait("right", has_moved, START_SECONDS)
    words = f"has changed from {PUBLIC_NET}.{NUMBERS['right']} to {PUBLIC_NET}.{NEW_NUMBER}: joining again"
    assert any(words in text for text in said), said
    assert after.peer_id == before.peer_id
    assert any(f"/{PUBLIC_NET}.{NEW_NUMBER}/" in address for address in after.addresses), after.addresses
    _in_step(swarm, "right", epochs=2)


def _cut(swarm: VolunteerSwarm, name: str) -> set[str]:
    """Cut its line for CUT_SECONDS; all its warnings meanwhile."""
    swarm.net.cut(NUMBERS[name])
    said: set[str] = set()
    _until(lambda: said.update(swarm.status(name).warnings), seconds=CUT_SECONDS)
    return said


def _until(look: Callable[[], object], *, seconds: float) -> None:
    """Look each second for so long."""
    deadline = time.monotonic() + seconds

    def is_over() -> bool:
        look()
        return time.monotonic() > deadline

    eventually(is_over, seconds + 10, interval=1.0)


def _alone(status: PeerStatus) -> int:
    return status.report.rounds.alone if status.report is not None else 0


def _report(swarm: VolunteerSwarm, name: str) -> PeerReport:
    report = swarm.wait(name, lambda status: status.report, START_SECONDS).report
    assert report is not None
    return report


def _in_step(swarm: VolunteerSwarm, name: str, *, epochs: int) -> PeerReport:
    """Wait for so many more true rounds of all three."""
    start = _report(swarm, name).rounds.averaged

    def is_in_step(status: PeerStatus) -> bool:
        report = status.report
        is_true = report is not None and report.rounds.averaged >= start + epochs
        return report is not None and is_true and report.last_group_size == len(NUMBERS)

    found = swarm.wait(name, is_in_step, START_SECONDS + BACK_SECONDS).report
    assert found is not None
    return found
