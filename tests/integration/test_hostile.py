"""What kills or cheats a peer from outside: the swarm goes on, and the peer comes back."""

from pathlib import Path

import psutil
import pytest

from tests.eventually import eventually
from tests.integration.runs import tiny_swarm


@pytest.mark.parametrize("victim", ["p2pd", "dht"])
def test_peer_whose_libp2p_died_starts_again(tmp_path: Path, victim: str) -> None:
    """Otherwise hivemind trains on alone for ever, and the peer still says "training"."""
    with tiny_swarm(tmp_path) as swarm:
        helpers = psutil.Process(swarm.handles["auxiliary"].pid).children(recursive=True)
        daemon = next(p for p in helpers if p.name() == "p2pd")
        (daemon if victim == "p2pd" else psutil.Process(daemon.ppid())).kill()
        swarm.wait("auxiliary", lambda s: s.num_restarts >= 1 and s.state == "assisting", 60)
        eventually(lambda: not any(p.is_running() for p in helpers), 10, lambda: f"left: {helpers}")
