"""A peer of a run that claims an epoch which nobody has reached, as a trainer and as a holder of its state.

python -m tests.integration.liar RUN_ID EPOCH ADDRESS..., until it is told to end.
"""

import signal
import sys
import tempfile
import threading
from pathlib import Path

from calm_ray.swarm.node import NodeOptions, Swarm
from calm_ray.swarm.progress import ProgressTracker
from calm_ray.swarm.roster import Roster


def lie(run_id: str, epoch: int, addresses: tuple[str, ...], *, folder: Path, stop: threading.Event) -> None:
    """Write both records again and again; nothing is served."""
    options = NodeOptions(is_client_mode=False, listen="/ip4/127.0.0.1/tcp/0", identity_path=folder / "identity")
    swarm = Swarm.join(run_id, initial_peers=addresses, options=options)
    roster = Roster(swarm, refresh_seconds=1.0)
    tracker = ProgressTracker(swarm.dht, run_id, 1, private_key=swarm.key, start=True)
    roster.offer(lambda: float(epoch))
    num_samples = 0
    while not stop.wait(0.5):
        num_samples += 1
        tracker.report(epoch=epoch, samples_accumulated=num_samples)
    roster.close()
    tracker.shutdown(2.0)
    swarm.close()


if __name__ == "__main__":
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    with tempfile.TemporaryDirectory() as path:
        lie(sys.argv[1], int(sys.argv[2]), tuple(sys.argv[3:]), folder=Path(path), stop=stopped)
