"""SIGKILL at each level of a peer: no DHT process, averager or p2pd may outlive the process that owned it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.eventually import eventually
from tests.integration.runs import tiny_swarm

STOCK = """
import os, hivemind, sys
dht = hivemind.DHT(start=True)
print("ready", flush=True)
sys.stdin.read()
"""


def _tree(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


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
            helpers = [p for p in _tree(owner.pid) if p.name() != "torch_shm_manager"]
            assert "p2pd" in {p.name() for p in helpers}
            owner.kill()
            owner.wait()
            _, alive = psutil.wait_procs(helpers, timeout=3)
            assert alive, "stock hivemind cleans up after itself now"
        finally:
            os.killpg(owner.pid, signal.SIGKILL)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize("victim", ["child", "watchdog"])
def test_peer_killed_leaves_nothing_behind(tmp_path: Path, victim: str) -> None:
    with tiny_swarm(tmp_path) as swarm:
        handle = swarm.handles["auxiliary"]
        helpers = _tree(handle.pid)
        child = next(p for p in helpers if "calm_ray.peers.child" in p.cmdline())
        assert "p2pd" in {p.name() for p in helpers}
        if victim == "child":
            child.kill()
            eventually(lambda: not _alive(helpers), 10, lambda: f"left: {_alive(helpers)}")
            swarm.wait("auxiliary", lambda s: s.num_restarts >= 1 and s.state == "assisting", 60)
        else:
            os.kill(handle.pid, signal.SIGKILL)
            eventually(lambda: not _alive(helpers), 10, lambda: f"left: {_alive(helpers)}")


def test_peer_leaves_when_its_lease_is_lost(tmp_path: Path) -> None:
    with tiny_swarm(tmp_path) as swarm:
        handle = swarm.handles["auxiliary"]
        helpers = [psutil.Process(handle.pid), *_tree(handle.pid)]
        handle.abandon()
        eventually(lambda: not _alive(helpers), 10, lambda: f"left: {_alive(helpers)}")
