"""What a peer needs to find its swarm again when it starts: where others were, and how it was reached itself.

An auxiliary peer has no invite, for it is what invites name: without this it would come back as a swarm of its own, on
another port. Everyone else has one, and its addresses may all be gone by then, while the swarm trains on.

Light: whoever starts peers writes here as well.
"""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from calm_ray.errors import ConfigError, SwarmUnreachable
from calm_ray.peers.budget import write_atomically
from calm_ray.peers.spec import KNOWN_FILE
from calm_ray.swarm.addresses import check_listen, live_addresses, peer_at

MAX_KEPT = 32
PROBE_SECONDS = 2.0


class KnownPeers(BaseModel):
    """Of the last life of this peer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    listen: str = ""
    """Where we listened, with the port that we got."""
    announce: tuple[str, ...] = Field(default=(), max_length=MAX_KEPT)
    is_client_mode: bool = True
    addresses: tuple[str, ...] = ()
    """Full peers that can be dialled, the most useful first; MAX_KEPT at most, and what is no address is dropped."""

    @field_validator("addresses")
    @classmethod
    def _keep_what_can_be_dialled(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(text for text in dict.fromkeys(addresses) if peer_at(text))[:MAX_KEPT]

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
        """Those that accept connections now."""
        try:
            return tuple(live_addresses(self.addresses, timeout_seconds=PROBE_SECONDS)) if self.addresses else ()
        except SwarmUnreachable:
            return ()


def load_known(folder: Path) -> KnownPeers:
    """What was saved in `folder`, or nothing: it only helps."""
    try:
        return KnownPeers.model_validate_json((folder / KNOWN_FILE).read_bytes())
    except (OSError, ValidationError):
        return KnownPeers()


def save_known(folder: Path, known: KnownPeers) -> None:
    """Replace what was saved; an unwritable disk leaves it as it was, and is told elsewhere."""
    write_atomically(folder / KNOWN_FILE, known.model_dump_json())


def remember(folder: Path, addresses: Sequence[str]) -> None:
    """Tell the peer that will start in `folder` of others, besides those that it knew itself. As `save_known`."""
    known = load_known(folder)
    merged = one_each([*addresses, *known.addresses])
    if merged != known.addresses:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        save_known(folder, KnownPeers(**known.model_dump() | {"addresses": merged}))


def one_each(addresses: Iterable[str]) -> tuple[str, ...]:
    """The first address of each peer, MAX_KEPT at most: old ones of those who moved would crowd out the others."""
    found: dict[str, str] = {}
    for text in addresses:
        if peer := peer_at(text):
            found.setdefault(peer, text)
    return tuple(found.values())[:MAX_KEPT]


def listen_with_port(listen: str, addresses: Sequence[str]) -> str:
    """`listen` with the port that its 0 became, as one of our own `addresses` tells."""
    ports = [address.split("/tcp/")[1].split("/")[0] for address in addresses if "/tcp/" in address]
    return f"{listen.removesuffix('0')}{ports[0]}" if listen.endswith("/tcp/0") and ports else listen
