"""What peers say to each other while they form a group: msgpack, checked field by field, nothing unpickled."""

import math
from dataclasses import asdict, dataclass
from typing import Any, get_args

import msgpack

from calm_ray.swarm.group import Group, Kind, Member
from calm_ray.swarm.limits import RoundLimits

MAX_MESSAGE_BYTES = 1 << 20
MAX_MEMBERS = 4096
MAX_EPOCH = 10**9
MIN_BANDWIDTH, MAX_BANDWIDTH = 1e3, 1e10
"""Bytes per second; claims beyond are cut, for shares are computed from them."""
MIN_SECONDS = 0.01
MAX_TIMES_OWN = 6.0
"""Our own limits that a leader's may be, at most: bad health makes them 4 times as long. Beyond that, another leads."""


class Malformed(ValueError):
    """A peer's message does not make sense; says which field."""


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What a peer says of itself when it asks for a place in a group."""

    kind: Kind
    epoch: int
    schema: bytes
    """Digest of what is averaged: shapes, optimizer, compression. Peers with another one cannot average with us."""
    is_sender: bool
    can_reduce: bool
    """False for client mode: nobody can call it."""
    bandwidth: float | None
    """Bytes per second it can send, if it knows."""
    sketch: bytes
    """Of its parameters, see `sketch.py`."""


def pack(**fields: Any) -> bytes:
    return bytes(msgpack.packb(fields))


def unpack(data: bytes) -> dict[str, Any]:
    """Raises Malformed unless `data` is a map with string keys."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise Malformed(f"{len(data)} bytes, at most {MAX_MESSAGE_BYTES}")
    try:
        fields = msgpack.unpackb(data, strict_map_key=True, max_ext_len=0)
    except (ValueError, TypeError, RecursionError) as exc:  # msgpack's own errors are ValueErrors
        raise Malformed(f"not msgpack: {type(exc).__name__}") from None
    if not isinstance(fields, dict):
        raise Malformed("not a map")
    return fields


def pack_ticket(ticket: Ticket) -> bytes:
    return pack(**asdict(ticket))


def unpack_ticket(data: bytes) -> Ticket:
    fields = unpack(data)
    bandwidth = None
    if fields.get("bandwidth") is not None:
        bandwidth = min(max(_number(fields, "bandwidth", math.inf), MIN_BANDWIDTH), MAX_BANDWIDTH)
    return Ticket(
        kind=_kind(fields), epoch=_whole(fields, "epoch", MAX_EPOCH), schema=_bytes(fields, "schema", 32),
        is_sender=_bool(fields, "is_sender"), can_reduce=_bool(fields, "can_reduce"),
        bandwidth=bandwidth, sketch=_bytes(fields, "sketch", 4096),
    )  # fmt: skip


def pack_group(group: Group) -> bytes:
    return pack(
        type="begin", group_id=group.group_id, kind=group.kind, epoch=group.epoch, limits=asdict(group.limits),
        drift=group.drift, out_of_step=list(group.out_of_step),
        members=[[m.peer_id, m.is_sender, m.fraction] for m in group.members],
    )  # fmt: skip


def unpack_group(fields: dict[str, Any], *, kind: Kind, epoch: int, own_peer_id: str, own_limits: RoundLimits) -> Group:
    """Raises Malformed unless this is a group of `kind` and `epoch` that we are in, with times that can be meant."""
    entries = fields.get("members")
    if not isinstance(entries, list) or not 2 <= len(entries) <= MAX_MEMBERS:
        raise Malformed("members")
    members = tuple(map(_member, entries))
    peer_ids = {member.peer_id for member in members}
    if len(peer_ids) != len(members) or own_peer_id not in peer_ids:
        raise Malformed("members: twice in it, or we are not")
    if not math.isclose(math.fsum(member.fraction for member in members), 1.0, abs_tol=1e-6):
        raise Malformed("fractions do not add up to 1")
    if _kind(fields) != kind or fields.get("epoch") != epoch:
        raise Malformed("another round's group")
    out_of_step = fields.get("out_of_step")
    if not isinstance(out_of_step, list) or not all(isinstance(p, str) and p in peer_ids for p in out_of_step):
        raise Malformed("out_of_step")
    return Group(
        group_id=_bytes(fields, "group_id", 16), kind=kind, epoch=epoch, members=members,
        limits=_limits(fields.get("limits"), own=own_limits),
        drift=_number(fields, "drift", 1e6), out_of_step=tuple(out_of_step),
    )  # fmt: skip


def _limits(fields: Any, *, own: RoundLimits) -> RoundLimits:
    """A stranger must not have us wait for a day, nor for no time at all."""
    if not isinstance(fields, dict) or set(fields) != set(RoundLimits.__dataclass_fields__):
        raise Malformed("limits")
    seconds = {name: _number(fields, name, MAX_TIMES_OWN * getattr(own, name)) for name in fields}
    limits = RoundLimits(**seconds)
    if min(seconds.values()) < MIN_SECONDS or limits.chunk_seconds > limits.round_seconds:
        raise Malformed("limits")
    return limits


def _member(entry: Any) -> Member:
    if not isinstance(entry, list) or len(entry) != 3:
        raise Malformed("member")
    peer_id, is_sender, fraction = entry
    is_sound = isinstance(peer_id, str) and len(peer_id) <= 64 and isinstance(is_sender, bool)
    if not is_sound or isinstance(fraction, bool) or not isinstance(fraction, float | int) or not 0 <= fraction <= 1:
        raise Malformed("member")
    return Member(peer_id=peer_id, is_sender=is_sender, fraction=float(fraction))


def _kind(fields: dict[str, Any]) -> Kind:
    kind: Kind = fields.get("kind", "")
    if kind not in get_args(Kind):
        raise Malformed("kind")
    return kind


def _bool(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if not isinstance(value, bool):
        raise Malformed(name)
    return value


def _bytes(fields: dict[str, Any], name: str, max_length: int) -> bytes:
    value = fields.get(name)
    if not isinstance(value, bytes) or len(value) > max_length:
        raise Malformed(name)
    return value


def _whole(fields: dict[str, Any], name: str, maximum: int) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= maximum:
        raise Malformed(name)
    return value


def _number(fields: dict[str, Any], name: str, maximum: float) -> float:
    value = fields.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= maximum:
        raise Malformed(name)
    return float(value)
