"""Ed25519 signatures of the organiser's key: the one thing that a volunteer trusts in an invite.

Not libp2p's keys (RSA, one per peer) and not yet the access tokens: those come with membership.
"""

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from calm_ray.errors import ConfigError

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64


def load_or_create_key(path: Path) -> Ed25519PrivateKey:
    """Read a raw 32-byte private key, or make one, readable by its owner only. Raise ConfigError for a damaged file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # O_EXCL and the mode at creation: the key is never readable by others, not even for an instant.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(Ed25519PrivateKey.generate().private_bytes_raw())
    raw = path.read_bytes()
    if len(raw) != 32:
        raise ConfigError(f"{path}: not a key of ours (32 bytes expected, {len(raw)} found); restore it from a backup")
    return Ed25519PrivateKey.from_private_bytes(raw)


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The 32 bytes that others verify with."""
    return key.public_key().public_bytes_raw()


def is_signed_by(public_key: bytes, *, signature: bytes, data: bytes) -> bool:
    """Whether `signature` over `data` was made with the private half of `public_key`."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True
