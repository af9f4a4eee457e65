"""The identity file: made once, whole or not at all; a damaged one is the user's to delete, not a bug of ours."""

import subprocess
import sys
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


FULL = """
import resource, signal, sys
from pathlib import Path
from calm_ray.swarm.node import ensure_identity

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
try:
    ensure_identity(path)
except OSError as exc:
    assert exc.filename == str(path), exc
else:
    raise AssertionError("it had no room")
assert list(path.parent.iterdir()) == [], list(path.parent.iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
ensure_identity(path)
"""


def test_disk_without_room_leaves_no_half_identity(tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk. Half a file would park the peer, even after room was made."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "identity.key")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["identity.key"]


def test_rest_of_an_earlier_try_is_in_nobodys_way(tmp_path: Path) -> None:
    path, rest = tmp_path / "identity.key", tmp_path / "identity.key.partial"
    rest.write_bytes(b"half")
    rest.chmod(0o400)
    ensure_identity(path)
    assert path.stat().st_mode & 0o777 == 0o400
    assert not rest.exists()
