"""What to tell people about a peer of ours: a line for each thing that went wrong, one when it is right again. Pure."""

from collections.abc import Iterator

from calm_ray.actors.desired import ActorReport

AWAY = ("restarting", "stalled", "starting", "joining", "leaving")
ENDED = ("parked", "left")


def incidents_of(
    name: str, *, before: ActorReport | None, now: ActorReport, has_failed: bool = False
) -> Iterator[str]:  # fmt: skip
    """Lines about slot `name`. `before`: the report before this one, of any actor of this slot, if there was one;
    `has_failed`: an actor of it was lost."""
    peer, was = now.peer, before.peer if before is not None else None
    is_new_actor = before is not None and before.worker_pid != now.worker_pid
    if now.is_adopted and (before is None or is_new_actor or not before.is_adopted):
        if before is not None:  # else it is the supervisor that is new
            yield f"{name}: adopted, process {peer.pid} had gone on"
    elif peer.num_restarts > (was.num_restarts if was is not None and was.pid in (0, peer.pid) else 0):
        yield f"{name}: restart {peer.num_restarts}: {peer.detail}"
    if now.num_revivals > (before.num_revivals if before is not None and not is_new_actor else 0):
        yield f"{name}: starting it again: {peer.detail}"
    if peer.state == "parked" and (was is None or was.state != "parked"):
        yield f"{name}: has given up: {peer.error}"
    was_away = was is not None and was.state in AWAY and (has_failed or was.num_restarts or now.num_revivals)
    if was_away and peer.state not in (*AWAY, *ENDED):
        yield f"{name}: back, {peer.state}"
