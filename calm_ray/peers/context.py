"""What every role has in common: come to the desk, join the swarm, publish reports, tell the watchdog, leave."""

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calm_ray import __version__
from calm_ray.bundle import open_bundle
from calm_ray.config import RunTable
from calm_ray.errors import SwarmUnreachable
from calm_ray.invite import Invite, decode_invite
from calm_ray.peers.known import MAX_KEPT, KnownPeers, listen_with_port, load_known, save_known
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus
from calm_ray.report import PeerReport, State, encode
from calm_ray.swarm.addresses import parse_address
from calm_ray.swarm.node import NodeOptions, Swarm
from calm_ray.swarm.reception import Reception, receive

logger = logging.getLogger(__name__)

Facts = Callable[[], dict[str, Any]]


class PeerContext:
    """One peer's place in its run. `join` blocks; afterwards `swarm`, `run` and `bundle` are there."""

    swarm: Swarm
    run: RunTable
    bundle: Path
    is_first: bool
    """Nobody was there to join: we are the swarm's first peer."""

    def __init__(self, spec: PeerSpec, *, status_fd: int) -> None:
        self.spec = spec
        self.boot_id = uuid.uuid4().hex
        self.stop = threading.Event()
        self._status = PeerStatus(role=spec.role)
        self._status_file = os.fdopen(status_fd, "wb")
        self._lock = threading.Lock()
        self._facts: Facts = dict
        self._reporter: threading.Thread | None = None

    # --- joining -----------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Get the bundle and become a member of the DHT. Raises the errors of `receive` and `Swarm.join`."""
        spec = self.spec
        if spec.bundle is not None:
            self.bundle, self._known = spec.bundle, load_known(spec.folder)
            initial_peers = self._known.live()
            listen, announce, is_client = self._known.free_listen(spec.peer.listen), spec.peer.announce, False
        else:
            assert spec.invite is not None
            invite = decode_invite(spec.invite)
            initial_peers = invite.addresses
            self.tell("joining", "asking for the run bundle", run_id=invite.run_id)
            reception = self._receive(invite)
            self.bundle, listen = reception.bundle, reception.listen
            announce = spec.peer.announce or reception.announce
            is_client = not (reception.is_reachable or spec.reach == "public")
            self.tell("joining", reception.verdict)
        _, self.run = open_bundle(self.bundle)
        options = NodeOptions(
            is_client_mode=is_client, listen=listen, announce=announce, identity_path=spec.identity_path
        )
        try:
            self.swarm = Swarm.join(self.run.run_id, initial_peers=initial_peers, options=options)
        except SwarmUnreachable:
            if spec.bundle is None or not initial_peers:
                raise
            initial_peers = ()  # somebody else has those addresses now
            self.swarm = Swarm.join(self.run.run_id, initial_peers=(), options=options)
        self.is_first = not initial_peers
        self._update(
            run_id=self.run.run_id, peer_id=self.swarm.peer_id, is_client_mode=is_client,
            addresses=tuple(self.swarm.addresses()) if not is_client else (),
        )  # fmt: skip

    def _receive(self, invite: Invite) -> Reception:
        listen = self.spec.peer.listen
        if all(parse_address(address).is_loopback for address in invite.addresses):
            listen = listen.replace("/ip4/0.0.0.0/", "/ip4/127.0.0.1/")  # the whole swarm is on this machine
        return receive(
            invite, folder=self.spec.folder / "bundle", listen=listen, identity_path=self.spec.identity_path,
            should_dial_back=self.spec.reach == "auto",
            on_progress=lambda done, total: self.tell("joining", f"run bundle {100 * done // max(1, total)} %"),
        )  # fmt: skip

    # --- telling -----------------------------------------------------------------------------------------------------

    def tell(self, state: State, detail: str = "", **fields: Any) -> None:
        """Say what we are doing, to the watchdog at once and to the swarm with the next report."""
        self._update(state=state, detail=detail, **fields)

    def fail(self, message: str) -> None:
        """The last word before an exit."""
        self._update(state="leaving", error=message)

    def _update(self, **fields: Any) -> None:
        with self._lock:
            self._status = self._status.model_copy(update=fields)
            if not self._status_file.closed:
                self._status_file.write(self._status.model_dump_json().encode() + b"\n")
                self._status_file.flush()

    def report_with(self, facts: Facts) -> None:
        """Publish a report every `report_seconds` from now on, its changing fields from `facts`."""
        self._facts = facts
        self._reporter = threading.Thread(target=self._report_for_ever, name="reporter", daemon=True)
        self._reporter.start()

    def _report_for_ever(self) -> None:
        while not self.stop.is_set():
            started = time.monotonic()
            self.publish()
            if not self.swarm.is_alive() and not self.stop.is_set():
                self.fail("the DHT process or its libp2p daemon has died")
                os._exit(SwarmUnreachable.exit_code)  # the watchdog starts us again; no thread here can mend it
            self._remember()
            self.stop.wait(max(0.1, self.run.report_seconds - (time.monotonic() - started)))

    def publish(self) -> None:
        """Publish one report now; a DHT that does not answer is only logged, for the next report replaces this one."""
        report = PeerReport(
            peer_id=self.swarm.peer_id, boot_id=self.boot_id, role=self.spec.role, name=self.spec.peer.name,
            version=__version__, config_hash=self.run.config_hash(), is_client_mode=self._status.is_client_mode,
            published_at=time.time(), **{"state": self._status.state, **self._facts()},
        )  # fmt: skip
        try:
            self.swarm.publish(encode(report), lifetime_seconds=self.run.report_lifetime_seconds)
        except SwarmUnreachable as exc:
            logger.warning("report not published: %s", exc)
        self._update(report=report)

    def _remember(self) -> None:
        """Auxiliary peers without an invite: where to go when we start again."""
        if self.spec.bundle is None:
            return
        addresses = tuple(self.swarm.neighbours()[:MAX_KEPT])
        if addresses:  # who is alone keeps what it knew
            listen = listen_with_port(self.spec.peer.listen, self.swarm.addresses())
            known = KnownPeers(listen=listen, addresses=addresses)
            if known != self._known:
                self._known = known
                save_known(self.spec.folder, known)

    def close(self) -> None:
        """Leave the swarm."""
        self.stop.set()
        if hasattr(self, "swarm"):
            self.swarm.close()
