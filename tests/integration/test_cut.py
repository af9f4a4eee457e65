"""A volunteer whose line is cut for a minute: it waits, says so, makes no model of its own, and is back in step."""

import time
from collections.abc import Iterator, Mapping

import pytest

from calm_ray.peers.status import PeerStatus
from calm_ray.report import PeerReport
from tests.eventually import eventually
from tests.integration.internet import START_SECONDS, VolunteerSwarm, volunteers
from tests.integration.namespaces import Internet

pytestmark = [
    pytest.mark.slow(shard=1), pytest.mark.needs(root=True, programs=("ip", "iptables")), pytest.mark.timeout(480),
]  # fmt: skip

CUT_SECONDS = 60.0
BACK_SECONDS = 90.0
NUMBERS = {"auxiliary": 1, "left": 2, "right": 3}


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VolunteerSwarm]:
    def places(net: Internet) -> Mapping[str, str]:
        return {name: net.public_host(number) for name, number in NUMBERS.items()}

    with volunteers(tmp_path_factory.mktemp("cut"), run_id="cut", places=places, target_batch_size=1500) as found:
        yield found


def test_volunteer_that_is_cut_off_waits_and_is_back_in_step(swarm: VolunteerSwarm) -> None:
    before = _in_step(swarm, "right", epochs=3)
    cut_at = time.monotonic()
    swarm.net.cut(NUMBERS["right"])
    said: set[str] = set()

    def a_minute_has_passed() -> bool:
        said.update(swarm.status("right").warnings)
        return time.monotonic() > cut_at + CUT_SECONDS

    eventually(a_minute_has_passed, CUT_SECONDS + 10, interval=1.0)
    others = _report(swarm, "left").epoch
    swarm.net.mend(NUMBERS["right"])
    assert any("cut off: nobody of the swarm has answered" in text for text in said), said
    after = _in_step(swarm, "right", epochs=3)
    assert after.epoch > others, "the others had gone on"
    assert after.rounds.alone == before.rounds.alone, "it made no model of its own"
    assert after.boot_id == before.boot_id, "nothing was started again"
    swarm.wait("right", lambda status: not status.warnings, BACK_SECONDS)


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
