"""What a peer says about itself on its machine: one JSON line at a time, child to watchdog to whoever asks."""

from pydantic import BaseModel, ConfigDict

from calm_ray.report import PeerReport, Role
from calm_ray.summary import SwarmSummary


class PeerStatus(BaseModel):
    """The last word of one peer process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    state: str = "starting"
    detail: str = ""
    """A sentence for people."""
    run_id: str = ""
    peer_id: str = ""
    addresses: tuple[str, ...] = ()
    is_client_mode: bool = False
    report: PeerReport | None = None
    summary: SwarmSummary | None = None
    """A monitor's."""
    last_checkpoint: str = ""
    error: str = ""
    """Why the peer gave up, if it did."""
    exit_code: int | None = None
    num_restarts: int = 0
