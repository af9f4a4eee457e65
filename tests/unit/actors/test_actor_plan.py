"""Who is started where, decided without Ray."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from calm_ray.actors.desired import ActorReport, Member, Slot
from calm_ray.actors.plan import (
    NodeView,
    Placed,
    choose_node,
    due_at,
    known_addresses,
    next_invite_addresses,
    plan_starts,
)
from calm_ray.peers.budget import MAX_BACKOFF_SECONDS
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus
from calm_ray.report import Role

HEAD, WORKER = NodeView(node_id="head", is_home=True), NodeView(node_id="worker")
UP = {"auxiliary": "assisting", "monitor": "watching", "trainer": "training"}


def slot(role: Role, index: int = 0, *, num_gpus: float = 0) -> Slot:
    spec = PeerSpec(role=role, folder=Path(f"/out/peers/{role}-{index}"), bundle=Path("/out/bundle"))
    return Slot(name=f"{role}-{index}", spec=spec, num_gpus=num_gpus)


SLOTS = (slot("auxiliary", 0), slot("auxiliary", 1), slot("monitor"), slot("trainer", 0), slot("trainer", 1))


def member(of: Slot, *, state: str = "", node_id: str = "head", is_there: bool = True) -> Member:
    addresses = (f"/ip4/127.0.0.1/tcp/1/p2p/{of.name}", "second", "third")
    peer = PeerStatus(role=of.role, state=state or UP[of.role], addresses=addresses)
    report = ActorReport(peer=peer)
    return Member(name=of.name, role=of.role, is_there=is_there, node_id=node_id, report=report)


def away(of: Slot) -> Member:
    return Member(name=of.name, role=of.role)


def starts(
    *members: Member, nodes: tuple[NodeView, ...] = (HEAD, WORKER), has_invite: bool = False,
    failures: Mapping[str, tuple[float, ...]] | None = None, now: float = 1000.0,
) -> dict[str, str]:  # fmt: skip
    """Of SLOTS, which start where; those without a member are away."""
    there = {m.name: m for m in members}
    planned = plan_starts(
        SLOTS, {s.name: there.get(s.name, away(s)) for s in SLOTS}, nodes=nodes, has_invite=has_invite,
        failures={s.name: (failures or {}).get(s.name, ()) for s in SLOTS}, now=now,
    )  # fmt: skip
    return {start.name: start.node_id for start in planned}


def test_new_run_begins_with_the_first_auxiliary_peer_at_home() -> None:
    assert starts() == {"auxiliary-0": "head"}


def test_second_auxiliary_peer_waits_for_the_first_and_goes_elsewhere() -> None:
    first = member(SLOTS[0], state="joining")
    assert starts(first) == {}
    assert starts(member(SLOTS[0])) == {"auxiliary-1": "worker"}


def test_with_the_invite_come_monitor_and_trainers() -> None:
    auxiliaries = member(SLOTS[0]), member(SLOTS[1], node_id="worker")
    assert starts(*auxiliaries, has_invite=True) == {
        "monitor-0": "head", "trainer-0": "worker", "trainer-1": "head",
    }  # fmt: skip


def test_nobody_else_starts_while_no_auxiliary_peer_is_up() -> None:
    """They would find nobody to ask; the first auxiliary peer finds the trainers that are left."""
    assert starts(member(SLOTS[3]), has_invite=True) == {"auxiliary-0": "head"}


def test_lost_trainer_goes_to_a_node_that_is_alive_and_only_after_a_pause() -> None:
    rest = [member(s) for s in SLOTS[:4]]
    failures = {"trainer-1": (999.0,)}
    assert starts(*rest, nodes=(HEAD,), has_invite=True, failures=failures, now=1000.0) == {}
    assert starts(*rest, nodes=(HEAD,), has_invite=True, failures=failures, now=1001.0) == {"trainer-1": "head"}


def test_without_a_node_nothing_is_started() -> None:
    assert starts(nodes=()) == {}


def test_peer_that_is_there_is_left_alone_whatever_it_says() -> None:
    assert starts(*(member(s, state="parked") for s in SLOTS), has_invite=True) == {}


@pytest.mark.parametrize(
    ("free", "wanted", "node"), [((0, 2), 1, "b"), ((0, 0.5), 1, None), ((1, 1), 1, "b"), ((1, 1), 0.5, "b")]
)
def test_trainer_goes_only_where_gpus_are_left(free: tuple[float, float], wanted: float, node: str | None) -> None:
    nodes = [NodeView(node_id=name, num_gpus=count) for name, count in zip("ab", free, strict=True)]
    placed = [Placed(slot=slot("trainer", 1, num_gpus=0.75), node_id="a", is_counted=True)]
    assert choose_node(slot("trainer", num_gpus=wanted), placed=placed, nodes=nodes) == node


@pytest.mark.parametrize(
    ("free", "is_counted", "node"),
    [(2, True, "a"), (1, True, "a"), (0.9, True, None), (0, True, None), (2, False, "a"), (1.5, False, None)],
)
def test_trainer_does_not_wait_for_gpus_that_another_job_holds(free: float, is_counted: bool, node: str | None) -> None:
    """One that waits is demand on the autoscaler."""
    nodes = [NodeView(node_id="a", num_gpus=4, free_gpus=free)]
    placed = [Placed(slot=slot("trainer", 1, num_gpus=1), node_id="a", is_counted=is_counted)]
    assert choose_node(slot("trainer", num_gpus=1), placed=placed, nodes=nodes) == node
    assert choose_node(slot("monitor"), placed=placed, nodes=nodes) == "a", "others need none"


def test_first_peer_waits_until_those_who_live_have_said_where_they_are() -> None:
    unheard = Member(name="trainer-0", role="trainer", is_there=True, node_id="head")
    assert starts(unheard) == {}
    assert starts(unheard, member(SLOTS[1], node_id="worker"), has_invite=True)["auxiliary-0"] == "head"


@pytest.mark.parametrize(
    ("failures", "due"),
    [((), 5000.0), ((4999.0,), 5001.0), ((4990.0, 4999.0), 5003.0), ((100.0, 4999.0), 5001.0)],
)
def test_pause_doubles_with_recent_failures(failures: tuple[float, ...], due: float) -> None:
    assert due_at(failures, now=5000.0) == due


def test_pause_has_a_limit() -> None:
    assert due_at([5000.0] * 16, now=5000.0) == 5000.0 + MAX_BACKOFF_SECONDS


def test_invite_waits_for_all_auxiliary_peers_but_those_that_have_given_up() -> None:
    up, second = member(SLOTS[0]), SLOTS[1]
    assert next_invite_addresses([up, away(second)]) == ()
    assert next_invite_addresses([up, member(second, state="joining")]) == ()
    assert len(next_invite_addresses([up, member(second)])) == 4
    assert len(next_invite_addresses([up, member(second, state="parked")])) == 2
    assert next_invite_addresses([member(s, state="parked") for s in SLOTS[:2]]) == ()


def test_known_addresses_are_of_others_that_live_auxiliary_peers_first() -> None:
    members = {m.name: m for m in (member(SLOTS[3]), member(SLOTS[1]), member(SLOTS[0]), away(SLOTS[4]))}
    found = [address.rpartition("/")[2] for address in known_addresses(members, besides="auxiliary-0")]
    assert found == ["auxiliary-1", "second", "trainer-0", "second"]
