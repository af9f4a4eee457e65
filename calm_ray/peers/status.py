"""What a peer says about itself on its machine: one JSON line at a time, child to watchdog to whoever asks."""

import json

from pydantic import BaseModel, ConfigDict, ValidationError

from calm_ray.peers.budget import Cause
from calm_ray.peers.judge import Pulse
from calm_ray.report import PeerReport, Role
from calm_ray.summary import SwarmSummary


class PeerStatus(BaseModel):
    """The last word of one peer process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    state: str = "starting"
    """A report's state, or one of the watchdog's: `restarting`, `stalled`, `parked`, `left`."""
    detail: str = ""
    """A sentence for people."""
    doing: str = ""
    """At this moment, in some words; empty if `state` says it all."""
    run_id: str = ""
    config_hash: str = ""
    peer_id: str = ""
    addresses: tuple[str, ...] = ()
    is_client_mode: bool = False
    report: PeerReport | None = None
    summary: SwarmSummary | None = None
    """A monitor's."""
    last_checkpoint: str = ""
    last_success_at: float | None = None
    """Unix seconds of the last true round, or a monitor's last reading of the swarm."""
    warnings: tuple[str, ...] = ()
    """What is wrong and does not stop the peer: a disk that is full, a clock that is off."""
    pulses: dict[str, Pulse] = {}
    """What should go on, for the watchdog to judge by."""
    error: str = ""
    """Why the peer gave up, if it did."""

    # The watchdog's own words.
    exit_code: int | None = None
    num_restarts: int = 0
    """Since the watchdog's start."""
    restarts: dict[Cause, int] = {}
    """Of this role slot, ever."""
    pid: int = 0
    """Of the watchdog."""
    code_hash: str = ""
    """Of the calm_ray that runs here."""
    memory_bytes: int = 0
    """Of the peer's processes together."""

    is_other_version: bool = False
    """Our own note: who said this is another version of calm-ray, and what we did not understand is left out."""


def read_status(data: bytes) -> PeerStatus:
    """A peer's status as it was told or written down, by any version. ValueError if it is none at all.

    Without this, whoever updates calm-ray while a peer runs could neither see that peer nor end it.
    """
    try:
        return PeerStatus.model_validate_json(data)
    except ValidationError as exc:
        told = json.loads(data)
        strange = {error["loc"][0] for error in exc.errors() if error["loc"]}
    if not isinstance(told, dict):
        raise ValueError("a status is a JSON object")
    known = {name: value for name, value in told.items() if name not in strange}
    return PeerStatus.model_validate_json(json.dumps({**known, "is_other_version": True}))
