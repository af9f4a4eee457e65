"""A Ray cluster of two nodes, in a process of its own: `python -m benchmarks.fault_cluster RUN_ID FOLDER`

Writes FOLDER/cluster.json (address, raylets, how many nodes it had) and, twice a second, FOLDER/supervisor.json: what
the run's supervisor says, so that nobody else needs a connection to Ray. A line on standard input makes a new worker
node in the place of the one that was killed; when standard input ends, so does the cluster, by process id and never by
`ray stop`.
"""

import json
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

from calm_ray.peers.budget import write_atomically
from tests.integration.raylets import SETTINGS

ASK_SECONDS = 0.5
CLUSTER, STATUS = "cluster.json", "supervisor.json"
COMMON: dict[str, Any] = {"num_cpus": 1, "include_dashboard": False}


def main(run_id: str, folder: Path) -> None:
    os.environ.update(SETTINGS)
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=COMMON)
    worker: Any = cluster.add_node(**COMMON)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, namespace="calm-ray", log_to_driver=False, logging_level=logging.ERROR)
    stopped = threading.Event()
    asking = threading.Thread(target=_ask_for_ever, args=(run_id, folder / STATUS, stopped), daemon=True)
    asking.start()
    num_nodes = 0
    try:
        while True:
            num_nodes += 1
            facts = {
                "address": cluster.address,
                "worker": worker.all_processes["raylet"][0].process.pid,
                "worker_id": worker.node_id,
                "num_nodes": num_nodes,
            }
            write_atomically(folder / CLUSTER, json.dumps(facts))
            if not sys.stdin.readline():
                break
            cluster.remove_node(worker, allow_graceful=False)  # its raylet is dead; this reaps what else it had
            worker = cluster.add_node(**COMMON)
    finally:
        stopped.set()
        asking.join(5.0)
        ray.shutdown()
        cluster.shutdown()


def _ask_for_ever(run_id: str, path: Path, stopped: threading.Event) -> None:
    import ray

    while not stopped.wait(ASK_SECONDS):
        try:
            actor = ray.get_actor(f"{run_id}/supervisor", namespace="calm-ray")
            status: Any = ray.get(actor.status.remote(), timeout=5)
            write_atomically(path, status)
        except (ValueError, ray.exceptions.RayError):  # not there yet, or not any more
            continue


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
