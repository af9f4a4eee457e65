"""What strangers say while a group forms: taken if it is sound in every field, else refused with the field's name."""

import random
from dataclasses import asdict, replace
from typing import Any

import msgpack
import pytest

from calm_ray.swarm.group import Group, Member
from calm_ray.swarm.limits import RoundLimits
from calm_ray.swarm.messages import (
    MAX_BANDWIDTH,
    MAX_EPOCH,
    MAX_MEMBERS,
    MAX_MESSAGE_BYTES,
    MAX_TIMES_OWN,
    MIN_BANDWIDTH,
    Malformed,
    Ticket,
    pack,
    pack_group,
    pack_ticket,
    unpack,
    unpack_group,
    unpack_ticket,
)

LIMITS = RoundLimits(
    request_seconds=5.0, matchmaking_seconds=15.0, grace_seconds=3.0, chunk_seconds=8.0, round_seconds=40.0
)
TICKET = Ticket(
    kind="gradients", epoch=7, schema=b"s" * 32, is_sender=True, can_reduce=False, bandwidth=2e6, sketch=b"k" * 529
)
GROUP = Group(
    group_id=b"g" * 16, kind="gradients", epoch=7, limits=LIMITS, drift=1e-7, out_of_step=("b",),
    members=(
        Member(peer_id="a", is_sender=True, fraction=0.25), Member(peer_id="b", is_sender=False, fraction=0.75),
        Member(peer_id="c", is_sender=True, fraction=0.0),
    ),
)  # fmt: skip


def understood(fields: dict[str, Any], *, own_peer_id: str = "a", own_limits: RoundLimits = LIMITS) -> Group:
    return unpack_group(fields, kind="gradients", epoch=7, own_peer_id=own_peer_id, own_limits=own_limits)


def fields_of_group(**changes: Any) -> dict[str, Any]:
    return {**unpack(pack_group(GROUP)), **changes}


def limits_with(**changes: Any) -> dict[str, Any]:
    return {**asdict(LIMITS), **changes}


@pytest.mark.parametrize("changes", [{}, {"bandwidth": None}, {"kind": "state", "epoch": 0, "is_sender": False}])
def test_ticket_comes_back_as_it_was(changes: dict[str, Any]) -> None:
    ticket = replace(TICKET, **changes)
    assert unpack_ticket(pack_ticket(ticket)) == ticket


def test_group_comes_back_as_it_was_for_each_member() -> None:
    for member in GROUP.members:
        assert understood(fields_of_group(), own_peer_id=member.peer_id) == GROUP


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kind": "parameters"}, "kind"), ({"kind": ["gradients"]}, "kind"), ({"kind": None}, "kind"),
        ({"epoch": -1}, "epoch"), ({"epoch": MAX_EPOCH + 1}, "epoch"), ({"epoch": 7.0}, "epoch"),
        ({"epoch": True}, "epoch"), ({"epoch": "7"}, "epoch"), ({"epoch": None}, "epoch"),
        ({"schema": "s" * 32}, "schema"), ({"schema": b"s" * 33}, "schema"), ({"schema": None}, "schema"),
        ({"is_sender": 1}, "is_sender"), ({"is_sender": None}, "is_sender"), ({"can_reduce": "yes"}, "can_reduce"),
        ({"bandwidth": -1.0}, "bandwidth"), ({"bandwidth": float("nan")}, "bandwidth"),
        ({"bandwidth": "fast"}, "bandwidth"), ({"bandwidth": True}, "bandwidth"), ({"bandwidth": [1]}, "bandwidth"),
        ({"sketch": b"x" * 4097}, "sketch"), ({"sketch": 0}, "sketch"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)  # fmt: skip
def test_ticket_that_makes_no_sense_names_the_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(Malformed, match=f"^{field}$"):
        unpack_ticket(pack(**{**asdict(TICKET), **changes}))


@pytest.mark.parametrize("field", sorted(asdict(TICKET).keys() - {"bandwidth"}))
def test_ticket_without_a_field_is_refused(field: str) -> None:
    with pytest.raises(Malformed, match=f"^{field}$"):
        unpack_ticket(pack(**{name: value for name, value in asdict(TICKET).items() if name != field}))


def test_claimed_bandwidth_is_cut_to_what_shares_can_be_computed_from() -> None:
    for claimed, taken in ((0, MIN_BANDWIDTH), (5e-324, MIN_BANDWIDTH), (1e300, MAX_BANDWIDTH), (float("inf"), 1e10)):
        assert unpack_ticket(pack(**{**asdict(TICKET), "bandwidth": claimed})).bandwidth == taken


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"members": []}, "members"), ({"members": [["a", True, 1.0]]}, "members"), ({"members": None}, "members"),
        ({"members": {"a": 1}}, "members"), ({"members": [["a", True, 1.0]] * 2}, "twice"),
        ({"members": [["b", True, 0.5], ["c", True, 0.5]]}, "we are not"),
        ({"members": [["a", True, 0.5], ["b", True, 0.6]]}, "fractions"),
        ({"members": [["a", True, 0.0], ["b", True, 0.0]]}, "fractions"),
        ({"members": [["a", True, 1.5], ["b", True, -0.5]]}, "member"),
        ({"members": [["a", True, float("nan")], ["b", True, 1.0]]}, "member"),
        ({"members": [["a", 1, 0.5], ["b", True, 0.5]]}, "member"),
        ({"members": [["a", True, True], ["b", True, False]]}, "member"),
        ({"members": [["a", True], ["b", True, 1.0]]}, "member"), ({"members": ["ab", "ac"]}, "member"),
        ({"members": [["a", True, 0.5], [["b"], True, 0.5]]}, "member"),
        ({"members": [["a", True, 0.5], ["b" * 65, True, 0.5]]}, "member"),
        ({"members": [["a", True, 0.5], [b"b", True, 0.5]]}, "member"),
        ({"kind": "state"}, "another round"), ({"epoch": 8}, "another round"), ({"epoch": "7"}, "another round"),
        ({"kind": 5}, "kind"), ({"group_id": b"g" * 17}, "group_id"), ({"group_id": "g"}, "group_id"),
        ({"drift": float("nan")}, "drift"), ({"drift": -1.0}, "drift"), ({"drift": None}, "drift"),
        ({"out_of_step": None}, "out_of_step"), ({"out_of_step": ["z"]}, "out_of_step"),
        ({"out_of_step": [1]}, "out_of_step"), ({"out_of_step": [["a"]]}, "out_of_step"),
        ({"limits": None}, "limits"), ({"limits": {}}, "limits"), ({"limits": limits_with(more=1.0)}, "limits"),
        ({"limits": limits_with(round_seconds=0)}, "limits"), ({"limits": limits_with(chunk_seconds=0.0)}, "limits"),
        ({"limits": limits_with(request_seconds=1e-9)}, "limits"),
        ({"limits": limits_with(chunk_seconds=41.0)}, "limits"),
        ({"limits": limits_with(round_seconds=86400.0)}, "round_seconds"),
        ({"limits": limits_with(chunk_seconds=MAX_TIMES_OWN * 8 + 1)}, "chunk_seconds"),
        ({"limits": limits_with(round_seconds=float("nan"))}, "round_seconds"),
        ({"limits": limits_with(round_seconds=None)}, "round_seconds"),
        ({"limits": limits_with(grace_seconds=-1.0)}, "grace_seconds"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_group_that_makes_no_sense_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        understood(fields_of_group(**changes))


def test_group_with_too_many_members_is_refused() -> None:
    share = 1 / (MAX_MEMBERS + 1)
    members = [["a", True, share], *([f"p{number}", True, share] for number in range(MAX_MEMBERS))]
    with pytest.raises(Malformed, match="members"):
        understood(fields_of_group(members=members, out_of_step=[]))


def test_largest_group_fits_into_a_message() -> None:
    members = tuple(
        Member(peer_id=f"{number:052d}", is_sender=True, fraction=1 / MAX_MEMBERS) for number in range(MAX_MEMBERS)
    )
    packed = pack_group(replace(GROUP, members=members, out_of_step=()))
    assert len(packed) < MAX_MESSAGE_BYTES
    assert understood(unpack(packed), own_peer_id=f"{0:052d}").members == members


def test_leader_with_times_unlike_ours_is_followed_within_reason() -> None:
    """Its line may be slower than ours, and its health worse."""
    longer = limits_with(round_seconds=0.9 * MAX_TIMES_OWN * LIMITS.round_seconds)
    shorter = {name: value / 100 for name, value in asdict(LIMITS).items()}
    assert understood(fields_of_group(limits=longer)).limits == RoundLimits(**longer)
    assert understood(fields_of_group(limits=shorter)).limits == RoundLimits(**shorter)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xc1", b"\x81", b"\x93\x01", msgpack.packb([1]), msgpack.packb(5), msgpack.packb(None),
        msgpack.packb({"a": 1}) + b"x", msgpack.packb({5: 1}), b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff", b"\x81" * 5000, b"\x91" * 100_000, b"\x81\xa1\xff\x01",
        msgpack.packb({"a": msgpack.ExtType(5, b"x")}), msgpack.packb({"a": msgpack.Timestamp(1)}),
        bytes(MAX_MESSAGE_BYTES + 1),
    ],
    ids=lambda data: data[:8].hex(),
)  # fmt: skip
def test_what_is_no_map_is_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        unpack(data)


def test_noise_never_raises_anything_else() -> None:
    random.seed(0)
    sound = [pack_ticket(TICKET), pack_group(GROUP)]
    for _ in range(20_000):
        data = bytearray(random.choice(sound))
        for _ in range(random.randrange(1, 4)):
            data[random.randrange(len(data))] = random.randrange(256)
        cut = bytes(data[: random.choice((len(data), random.randrange(len(data))))])
        for read in (unpack_ticket, lambda data: understood(unpack(data))):
            try:
                read(cut)
            except Malformed:
                pass
