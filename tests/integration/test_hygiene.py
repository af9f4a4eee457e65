"""SIGKILL at each level of a peer: nothing outlives its owner, what should come back does, what should stay stays."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from calm_ray.errors import CalmRayError
from calm_ray.peers.handle import KILLED_CODE, PeerHandle
from calm_ray.peers.process import DUMP_SIGNAL
from calm_ray.peers.spec import NUM_FILES
from calm_ray.peers.vitals import MARK
from tests.eventually import eventually
from tests.integration.runs import quiet_swarm

STOCK = """
import os, hivemind, sys
dht = hivemind.DHT(start=True)
print("ready", flush=True)
sys.stdin.read()
"""


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_stock_hivemind_killed_leaves_its_daemon_behind() -> None:
    """The behaviour that `swarm/hygiene.py` corrects. Fails the day hivemind mends it: then delete our correction."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", STOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, start_new_session=True,
    ) as owner:  # fmt: skip
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == b"ready\n"
            children = psutil.Process(owner.pid).children(recursive=True)
            helpers = [p for p in children if p.name() != "torch_shm_manager"]
            assert "p2pd" in {p.name() for p in helpers}
            owner.kill()
            owner.wait()
            _, alive = psutil.wait_procs(helpers, timeout=3)
            assert alive, "stock hivemind cleans up after itself now"
        finally:
            os.killpg(owner.pid, signal.SIGKILL)


def _helpers(handle: PeerHandle) -> list[psutil.Process]:
    """Child, DHT process, p2pd."""
    return psutil.Process(handle.pid).children(recursive=True)


def _child(helpers: list[psutil.Process]) -> psutil.Process:
    return next(p for p in helpers if "calm_ray.peers.child" in p.cmdline())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
def test_peer_whose_child_was_killed_comes_back_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Its DHT process and p2pd: see test_hostile.py."""
    with quiet_swarm(tmp_path) as swarm:
        helpers = _helpers(swarm.handles["auxiliary"])
        assert "p2pd" in {p.name() for p in helpers}
        _child(helpers).kill()
        eventually(lambda: not _alive(helpers), 10, lambda: f"left: {_alive(helpers)}")
        status = swarm.wait("auxiliary", lambda s: s.num_restarts >= 1 and s.state == "assisting", 60)
        assert status.restarts == {"killed": 1}


def test_peer_may_open_many_files_whatever_the_shell_allows(tmp_path: Path) -> None:
    """Its daemon as well: each connection is one."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        with quiet_swarm(tmp_path) as swarm:
            helpers = _helpers(swarm.handles["auxiliary"])
            limits = {process.name(): process.rlimit(psutil.RLIMIT_NOFILE)[0] for process in helpers}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    wanted = NUM_FILES if before[1] == resource.RLIM_INFINITY else min(NUM_FILES, before[1])
    assert min(limits.values()) >= wanted, limits
    assert "p2pd" in limits


def test_peer_whose_watchdog_was_killed_leaves_nothing_and_the_next_one_sweeps(tmp_path: Path) -> None:
    """Even what could not leave by itself: a child that hangs, and a bystander that bears the folder's mark."""
    with quiet_swarm(tmp_path) as swarm:
        handle = swarm.handles["auxiliary"]
        helpers = _helpers(handle)
        os.kill(handle.pid, signal.SIGKILL)
        eventually(lambda: not _alive(helpers), 10, lambda: f"left: {_alive(helpers)}")
        assert handle.status().exit_code == KILLED_CODE

        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        bystander, ours = (
            subprocess.Popen(sleeper, env={**os.environ, MARK: str(folder)})
            for folder in (tmp_path / "another", tmp_path / "auxiliary")
        )
        try:
            swarm.start_first()
            assert ours.wait(1) == -signal.SIGTERM
            assert bystander.poll() is None
        finally:
            for process in (bystander, ours):
                process.kill()
                process.wait()
        log = swarm.log("auxiliary")
        assert f"watchdog: ended what an earlier crash had left: {psutil.Process().name()[:6]}" in log


def test_trainer_leaves_when_its_lease_is_lost(tmp_path: Path) -> None:
    with quiet_swarm(tmp_path) as swarm:
        handle = swarm.start("trainer", role="trainer", reach="public", wait_for="training")
        helpers = [psutil.Process(handle.pid), *_helpers(handle)]
        handle.abandon()
        eventually(lambda: not _alive(helpers), 10, lambda: f"left: {_alive(helpers)}")
        assert handle.status().exit_code == 0


def test_auxiliary_peer_outlives_its_holder_and_is_adopted_with_its_pid(tmp_path: Path) -> None:
    with quiet_swarm(tmp_path, run_id="adopted") as swarm:
        handle = swarm.handles["auxiliary"]
        config_hash = swarm.config.run.config_hash()
        helpers = [psutil.Process(handle.pid), *_helpers(handle)]
        handle.abandon()
        adopter = PeerHandle(handle.spec)
        with pytest.raises(CalmRayError, match=r"another peer runs there \(pid \d+\): config: [0-9a-f]+, wanted other"):
            adopter.start(config_hash="other")
        with pytest.raises(CalmRayError, match="role: auxiliary, wanted monitor"):
            PeerHandle(handle.spec.model_copy(update={"role": "monitor", "resume": None})).start()
        adopter.start(config_hash=config_hash)
        assert adopter.is_adopted
        assert adopter.pid == handle.pid
        _child(helpers).send_signal(DUMP_SIGNAL)  # as the watchdog does before it ends one that hangs
        eventually(lambda: "(most recent call first)" in swarm.log("auxiliary"), 5, lambda: swarm.log("auxiliary"))
        assert len(_alive(helpers)) == len(helpers)
        assert adopter.status().num_restarts == 0
        adopter.stop()
        eventually(lambda: not _alive(helpers), 10, lambda: f"left: {_alive(helpers)}")


def test_auxiliary_peer_that_nobody_adopts_leaves_in_the_end(tmp_path: Path) -> None:
    with quiet_swarm(tmp_path) as swarm:
        swarm.handles["auxiliary"].stop()
        swarm.start_first(adoption_seconds=3.0)
        handle = swarm.handles["auxiliary"]
        helpers = [psutil.Process(handle.pid), *_helpers(handle)]
        watch = time.monotonic()
        handle.abandon()
        eventually(lambda: not _alive(helpers), 15, lambda: f"left: {_alive(helpers)}")
        assert time.monotonic() - watch > 3.0
