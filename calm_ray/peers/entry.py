"""How a peer comes into its swarm: with the bundle that it has, or by invite and desk, or by whom it knew before.

The desk of an auxiliary peer is asked first. If the invite's addresses are all dead, the swarm may still train: a peer
that has been there before has the verified bundle on disk, and knows other peers.

A run's first peer has the bundle from the start, and asks nobody. But it may have been there before, and find nobody
because its line is cut. Rejected: to begin anew at once, for newcomers on its side would then train a second model.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from calm_ray.bundle import open_bundle
from calm_ray.config import RunTable
from calm_ray.errors import ConfigError, SwarmUnreachable
from calm_ray.invite import Invite, decode_invite
from calm_ray.peers.control import socket_path
from calm_ray.peers.known import KnownPeers, listen_with_port, load_known
from calm_ray.peers.spec import PeerSpec
from calm_ray.swarm.addresses import all_refuse, parse_address, peer_at
from calm_ray.swarm.hygiene import place_sockets
from calm_ray.swarm.node import NobodyThere, NodeOptions, Swarm
from calm_ray.swarm.reception import Reception, receive
from calm_ray.swarm.reconnect import reconnect

logger = logging.getLogger(__name__)

ALONE_SECONDS, RETRY_SECONDS = 120.0, 10.0
"""Who knew others and finds none of them waits so long: longer than a router takes to start, shorter than an organiser
wants to wait for a run whose volunteers have switched off."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A peer's place in its swarm."""

    swarm: Swarm
    run: RunTable
    bundle: Path
    is_first: bool
    """Nobody was there to join: we are the swarm's first peer, or its last."""
    is_client_mode: bool
    former: KnownPeers
    """What the peer's last life had left."""
    known: KnownPeers
    """For the next one, as far as it is known now."""
    bootstrap: tuple[str, ...]
    """Addresses of the invite."""


def enter(spec: PeerSpec, *, say: Callable[[str], None]) -> Entry:
    """Become a member of the DHT. Blocks. Raises the errors of `receive` and `Swarm.join`."""
    place_sockets(socket_path(spec.folder).with_suffix(""))  # the watchdog holds the folder's lock, and has swept
    former = load_known(spec.folder)
    if spec.bundle is not None:
        return _enter_with_bundle(spec, spec.bundle, former, say)
    assert spec.invite is not None
    invite = decode_invite(spec.invite)
    peers = invite.addresses
    try:
        say("asking for the run bundle")
        reception = _receive(spec, invite, say)
    except SwarmUnreachable as exc:
        peers = former.live()
        recalled = _recall(spec, invite, former) if peers else None
        if recalled is None:
            raise
        logger.warning("%s; going to peers that we knew", exc)
        reception = recalled
    say(reception.verdict)
    _, run = open_bundle(reception.bundle)
    options = NodeOptions(
        is_client_mode=not (reception.is_reachable or spec.reach == "public"), listen=reception.listen,
        announce=spec.peer.announce or reception.announce, identity_path=spec.identity_path,
    )  # fmt: skip
    swarm = Swarm.join(run.run_id, initial_peers=peers, options=options)
    return _entry(swarm, run, reception.bundle, options, former, invite.addresses, is_first=False)


def _enter_with_bundle(spec: PeerSpec, bundle: Path, former: KnownPeers, say: Callable[[str], None]) -> Entry:
    _, run = open_bundle(bundle)
    peers = former.live()
    options = NodeOptions(
        is_client_mode=False, listen=former.free_listen(spec.peer.listen), announce=spec.peer.announce,
        identity_path=spec.identity_path,
    )  # fmt: skip
    try:
        swarm = Swarm.join(run.run_id, initial_peers=peers, options=options)
    except NobodyThere as exc:  # somebody else has those addresses now
        logger.warning("%s", exc)
        peers = ()
        swarm = Swarm.join(run.run_id, initial_peers=(), options=options)
    is_first = not peers and not _find_company(swarm, former.addresses, say=say)
    return _entry(swarm, run, bundle, options, former, (), is_first=is_first)


def _find_company(swarm: Swarm, addresses: tuple[str, ...], *, say: Callable[[str], None]) -> bool:
    """Whether one of those that we knew is there, or comes to us: our DHT node is up meanwhile, where it always was.

    Gives up at once if each of them refuses, for then the line is fine and they have gone; else after ALONE_SECONDS.
    """
    others = [address for address in addresses if peer_at(address) != swarm.peer_id]
    deadline = time.monotonic() + ALONE_SECONDS
    while others and (left := deadline - time.monotonic()) > 0:
        if reconnect(swarm, others):
            return True
        if all_refuse(others):
            return False
        say(alone_words(len(others), left))
        time.sleep(RETRY_SECONDS)
    return False


def alone_words(num_known: int, seconds_left: float) -> str:
    """For somebody whose line is cut, or whose swarm has gone."""
    nobody = "the one peer that it knew does not answer" if num_known == 1 else (
        f"none of the {num_known} peers that it knew answers"
    )  # fmt: skip
    return (
        f"cut off, or the last one: {nobody}; trying again, and going on alone in "
        f"{max(1, round(seconds_left / 60))} min (check this machine's network; without known-peers.json in its folder "
        "it does not wait)"
    )


def _entry(
    swarm: Swarm, run: RunTable, bundle: Path, options: NodeOptions, former: KnownPeers, bootstrap: tuple[str, ...], *,
    is_first: bool,
) -> Entry:  # fmt: skip
    listen = options.listen if options.is_client_mode else listen_with_port(options.listen, swarm.addresses())
    known = KnownPeers(
        listen=listen, announce=options.announce, is_client_mode=options.is_client_mode,
        addresses=former.addresses,
    )  # fmt: skip
    return Entry(
        swarm=swarm, run=run, bundle=bundle, is_first=is_first, is_client_mode=options.is_client_mode, former=former,
        known=known, bootstrap=bootstrap,
    )  # fmt: skip


def _receive(spec: PeerSpec, invite: Invite, say: Callable[[str], None]) -> Reception:
    listen = spec.peer.listen
    if all(parse_address(address).is_loopback for address in invite.addresses):
        listen = listen.replace("/ip4/0.0.0.0/", "/ip4/127.0.0.1/")  # the whole swarm is on this machine
    return receive(
        invite, folder=spec.folder / "bundle", listen=listen, identity_path=spec.identity_path,
        should_dial_back=spec.reach == "auto",
        on_progress=lambda done, total: say(f"run bundle {100 * done // max(1, total)} %"),
    )  # fmt: skip


def _recall(spec: PeerSpec, invite: Invite, former: KnownPeers) -> Reception | None:
    """As the desk would answer, from what is on disk; None if there is no whole bundle of this run."""
    folder = spec.folder / "bundle"
    try:
        manifest, _ = open_bundle(folder, organiser_key=invite.organiser_key)
    except (ConfigError, OSError):
        return None
    if manifest.run_id != invite.run_id:
        return None
    listen = former.listen or spec.peer.listen
    return Reception(
        bundle=folder, listen=former.free_listen(spec.peer.listen) if former.is_client_mode else listen,
        announce=former.announce, is_reachable=not former.is_client_mode,
        verdict="no bootstrap peer answers: joining by peers that we knew",
    )  # fmt: skip
