"""The newcomer's side of the desk: before joining, fetch the run bundle and learn whether others can reach us.

Runs on a libp2p daemon of its own, with the identity and the port that the peer will use afterwards, and closes it: a
DHT node cannot change from client mode to full later, so the question is asked first.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError
from google.protobuf.wrappers_pb2 import StringValue
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, P2PDaemonError, P2PHandlerError

from calm_ray.bundle import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    Manifest,
    check_manifest,
    is_part_intact,
    open_bundle,
)
from calm_ray.errors import ConfigError, SwarmUnreachable
from calm_ray.invite import Invite
from calm_ray.signing import SIGNATURE_BYTES
from calm_ray.swarm.addresses import live_addresses, parse_address
from calm_ray.swarm.desk import Desk
from calm_ray.swarm.hygiene import bind_children_to_parent
from calm_ray.swarm.node import STARTUP_TIMEOUT_SECONDS, ensure_identity, network_options
from calm_ray.swarm.probing import ReachFacts, place_of
from calm_ray.swarm.transport import bound_messages

logger = logging.getLogger(__name__)

CHUNK_TIMEOUT_SECONDS = 20.0
"""A desk that sends nothing for this long is given up; the next one is asked for what is missing."""
DIAL_BACK_TIMEOUT_SECONDS = 15.0
BUSY, BUSY_TRIES, BUSY_PAUSE_SECONDS = "busy", 12, 1.0
"""A desk dials one peer at a time. A peer that took "busy" for "not reachable" would be a client for its whole life."""

CALL_FAILURES = (P2PHandlerError, ControlFailure, DecodeError, TimeoutError, OSError)
"""How a call to a desk can end without an answer. ControlFailure: no such handler there, or it cannot be dialled;
DecodeError: what it answers is no message."""


@dataclass(frozen=True, kw_only=True)
class Reception:
    """What a newcomer knows after the desk."""

    bundle: Path
    listen: str
    """Where to listen from now on: the port that was dialled back, if any was."""
    announce: tuple[str, ...]
    is_reachable: bool
    verdict: str
    """Words for the user."""


def receive(
    invite: Invite, *, folder: Path, listen: str, identity_path: Path, should_dial_back: bool,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reception:  # fmt: skip
    """Fetch and verify the bundle into `folder`, keeping parts that are already there, and ask for a dial-back.

    `on_progress(done_bytes, total_bytes)` is called as parts arrive. Raises SwarmUnreachable (verdict per address),
    ConfigError (forged bundle), VersionMismatch.
    """
    bind_children_to_parent()
    bound_messages()
    ensure_identity(identity_path)
    peers = live_addresses(invite.addresses)
    return asyncio.run(_receive(invite, peers, folder, listen, identity_path, should_dial_back, on_progress))


async def _receive(
    invite: Invite, peers: Sequence[str], folder: Path, listen: str, identity_path: Path, should_dial_back: bool,
    on_progress: Callable[[int, int], None],
) -> Reception:  # fmt: skip
    try:
        p2p = await P2P.create(
            initial_peers=list(peers), host_maddrs=[listen], dht_mode="client", identity_path=str(identity_path),
            check_if_identity_free=False, startup_timeout=STARTUP_TIMEOUT_SECONDS, **network_options(listen),
        )  # fmt: skip
    except P2PDaemonError as exc:
        raise SwarmUnreachable(f"{', '.join(peers)}: answers, but libp2p cannot connect: {exc}") from exc
    try:
        desks = list(dict.fromkeys(parse_address(address).peer_id for address in peers))  # one may have two addresses
        await _fetch_bundle(p2p, desks, invite, folder, on_progress)
        listen = listen.replace("/tcp/0", f"/tcp/{await _own_port(p2p)}")
        if not should_dial_back:
            return Reception(bundle=folder, listen=listen, announce=(), is_reachable=False, verdict="not asked")
        reach = await ask_desks(p2p, desks, run_id=invite.run_id)
        return Reception(
            bundle=folder, listen=listen, announce=(reach.address,) if reach.is_reachable else (),
            is_reachable=reach.is_reachable, verdict=reach_words(reach),
        )  # fmt: skip
    finally:
        await p2p.shutdown()


async def _fetch_bundle(
    p2p: P2P, desks: Sequence[str], invite: Invite, folder: Path, on_progress: Callable[[int, int], None]
) -> None:
    problems: list[str] = []
    forged: ConfigError | None = None
    for desk in desks:
        try:
            stub = Desk.get_stub(p2p, PeerID.from_base58(desk), namespace=invite.run_id)
            data = await download_part(stub, MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
            signature = await download_part(stub, SIGNATURE, max_bytes=SIGNATURE_BYTES)
            manifest = check_manifest(data, signature=signature, organiser_key=invite.organiser_key)
            if manifest.run_id != invite.run_id:
                raise ConfigError(f"run bundle: is for run {manifest.run_id!r}, the invite for {invite.run_id!r}")
            await _fetch_parts(stub, manifest, folder, on_progress)
        except (*CALL_FAILURES, asyncio.IncompleteReadError) as exc:
            if isinstance(exc, OSError) and exc.filename:  # our own disk's, and no other desk can mend it
                raise
            problems.append(f"{desk}: {in_words(exc)}")
            continue
        except ConfigError as exc:  # the next one may be honest
            forged = exc
            continue
        _write(folder / MANIFEST, data)
        _write(folder / SIGNATURE, signature)
        open_bundle(folder, organiser_key=invite.organiser_key)
        return
    if forged is not None:
        raise forged
    raise SwarmUnreachable("no bootstrap peer could give us the run bundle: " + "; ".join(problems))


async def _fetch_parts(stub: object, manifest: Manifest, folder: Path, on_progress: Callable[[int, int], None]) -> None:
    done, total = 0, manifest.total_bytes()
    for name, part in manifest.parts.items():
        path = folder / name
        if not is_part_intact(path, part):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            _write(partial, await download_part(stub, name, max_bytes=part.size_bytes))
            if not is_part_intact(partial, part):
                raise OSError(f"part {name} arrived damaged")
            partial.replace(path)
        done += part.size_bytes
        on_progress(done, total)


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as exc:
        exc.filename = exc.filename or str(path)  # a write that finds no room does not say where
        raise


async def download_part(stub: object, name: str, *, max_bytes: int) -> bytes:
    async def requests() -> AsyncIterator[StringValue]:
        yield StringValue(value=name)
        await asyncio.Event().wait()  # until we hang up: see `Desk.rpc_part`

    stream = await asyncio.wait_for(stub.rpc_part(requests()), CHUNK_TIMEOUT_SECONDS)  # type: ignore[attr-defined]
    data = bytearray()
    async with contextlib.aclosing(stream):
        while True:
            try:
                message = await asyncio.wait_for(anext(stream), CHUNK_TIMEOUT_SECONDS)
            except StopAsyncIteration:
                raise OSError(f"part {name} broke off after {len(data)} bytes") from None
            if not message.value:
                return bytes(data)
            data += message.value
            if len(data) > max_bytes:
                raise OSError(f"part {name} is longer than announced")


async def ask_desks(p2p: P2P, desks: Sequence[str], *, run_id: str, num_tries: int = BUSY_TRIES) -> ReachFacts:
    """Ask the desks to dial this daemon's port, one after the other: one that can is enough."""
    port = await _own_port(p2p)
    facts = ReachFacts(problem="no desk to ask", is_known=False)
    for attempt in range(num_tries):
        if attempt:
            await asyncio.sleep(BUSY_PAUSE_SECONDS * random.uniform(1.0, 2.0))
        problems: list[str] = []
        for desk in desks:
            host, problem = await _ask_desk(p2p, desk, run_id, port)
            if not problem:
                address = f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}"
                return ReachFacts(is_reachable=True, place=place_of(address), address=address)
            problems.append(f"{problem} (seen as {host})" if host else problem)
        is_known = not all(problem.startswith(BUSY) for problem in problems)
        facts = ReachFacts(problem="; ".join(dict.fromkeys(problems)), is_known=is_known)
        if is_known:
            break
    return facts


def reach_words(reach: ReachFacts) -> str:
    if reach.is_reachable:
        return f"others can reach this machine at {reach.place}: full peer"
    return f"others cannot reach this machine ({reach.problem}): client mode, which is fine"


async def _own_port(p2p: P2P) -> int:
    return next((a.port for a in map(parse_address, map(str, await p2p.get_visible_maddrs())) if a.is_tcp), 0)


async def _ask_desk(p2p: P2P, desk: str, run_id: str, port: int) -> tuple[str, str]:
    """(host that the desk sees us at, why it cannot reach us there); a desk's answer is a stranger's."""
    try:
        stub = Desk.get_stub(p2p, PeerID.from_base58(desk), namespace=run_id)
        reply = await stub.rpc_dial_back(StringValue(value=str(port)), timeout=DIAL_BACK_TIMEOUT_SECONDS)
        answer = json.loads(reply.value)
        if answer["is_reachable"] is True:
            return str(ipaddress.ip_address(answer["host"])), ""
        return str(answer["host"])[:50], str(answer["reason"])[:100] or "no reason given"
    except (*CALL_FAILURES, ValueError, KeyError, TypeError) as exc:
        return "", in_words(exc)


def in_words(exc: Exception) -> str:
    if "protocols not supported" in str(exc):
        return "answers, but has no desk for this run"
    return str(exc) or type(exc).__name__
