"""Which peers' actors to create now, and where. Pure: slots, members, nodes, what failed when, and now (monotonic).

An actor is only ever made on a node that is alive and has room, tied to it, and given up after some time: one that
waits for a place is demand on Ray's autoscaler, and only the backstop may spend. Rejected: letting Ray choose the node,
which does both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from calm_ray.actors.desired import Member, Slot
from calm_ray.peers.budget import backoff_seconds

FORGET_SECONDS = 600.0
"""A node that dies now and then is normal: older failures do not slow a start down."""
MAX_KEPT = 16
GPU_GRAIN = 1e-4
"""Ray counts in ten-thousandths."""


@dataclass(frozen=True, kw_only=True)
class NodeView:
    """A node that is alive."""

    node_id: str
    num_gpus: float = 0.0
    free_gpus: float = float("inf")
    """Of these, those that no actor or task of anybody's holds, as far as Ray knows at this moment."""
    is_home: bool = False
    """The supervisor's: the output folder is there."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A peer of ours, and where it is."""

    slot: Slot
    node_id: str
    is_counted: bool
    """Ray has surely taken its GPUs out of what is free."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Create the actor of slot `name` on that node."""

    name: str
    node_id: str


def plan_starts(
    slots: Sequence[Slot], members: Mapping[str, Member], *, nodes: Sequence[NodeView], has_invite: bool,
    failures: Mapping[str, Sequence[float]], now: float,
) -> tuple[Start, ...]:  # fmt: skip
    """Auxiliary peers one after the other, for their addresses make the invite; with that, everyone else in order."""
    is_anyone_up = any(member.is_up for member in members.values())
    placed = [
        Placed(slot=slot, node_id=member.node_id, is_counted=not member.is_unheard)
        for slot in slots if (member := members[slot.name]).is_there
    ]  # fmt: skip
    starts: list[Start] = []
    for slot in slots:
        # The first is told of all who live, so that it goes to them: first they must have said where they are.
        is_first = slot.name == slots[0].name and not any(member.is_unheard for member in members.values())
        may_join = is_anyone_up and (has_invite or slot.role == "auxiliary")
        if members[slot.name].is_there or not (is_first or may_join) or now < due_at(failures[slot.name], now=now):
            continue
        node = choose_node(slot, placed=placed, nodes=nodes)
        if node is not None:
            starts.append(Start(name=slot.name, node_id=node))
            placed.append(Placed(slot=slot, node_id=node, is_counted=False))
    return tuple(starts)


def choose_node(slot: Slot, *, placed: Sequence[Placed], nodes: Sequence[NodeView]) -> str | None:
    """A node that is alive and has the GPUs; None if there is none. `placed`: where the others are.

    Equals go to different nodes. At home first, except trainers: those go where the fewest peers are.
    """

    def cost(node: NodeView) -> tuple[int, int, bool, str]:
        there = [other.slot for other in placed if other.node_id == node.node_id]
        num_equals = sum(other.role == slot.role for other in there)
        return num_equals, len(there) if slot.role == "trainer" else 0, not node.is_home, node.node_id

    fitting = [node for node in nodes if not slot.num_gpus or _free_gpus(node, placed) + GPU_GRAIN > slot.num_gpus]
    return min(fitting, key=cost).node_id if fitting else None


def _free_gpus(node: NodeView, placed: Sequence[Placed]) -> float:
    """Neither those of our own peers, nor those that somebody else's job holds."""
    there = [other for other in placed if other.node_id == node.node_id]
    ours = sum(other.slot.num_gpus for other in there)
    coming = sum(other.slot.num_gpus for other in there if not other.is_counted)
    return min(node.num_gpus - ours, node.free_gpus - coming)


def due_at(failures: Sequence[float], *, now: float) -> float:
    """When a slot may be started again. Nothing is given up here: a node that comes back is used."""
    recent = [at for at in failures if now - at < FORGET_SECONDS]
    if not recent:
        return now
    return recent[-1] + backoff_seconds(len(recent))


def with_failure(failures: Sequence[float], *, now: float) -> tuple[float, ...]:
    return (*failures, now)[-MAX_KEPT:]


def next_invite_addresses(auxiliaries: Sequence[Member]) -> tuple[str, ...]:
    """Two addresses of each auxiliary peer, once all that have not given up are there; else nothing, so that the
    invite of before counts on: a peer that comes back keeps its address."""
    wanted = [member for member in auxiliaries if not member.is_parked]
    if not wanted or not all(member.is_up for member in wanted):
        return ()
    return tuple(address for member in wanted if member.peer is not None for address in member.peer.addresses[:2])


def known_addresses(members: Mapping[str, Member], *, besides: str) -> tuple[str, ...]:
    """Of full peers of ours that live, auxiliary peers first."""
    others = [m for m in members.values() if m.name != besides and m.is_there and m.peer is not None]
    others.sort(key=lambda member: member.role != "auxiliary")
    return tuple(address for m in others if m.peer is not None for address in m.peer.addresses[:2])
