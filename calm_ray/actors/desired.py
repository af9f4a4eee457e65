"""What the organiser wants to run, what runs, and how both travel: as JSON, so that whoever starts again knows all.

No Ray here. Nothing secret either: the organiser's private key never leaves the folder that it lies in.
"""

import hashlib
from pathlib import Path

from pydantic import Field

from calm_ray.bundle import MANIFEST
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus
from calm_ray.report import Role
from calm_ray.tables import Table

NAMESPACE = "calm-ray"
SUPERVISOR = "supervisor"


def actor_name(run_id: str, name: str) -> str:
    """A named actor of this run; `name` is a slot's or SUPERVISOR."""
    return f"{run_id}/{name}"


class Slot(Table):
    """One peer that should be there."""

    name: str
    """`<role>-<index>`; its actor's and its folder's name as well."""
    spec: PeerSpec
    """With the bundle, as if it were the run's first peer. The first slot's is; everyone else gets an invite."""
    num_gpus: float = Field(default=0, ge=0)

    @property
    def role(self) -> Role:
        return self.spec.role


class Desired(Table):
    """A whole run's own peers. The first slot is an auxiliary peer."""

    run_id: str
    config_hash: str
    code_hash: str
    num_epochs: int
    home: str
    """The node that the output folder is on."""
    out: Path
    """Where the bundle and the invite are."""
    bundle_digest: str
    organiser_key: str
    """Public, hex."""
    slots: tuple[Slot, ...] = Field(min_length=1)
    asked_at: float
    """Unix seconds when a person asked for this last; peers that were parked before are forgiven."""


class Orders(Table):
    """What a peer's actor is made with. Small: Ray keeps it to make the actor again, and loses what is large with
    whoever made it, so the bundle follows by a call."""

    spec: PeerSpec
    config_hash: str
    num_epochs: int
    bundle_digest: str = ""
    """Of the bundle in `spec`, if there is one."""
    known_addresses: tuple[str, ...] = ()
    """Of peers of this run: for a first auxiliary peer that comes back on a blank machine."""
    asked_at: float = 0.0


class ActorReport(Table):
    """What a peer's actor says of itself and of its peer."""

    peer: PeerStatus
    node_id: str = ""
    worker_pid: int = 0
    is_adopted: bool = False
    """It found its peer running."""
    num_revivals: int = 0
    """How often this actor started its peer again after the watchdog had gone."""
    asked_at: float = 0.0
    """The newest asking (`Desired.asked_at`) that this actor has heeded."""
    needs_bundle: bool = False


class Member(Table):
    """A slot as the supervisor sees it."""

    name: str
    role: Role
    is_there: bool = False
    """Its actor exists."""
    node_id: str = ""
    report: ActorReport | None = None
    """The newest of this actor."""

    @property
    def peer(self) -> PeerStatus | None:
        return self.report.peer if self.report is not None else None

    @property
    def is_parked(self) -> bool:
        return self.peer is not None and self.peer.state == "parked"

    @property
    def is_unheard(self) -> bool:
        """It is there, and what it does we do not know yet."""
        return self.is_there and self.report is None

    def has_given_up(self, *, asked_at: float) -> bool:
        """Although a person asked for it then: what had parked it before may be mended."""
        return self.is_parked and self.report is not None and self.report.asked_at >= asked_at

    @property
    def is_up(self) -> bool:
        """An auxiliary peer that hands out bundles and state."""
        return self.is_there and self.peer is not None and self.peer.state == "assisting" and bool(self.peer.addresses)


class Incident(Table):
    """One line of what went wrong, or right again."""

    at: float
    """Unix seconds."""
    text: str


class SupervisorStatus(Table):
    """All that the supervisor knows."""

    desired: Desired
    worker_pid: int
    node_id: str
    invite: str = ""
    members: tuple[Member, ...] = ()
    incidents: tuple[Incident, ...] = ()
    """The last ones, oldest first."""


def bundle_digest(bundle: Path) -> str:
    """SHA-256 of the manifest, which names the SHA-256 of everything else; empty if there is none."""
    try:
        return hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return ""
