"""What a peer process is told when it starts: its role, its folder, and where the run is."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from calm_ray.config import PeerTable
from calm_ray.report import Role
from calm_ray.tables import Table

NUM_FILES = 16384
"""Open files. CALM's README: 1024, the usual limit, ends in "too many open files" with some dozens of peers."""

IDENTITY_FILE, KNOWN_FILE = "identity.key", "known-peers.json"
"""In a peer's folder; of the second, see `known.py`."""

Reach = Literal["auto", "client", "public"]


class CheckpointSpec(Table):
    """For a monitor that writes checkpoints."""

    folder: Path
    every_epochs: int = Field(ge=1)
    keep_last: int = Field(ge=1)


class PeerSpec(Table):
    """One peer. `bundle` for the first auxiliary peer, which has it on disk; everyone else comes with an `invite`."""

    role: Role
    folder: Path
    """Identity, log, lock and downloaded bundle: one folder for each peer, never shared."""
    bundle: Path | None = None
    invite: str | None = None
    peer: PeerTable = PeerTable()
    reach: Reach = "auto"
    """`auto`: full peer only if an auxiliary peer can dial us back; `public`: do not ask; `client`: never."""
    has_lease: bool = False
    """Leave when nobody holds the control socket: whoever started us is gone."""
    adoption_seconds: float = Field(default=3600.0, ge=0)
    """An auxiliary peer or monitor whose holder is gone goes on for so long, to be adopted by the next one. A trainer
    leaves at once: its GPU must be free."""
    checkpoints: CheckpointSpec | None = None
    resume: Path | None = None
    """For an auxiliary peer: a checkpoint, or a folder of them (the newest counts), to go on from unless the swarm is
    further."""
    linger_seconds: float = Field(default=20.0, ge=0)
    """After the last epoch, stay this long: groupmates may still need us, and the monitor our state."""

    @model_validator(mode="after")
    def _knows_the_run(self) -> Self:
        if self.bundle is None and self.invite is None:
            raise ValueError("give an invite, or a bundle to start a new run from")
        if self.resume is not None and self.role != "auxiliary":
            raise ValueError("only an auxiliary peer can resume from a checkpoint; others get the state from it")
        return self

    @property
    def orphan_seconds(self) -> float:
        """How long this peer stays when its lease is lost."""
        return 0.0 if self.role == "trainer" else self.adoption_seconds

    @property
    def identity_path(self) -> Path:
        return self.folder / IDENTITY_FILE

    @property
    def known_path(self) -> Path:
        return self.folder / KNOWN_FILE

    @property
    def log_path(self) -> Path:
        return self.folder / "peer.log"

    @property
    def feed_path(self) -> Path:
        return self.folder / "feed.sqlite"
