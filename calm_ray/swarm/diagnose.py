"""What one can learn of a run without joining it: who answers at each address, the clock, whether others reach us.

Each address is tried by a libp2p daemon of its own, anonymous and listening nowhere. One daemon for all was rejected:
it remembers every address of a peer that it has met, so that a dead one seems to work; and hivemind's own way to start
with `initial_peers` tells only the last line of the daemon's log.

Nothing here uses the peer's identity, so a peer that runs with it now is not disturbed.
"""

import asyncio
import contextlib
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from google.protobuf.message import DecodeError
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from hivemind.utils.multiaddr import Multiaddr

from calm_ray.bundle import MANIFEST, MAX_MANIFEST_BYTES, RUN, SIGNATURE, check_manifest
from calm_ray.config import RunTable, parse_table
from calm_ray.errors import ConfigError, SwarmUnreachable, VersionMismatch
from calm_ray.invite import Invite
from calm_ray.signing import SIGNATURE_BYTES
from calm_ray.swarm.addresses import parse_address
from calm_ray.swarm.desk import Desk
from calm_ray.swarm.node import network_options
from calm_ray.swarm.probing import AddressFacts, ReachFacts
from calm_ray.swarm.reception import CALL_FAILURES, ask_desks, download_part, in_words

START_SECONDS = 20.0
CONNECT_SECONDS = 8.0
DESK_SECONDS = 10.0
BUSY_TRIES, MAX_DESKS = 4, 2
"""Fewer than `join` asks, and less patiently: the doctor has a minute in all."""
MAX_DAEMONS = 4
"""At once, of 60 MB each."""
MAX_RUN_BYTES = 1 << 20
MAX_WORDS = 150

_OTHER_PEER = re.compile(r"peer id mismatch: expected \w+, but remote key matches (\w+)")
_DESK_FAILURES = (*CALL_FAILURES, P2PDaemonError, DecodeError, EOFError, LookupError, ValueError, TypeError)


@asynccontextmanager
async def daemon(listen: str | None = None) -> AsyncIterator[P2P]:
    """A libp2p daemon with a new identity. SwarmUnreachable if it does not start; nobody else is needed for that."""
    options = network_options(listen) if listen else {"auto_nat": False, "nat_port_map": False, "no_listen": True}
    try:
        p2p = await P2P.create(
            host_maddrs=[listen] if listen else None, dht_mode="client", use_relay=False,
            startup_timeout=START_SECONDS, **options,
        )  # fmt: skip
    except (P2PDaemonError, OSError) as exc:
        raise SwarmUnreachable(f"libp2p does not start on this machine: {exc}") from exc
    try:
        yield p2p
    finally:
        await p2p.shutdown()


async def try_addresses(known: Sequence[AddressFacts], invite: Invite) -> AsyncIterator[AddressFacts]:
    """What libp2p and the desks say at addresses that TCP has reached, in the order in which they answer."""
    free = asyncio.Semaphore(MAX_DAEMONS)

    async def attempt(facts: AddressFacts) -> AddressFacts:
        async with free:
            return await _try_address(facts, invite)

    for done in asyncio.as_completed([attempt(facts) for facts in known]):
        yield await done


async def _try_address(facts: AddressFacts, invite: Invite) -> AddressFacts:
    wanted = parse_address(facts.text).peer_id
    try:
        async with daemon() as p2p:
            started = time.monotonic()
            problem = await connect(p2p, facts.text)
            if other := _OTHER_PEER.search(problem):
                return facts.model_copy(update={"step": "peer", "peer_id": other[1], "problem": "another peer"})
            if problem:
                return facts.model_copy(update={"step": "libp2p", "problem": problem})
            took = time.monotonic() - started
            facts = facts.model_copy(update={"step": "desk", "libp2p_seconds": took, "peer_id": wanted})
            return await _ask_for_manifest(p2p, facts, invite)
    except SwarmUnreachable as exc:
        return facts.model_copy(update={"step": "libp2p", "problem": str(exc)})


async def connect(p2p: P2P, text: str) -> str:
    """Connect to the peer of a multiaddress, there and nowhere else; why that failed, or an empty string."""
    place, _, peer_id = text.rpartition("/p2p/")
    try:
        # P2P itself has no `connect`; its `is_identity_taken` reaches for the client in the same way.
        await asyncio.wait_for(p2p._client.connect(PeerID.from_base58(peer_id), [Multiaddr(place)]), CONNECT_SECONDS)
    except TimeoutError:
        return f"no answer within {CONNECT_SECONDS:.0f} s"
    except (P2PDaemonError, DecodeError, OSError, EOFError, ValueError) as exc:
        return _words_of_libp2p(str(exc)) or type(exc).__name__
    return ""


def _words_of_libp2p(text: str) -> str:
    """Of what may be long, the end says why: `failed to dial Qm...: all dials failed * [/ip4/...] why`."""
    if _OTHER_PEER.search(text):
        return text
    why = " ".join(text.split()).rpartition("] ")[2]
    if "deadline exceeded" in why or "timeout" in why:
        return "no answer"
    if why.endswith(("EOF", "connection reset by peer")):
        return "it hangs up"
    return why[-MAX_WORDS:]


async def _ask_for_manifest(p2p: P2P, facts: AddressFacts, invite: Invite) -> AddressFacts:
    """The signed manifest, and of the parts only the run's table: the bundle itself may be large."""
    stub = Desk.get_stub(p2p, PeerID.from_base58(facts.peer_id), namespace=invite.run_id)
    try:
        async with asyncio.timeout(DESK_SECONDS):
            data = await download_part(stub, MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
            signature = await download_part(stub, SIGNATURE, max_bytes=SIGNATURE_BYTES)
            manifest = check_manifest(data, signature=signature, organiser_key=invite.organiser_key)
            if manifest.run_id != invite.run_id:
                raise ConfigError(f"run bundle: is for run {manifest.run_id!r}, the invite for {invite.run_id!r}")
            part = manifest.parts[RUN]
            run = await download_part(stub, RUN, max_bytes=min(part.size_bytes, MAX_RUN_BYTES))
    except VersionMismatch as exc:
        return facts.model_copy(update={"step": "done", "mismatch": str(exc)})
    except ConfigError as exc:
        return facts.model_copy(update={"step": "bundle", "problem": str(exc)})
    except TimeoutError:
        return facts.model_copy(update={"problem": f"no answer within {DESK_SECONDS:.0f} s"})
    except _DESK_FAILURES as exc:
        return facts.model_copy(update={"problem": in_words(exc).removeprefix("answers, but has ")})
    if hashlib.sha256(run).hexdigest() != part.sha256:
        return facts.model_copy(update={"step": "bundle", "problem": f"run bundle: {RUN} is altered"})
    mismatch = "" if _config_hash(run) == manifest.config_hash else (
        f"this calm-ray reads the run's settings differently than the organiser's {manifest.version}; "
        f"run: {manifest.install or 'pip install calm-ray==' + manifest.version}"
    )  # fmt: skip
    update = {
        "step": "done", "version": manifest.version, "mismatch": mismatch, "bundle_bytes": manifest.total_bytes(),
    }  # fmt: skip
    return facts.model_copy(update=update)


def _config_hash(run: bytes) -> str:
    """Empty if our code cannot read the organiser's table."""
    with contextlib.suppress(ConfigError, ValueError, RecursionError):
        return parse_table(RunTable, json.loads(run), where=RUN).config_hash()
    return ""


async def ask_for_dial_back(p2p: P2P, desks: Sequence[str], *, run_id: str) -> ReachFacts:
    """Whether others can reach this daemon's port, as far as the doctor's time goes."""
    return await ask_desks(p2p, desks[:MAX_DESKS], run_id=run_id, num_tries=BUSY_TRIES)
