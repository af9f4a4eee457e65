"""The identity file: made once, and a damaged one is the user's to delete, not a bug of ours."""

from pathlib import Path

import pytest

from calm_ray.errors import ConfigError
from calm_ray.swarm.node import ensure_identity


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"not a key"], ids=["empty", "binary", "text"])
def test_damaged_identity_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"identity\.key: damaged, .*delete it"):
        ensure_identity(path)


def test_identity_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    ensure_identity(path)
    first = path.read_bytes()
    ensure_identity(path)
    assert path.read_bytes() == first
