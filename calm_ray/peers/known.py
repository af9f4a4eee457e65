"""What a peer needs to find its swarm again when it starts: where others were, and how it was reached itself.

An auxiliary peer has no invite, for it is what invites name: without this it would come back as a swarm of its own, on
another port. Everyone else has one, and its addresses may all be gone by then, while the swarm trains on.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from calm_ray.checkpoint.files import replace_file
from calm_ray.errors import ConfigError, SwarmUnreachable
from calm_ray.swarm.addresses import check_listen, live_addresses

logger = logging.getLogger(__name__)

FILE_NAME = "known-peers.json"
MAX_KEPT = 32
PROBE_SECONDS = 2.0


class KnownPeers(BaseModel):
    """Of the last life of this peer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    listen: str = ""
    """Where we listened, with the port that we got."""
    announce: tuple[str, ...] = Field(default=(), max_length=MAX_KEPT)
    is_client_mode: bool = True
    addresses: tuple[str, ...] = Field(default=(), max_length=MAX_KEPT)
    """Full peers that we were connected to."""

    def free_listen(self, wanted: str) -> str:
        """Where to listen: on the port that we had, if `wanted` leaves it open and nobody else has it now."""
        if not self.listen or not wanted.endswith("/tcp/0") or not self.listen.startswith(wanted.removesuffix("0")):
            return wanted
        try:
            check_listen(self.listen, ())
        except ConfigError:
            return wanted
        return self.listen

    def live(self) -> tuple[str, ...]:
        """Those that accept connections now; none if nobody does: we are then the first."""
        try:
            return tuple(live_addresses(self.addresses, timeout_seconds=PROBE_SECONDS)) if self.addresses else ()
        except (SwarmUnreachable, ValueError):
            return ()


def load_known(folder: Path) -> KnownPeers:
    """What was saved in `folder`, or nothing: it only helps."""
    try:
        return KnownPeers.model_validate_json((folder / FILE_NAME).read_bytes())
    except (OSError, ValidationError):
        return KnownPeers()


def save_known(folder: Path, known: KnownPeers) -> None:
    """Replace what was saved; an unwritable disk is only logged."""
    try:
        replace_file(folder / FILE_NAME, known.model_dump_json().encode())
    except OSError as exc:
        logger.warning("known peers not saved: %s", exc)


def listen_with_port(listen: str, addresses: Sequence[str]) -> str:
    """`listen` with the port that its 0 became, as one of our own `addresses` tells."""
    ports = [address.split("/tcp/")[1].split("/")[0] for address in addresses if "/tcp/" in address]
    return f"{listen.removesuffix('0')}{ports[0]}" if listen.endswith("/tcp/0") and ports else listen
