"""An invite: one short line that a volunteer pastes. It names the swarm and the key to trust; the bundle has the rest.

Text form: `calm1-` and base64url of a compact JSON list, followed by 4 bytes of its SHA-256, so that a line cut short
by a chat program or a terminal is told apart from a wrong one.
"""

import base64
import binascii
import hashlib
import json
import re
from dataclasses import dataclass

from calm_ray.errors import ConfigError
from calm_ray.signing import PUBLIC_KEY_BYTES

PREFIX = "calm1-"
INVITE_FILE = "invite.txt"
"""In a run's output folder."""
MAX_ADDRESSES = 16
_RUN_ID = re.compile(r"^[a-z0-9][a-z0-9-]{0,62}$")
_ADDRESS = re.compile(
    r"^/(ip4|ip6|dns|dns4|dns6)/[^/\s]{1,253}/(tcp|udp)/(?P<port>\d{1,5})(/[a-z0-9-]+)*/p2p/[1-9A-HJ-NP-Za-km-z]{20,80}$"
)


@dataclass(frozen=True, kw_only=True)
class Invite:
    """What `calm-ray join` needs to find a run and to know that it is the right one."""

    run_id: str
    addresses: tuple[str, ...]
    """Multiaddresses of bootstrap peers, each with its `/p2p/ID`. Two or more survive the loss of one."""
    organiser_key: bytes
    """Ed25519 public key that the run bundle is signed with."""

    def encode(self) -> str:
        """The line to paste."""
        content = [self.run_id, list(self.addresses), self.organiser_key.hex()]
        payload = json.dumps(content, separators=(",", ":")).encode()
        return PREFIX + base64.urlsafe_b64encode(payload + _checksum(payload)).decode().rstrip("=")


def decode_invite(text: str) -> Invite:
    """Parse a pasted invite; raise ConfigError that says what is wrong with it."""
    text = "".join(text.split())
    if not text.startswith(PREFIX):
        raise ConfigError(f"invite: must start with `{PREFIX}`, got `{text[:12]}`; copy the organiser's whole line")
    body = text[len(PREFIX) :]
    try:
        raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise ConfigError("invite: contains characters that do not belong there; copy the whole line again") from None
    payload, checksum = raw[:-4], raw[-4:]
    if _checksum(payload) != checksum:
        raise ConfigError("invite: incomplete or altered (its checksum does not match); copy the whole line again")
    try:
        run_id, addresses, key = json.loads(payload)
        invite = Invite(run_id=run_id, addresses=tuple(addresses), organiser_key=bytes.fromhex(key))
        valid = (
            _RUN_ID.fullmatch(invite.run_id)
            and 1 <= len(invite.addresses) <= MAX_ADDRESSES
            and all(_is_address(address) for address in invite.addresses)
            and len(invite.organiser_key) == PUBLIC_KEY_BYTES
        )
    except (ValueError, TypeError, RecursionError):
        valid = None
    if not valid:
        raise ConfigError("invite: its content is not one of ours; ask the organiser for a new one")
    return invite


def _is_address(text: str) -> bool:
    match = _ADDRESS.fullmatch(text)
    return match is not None and 0 < int(match["port"]) < 65536


def _checksum(payload: bytes) -> bytes:
    return hashlib.sha256(payload).digest()[:4]
