"""How reports are signed and bounded in the DHT. The only file that touches `pydantic.v1`, which hivemind requires.

A report lives under `{run_id}_reports`, subkey = the owner's public key, so that nobody can overwrite it. We sign with
the very RSA key that libp2p derives the peer id from: a report's owner *is* a peer id, not only a name that it claims.
"""

import hashlib
from typing import Any

import multihash
from cryptography.hazmat.primitives import serialization
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.schema import BytesWithPublicKey, SchemaValidator
from hivemind.p2p import PeerID
from hivemind.proto import crypto_pb2
from hivemind.utils.crypto import RSAPrivateKey, RSAPublicKey
from pydantic.v1 import BaseModel, conbytes

from calm_ray.report import MAX_REPORT_BYTES

REPORTS = "reports"


class _ReportsSchema(BaseModel):
    reports: dict[BytesWithPublicKey, conbytes(strict=True, max_length=MAX_REPORT_BYTES)]  # type: ignore[valid-type]


def record_validators(run_id: str, key: RSAPrivateKey) -> list[Any]:
    """What every DHT node of a run checks before it stores a record."""
    return [SchemaValidator(_ReportsSchema, prefix=run_id), RSASignatureValidator(key)]


def reports_key(run_id: str) -> str:
    return f"{run_id}_{REPORTS}"


def own_subkey(key: RSAPrivateKey) -> bytes:
    return RSASignatureValidator(key).local_public_key


def owner_of(subkey: bytes) -> str:
    """Peer id (base58) of the owner of a report's subkey. Raises ValueError if the subkey holds no RSA key."""
    prefix, suffix = RSASignatureValidator.PUBLIC_KEY_FORMAT.split(b"_key_")
    if not (subkey.startswith(prefix) and subkey.endswith(suffix)):
        raise ValueError("subkey without an owner")
    public_key = RSAPublicKey.from_bytes(subkey[len(prefix) : -len(suffix)])
    der = public_key._public_key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    encoded = crypto_pb2.PublicKey(key_type=crypto_pb2.RSA, data=der).SerializeToString()
    # https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md: keys over 42 bytes are hashed
    digest = multihash.encode(hashlib.sha256(encoded).digest(), multihash.coerce_code("sha2-256"))
    return PeerID(digest).to_base58()


def load_identity(data: bytes) -> RSAPrivateKey:
    """The RSA key inside a libp2p identity file."""
    key = RSAPrivateKey.__new__(RSAPrivateKey)
    key.__setstate__({"_private_key": crypto_pb2.PrivateKey.FromString(data).data})
    return key
