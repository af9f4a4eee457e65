"""How actors are created: detached, named, without a CPU of their own, each tied to a node. And the nodes there are."""

import contextlib
import time
from typing import Any

import ray
from ray._private.state import available_resources_per_node  # a DeveloperAPI; the public one wants a dashboard
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from calm_ray.actors.desired import NAMESPACE, SUPERVISOR, Desired, Orders, Slot, SupervisorStatus, actor_name
from calm_ray.actors.plan import NodeView
from calm_ray.errors import CalmRayError

START_SECONDS = 60.0
NUM_PLACINGS = 5
GONE_SECONDS = 10.0
"""For a name to become free after its actor was killed."""


def create_peer(actor_class: type, slot: Slot, orders: Orders, *, run_id: str, node_id: str) -> Any:
    """`slot`'s actor on that node and nowhere else; ActorAlreadyExistsError if one of that name is there."""
    return (
        ray.remote(num_cpus=0)(actor_class)
        .options(
            name=actor_name(run_id, slot.name), namespace=NAMESPACE, lifetime="detached", num_gpus=slot.num_gpus,
            enable_task_events=False,  # a look a second would fill the head's table of tasks: 70 MB an hour (Ray 2.60)
            max_restarts=0 if slot.role == "trainer" else -1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(orders.model_dump_json())
    )  # fmt: skip


def create_supervisor(actor_class: type, desired: Desired) -> Any:
    """At home, and elsewhere once home is gone. CalmRayError if it does not come up, or there is one.

    Soft affinity alone is not enough: a raylet that has not heard of home yet, as in a cluster's first seconds, places
    the actor elsewhere (Ray 2.60).
    """
    for _ in range(NUM_PLACINGS):
        supervisor = None
        try:
            supervisor = _create_supervisor(actor_class, desired)
            status = SupervisorStatus.model_validate_json(ray.get(supervisor.status.remote(), timeout=START_SECONDS))
        except (ray.exceptions.RayError, ValueError) as exc:
            if supervisor is not None:
                _kill(supervisor)
            raise CalmRayError(f"the run's supervisor does not come up: {in_a_line(exc)}") from exc
        if status.node_id == desired.home:
            return supervisor
        _kill(supervisor)
        deadline = time.monotonic() + GONE_SECONDS
        while actor_name(desired.run_id, SUPERVISOR) in named_actors() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1.0)
    raise CalmRayError(f"Ray places the supervisor on other nodes than {desired.home}, where the output folder is")


def _create_supervisor(actor_class: type, desired: Desired) -> Any:
    return (
        ray.remote(num_cpus=0, max_restarts=-1)(actor_class)
        .options(
            name=actor_name(desired.run_id, SUPERVISOR), namespace=NAMESPACE, lifetime="detached",
            enable_task_events=False,
            scheduling_strategy=NodeAffinitySchedulingStrategy(desired.home, soft=True),
        )
        .remote(desired.model_dump_json())
    )  # fmt: skip


def _kill(actor: Any) -> None:
    with contextlib.suppress(ray.exceptions.RayError, ValueError):
        ray.kill(actor, no_restart=True)


def named_actors() -> set[str]:
    """Names of the actors in our namespace that are not dead."""
    return {a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE}


def alive_nodes(*, home: str) -> list[NodeView]:
    """The nodes of the cluster, with the GPUs that nobody holds now."""
    free = available_resources_per_node()  # what is used up is not mentioned
    return [
        NodeView(
            node_id=node["NodeID"], is_home=node["NodeID"] == home, num_gpus=node["Resources"].get("GPU", 0.0),
            free_gpus=free.get(node["NodeID"], {}).get("GPU", 0.0),
        )
        for node in ray.nodes() if node["Alive"]
    ]  # fmt: skip


def in_a_line(exc: Exception) -> str:
    """What went wrong: Ray's errors hold whole tracebacks of other processes."""
    said = str(exc.cause) if isinstance(exc, ray.exceptions.RayTaskError) else str(exc)
    return (said.strip().splitlines() or [type(exc).__name__])[-1].strip()
