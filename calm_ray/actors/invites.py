"""The run's invite, made of its auxiliary peers' addresses; written down, so that a crash does not change it."""

import contextlib
import logging
from collections.abc import Collection

from calm_ray.actors.desired import Desired, Member
from calm_ray.actors.plan import next_invite_addresses
from calm_ray.errors import ConfigError
from calm_ray.invite import INVITE_FILE, MAX_ADDRESSES, Invite, decode_invite
from calm_ray.peers.budget import write_atomically
from calm_ray.peers.spec import PeerSpec

logger = logging.getLogger(__name__)


class Invites:
    """`current` is empty until all auxiliary peers of a new run are there."""

    def __init__(self, desired: Desired) -> None:
        self._desired = desired
        self._path = desired.out / INVITE_FILE
        self.current = ""
        with contextlib.suppress(ConfigError):
            text = self._written()
            if decode_invite(text).organiser_key.hex() == desired.organiser_key:
                self.current = text

    def update(self, members: Collection[Member]) -> None:
        """Look at the members, and write down the invite that they make, if it is another."""
        addresses = next_invite_addresses([member for member in members if member.role == "auxiliary"])
        if addresses and (invite := self._encode(addresses)) != self.current:
            self.current = invite
            logger.info("action=invite num_addresses=%d", len(addresses))
        if self.current and self._path.parent.is_dir() and self._written() != self.current:
            write_atomically(self._path, self.current + "\n")  # a disk that is full now will not be for ever

    def invited(self, spec: PeerSpec, *, members: Collection[Member]) -> PeerSpec:
        """`spec` for a peer that joins: by way of those that are up now, and of those that the invite names."""
        addresses = [a for m in members if m.is_up and m.peer is not None for a in m.peer.addresses[:2]]
        if self.current:
            addresses += decode_invite(self.current).addresses
        return spec.model_copy(update={"bundle": None, "resume": None, "invite": self._encode(tuple(addresses))})

    def _written(self) -> str:
        try:
            return self._path.read_text().strip()
        except (OSError, ValueError):
            return ""

    def _encode(self, addresses: tuple[str, ...]) -> str:
        unique = tuple(dict.fromkeys(addresses))[:MAX_ADDRESSES]
        return Invite(
            run_id=self._desired.run_id, addresses=unique, organiser_key=bytes.fromhex(self._desired.organiser_key)
        ).encode()  # fmt: skip
