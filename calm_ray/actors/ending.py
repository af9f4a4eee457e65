"""End a run's own actors and their peers, in order, and leave nothing behind. For whoever is asked by a person to."""

import contextlib
import logging
from typing import Any

import ray

from calm_ray.actors.creation import named_actors
from calm_ray.actors.desired import NAMESPACE, SUPERVISOR, actor_name
from calm_ray.actors.supervisor import HALT_SECONDS

logger = logging.getLogger(__name__)

STOP_SECONDS = 30.0
ORDER = ("trainer", "monitor", "auxiliary")
"""Auxiliary peers last, so that goodbyes still find someone."""


def end_run(run_id: str) -> list[str]:
    """The supervisor first, or it would start what we end. The names of what was ended."""
    prefix = actor_name(run_id, "")
    names = [name for name in named_actors() if name.startswith(prefix)]
    if actor_name(run_id, SUPERVISOR) in names:
        supervisor = _find(actor_name(run_id, SUPERVISOR))
        if supervisor is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(supervisor.halt.remote(), timeout=HALT_SECONDS + 5)
            _kill(supervisor)
        names = [name for name in named_actors() if name.startswith(prefix)]
    for role in ORDER:
        actors = [_find(name) for name in names if name.startswith(actor_name(run_id, f"{role}-"))]
        present = [actor for actor in actors if actor is not None]
        pending = [actor.stop.remote() for actor in present]
        if pending:
            ray.wait(pending, num_returns=len(pending), timeout=STOP_SECONDS)
        for actor in present:
            _kill(actor)
    logger.info("run=%s action=end num_actors=%d", run_id, len(names))
    return [name.removeprefix(prefix) for name in names]


def _find(name: str) -> Any:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:  # it has gone meanwhile
        return None


def _kill(actor: Any) -> None:
    with contextlib.suppress(ray.exceptions.RayError, ValueError):
        ray.kill(actor, no_restart=True)
