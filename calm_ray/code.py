"""Which calm_ray this is: peers of other code are not adopted, and a run knows who runs what. Pure but for reading."""

import hashlib
from functools import cache
from pathlib import Path


@cache
def code_hash() -> str:
    """SHA-256 over this package's Python files, in the order of their paths; the first 12 hex digits."""
    root = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
