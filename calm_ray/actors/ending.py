"""End a run's own actors and their peers, in order, and leave nothing behind. For whoever is asked by a person to."""

import contextlib
import logging
import time
from typing import Any

import ray

from calm_ray.actors.creation import in_a_line, named_actors
from calm_ray.actors.desired import NAMESPACE, SUPERVISOR, actor_name
from calm_ray.actors.keeper import LEAVE_SECONDS
from calm_ray.actors.supervisor import HALT_SECONDS

logger = logging.getLogger(__name__)

STOP_SECONDS = LEAVE_SECONDS + 10.0
"""For one that is being created: its worker starts, then its peer, and then that leaves."""
RETRY_SECONDS = 1.0
ORDER = ("trainer", "monitor", "auxiliary")
"""Auxiliary peers last, so that goodbyes still find someone."""


def end_run(run_id: str) -> list[str]:
    """The supervisor first, or it would start what we end. A line for each peer that has not said that it left."""
    prefix = actor_name(run_id, "")
    supervisor = _find(actor_name(run_id, SUPERVISOR))
    if supervisor is not None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(supervisor.halt.remote(), timeout=HALT_SECONDS + 5)
        _kill(supervisor)
    names = sorted(name for name in named_actors() if name.startswith(prefix))
    silent: dict[str, str] = {}
    for role in ORDER:
        silent |= _stop([name for name in names if name.startswith(actor_name(run_id, f"{role}-"))])
    logger.info("run=%s action=end num_actors=%d num_silent=%d", run_id, len(names), len(silent))
    return [f"{name.removeprefix(prefix)} has not said that it left: {why}" for name, why in silent.items()]


def _stop(names: list[str], *, limit_seconds: float = STOP_SECONDS) -> dict[str, str]:
    """Each actor's peer leaves, and then the actor is killed. Name -> why we do not know that its peer has left.

    An actor that Ray is making again forgets our call, so it is asked again. One whose name is gone has been ended by
    somebody else, or its node has died.
    """
    deadline = time.monotonic() + limit_seconds
    actors = {name: actor for name in names if (actor := _find(name)) is not None}
    pending = {name: actor.stop.remote() for name, actor in actors.items()}
    silent: dict[str, str] = {}
    while pending and time.monotonic() < deadline:
        ready, _ = ray.wait(list(pending.values()), timeout=RETRY_SECONDS)
        for name in [name for name, call in pending.items() if call in ready]:
            call = pending.pop(name)
            try:
                ray.get(call)
            except ray.exceptions.RayTaskError as exc:
                silent[name] = in_a_line(exc)
            except ray.exceptions.RayError:
                time.sleep(RETRY_SECONDS)
                if _find(name) is not None:
                    pending[name] = actors[name].stop.remote()
    silent |= dict.fromkeys(pending, f"no answer in {limit_seconds:.0f} s")
    for actor in actors.values():
        _kill(actor)
    return silent


def _find(name: str) -> Any:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:  # it has gone meanwhile
        return None


def _kill(actor: Any) -> None:
    with contextlib.suppress(ray.exceptions.RayError, ValueError):
        ray.kill(actor, no_restart=True)
