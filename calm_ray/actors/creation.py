"""How actors are created: detached, named, without a CPU of their own, each tied to a node."""

import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from calm_ray.actors.desired import NAMESPACE, SUPERVISOR, Desired, Orders, Slot, SupervisorStatus, actor_name
from calm_ray.errors import CalmRayError

START_SECONDS = 60.0
NUM_PLACINGS = 5


def create_peer(actor_class: type, slot: Slot, orders: Orders, *, run_id: str, node_id: str) -> Any:
    """`slot`'s actor on that node and nowhere else; ValueError if one of that name is there."""
    return (
        ray.remote(num_cpus=0)(actor_class)
        .options(
            name=actor_name(run_id, slot.name), namespace=NAMESPACE, lifetime="detached", num_gpus=slot.num_gpus,
            max_restarts=0 if slot.role == "trainer" else -1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(orders.model_dump_json())
    )  # fmt: skip


def create_supervisor(actor_class: type, desired: Desired) -> Any:
    """At home, and elsewhere once home is gone.

    Soft affinity alone is not enough: a raylet that has not heard of home yet, as in a cluster's first seconds, places
    the actor elsewhere (Ray 2.60).
    """
    for _ in range(NUM_PLACINGS):
        supervisor = _create_supervisor(actor_class, desired)
        where = SupervisorStatus.model_validate_json(ray.get(supervisor.status.remote(), timeout=START_SECONDS))
        if where.node_id == desired.home:
            return supervisor
        ray.kill(supervisor, no_restart=True)
        while actor_name(desired.run_id, SUPERVISOR) in named_actors():
            time.sleep(0.1)
        time.sleep(1.0)
    raise CalmRayError(f"Ray places the supervisor on other nodes than {desired.home}, where the output folder is")


def _create_supervisor(actor_class: type, desired: Desired) -> Any:
    return (
        ray.remote(num_cpus=0, max_restarts=-1)(actor_class)
        .options(
            name=actor_name(desired.run_id, SUPERVISOR), namespace=NAMESPACE, lifetime="detached",
            scheduling_strategy=NodeAffinitySchedulingStrategy(desired.home, soft=True),
        )
        .remote(desired.model_dump_json())
    )  # fmt: skip


def named_actors() -> set[str]:
    """Names of the actors in our namespace that are not dead."""
    return {a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE}
