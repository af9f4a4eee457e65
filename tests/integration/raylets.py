"""A Ray cluster of two nodes on this machine, in a process of its own: `python -m tests.integration.raylets`

Its first line on standard output is JSON: the address and the processes by name. It ends when it is told to (SIGTERM),
and with it every process of Ray's; never by `ray stop`, which would end a stranger's as well.
"""

import json
import os
import signal
import threading
from typing import Any

SETTINGS = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "RAY_worker_niceness": "0",
}
"""A dead node is noticed in seconds, not in half a minute; peers do not yield to Ray."""

WORKER_IP = "127.0.0.2"
"""Not the head's: a driver takes any raylet that has its own address."""


def main() -> None:
    os.environ.update(SETTINGS)
    from ray.cluster_utils import Cluster

    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    common: dict[str, Any] = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=common)
    worker = cluster.add_node(**common, node_ip_address=WORKER_IP)
    cluster.wait_for_nodes()
    assert cluster.head_node is not None
    facts = {
        "address": cluster.address,
        "gcs": cluster.head_node.all_processes["gcs_server"][0].process.pid,
        "head": cluster.head_node.all_processes["raylet"][0].process.pid,
        "head_id": cluster.head_node.node_id,
        "worker": worker.all_processes["raylet"][0].process.pid,
        "worker_id": worker.node_id,
    }
    print(json.dumps(facts), flush=True)
    stopped.wait()
    cluster.shutdown()


if __name__ == "__main__":
    main()
