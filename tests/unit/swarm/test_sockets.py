"""hivemind's sockets at a place of our own: what a killed process left goes with the next start, and nothing else."""

import asyncio
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hivemind.p2p import P2P

from calm_ray.swarm.hygiene import MAX_SOCKET_PATH_BYTES, place_sockets, sweep_sockets

STOCK = P2P._UNIX_SOCKET_PREFIX


@pytest.fixture
def private() -> Iterator[Path]:
    """Short: a socket's path may have little more than a hundred bytes, and pytest's own folders take as many."""
    with tempfile.TemporaryDirectory(prefix="calm-sockets-") as folder:
        yield Path(folder)
    P2P._UNIX_SOCKET_PREFIX = STOCK


def left_behind(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    return path


def test_sockets_of_the_last_life_are_removed_and_others_left(private: Path) -> None:
    own = [left_behind(private / f"ab12-p2p{kind}-x_-1.sock") for kind in ("d", "client")]
    others = [left_behind(private / name) for name in ("ab12.sock", "ab13-p2pd-y.sock")]
    place_sockets(private / "ab12")
    assert not any(path.exists() for path in own)
    assert all(path.exists() for path in others)
    place_sockets(private / "new")  # nobody has been there


def test_libp2p_listens_where_it_was_told_to(private: Path) -> None:
    place_sockets(private / "ab12")

    async def live() -> list[str]:
        p2p = await P2P.create(no_listen=True, auto_nat=False, nat_port_map=False, dht_mode="client")
        try:
            return [path.name for path in private.iterdir()]
        finally:
            await p2p.shutdown()

    (name,) = asyncio.run(live())
    assert name.startswith("ab12-p2pd-")
    assert not list(private.iterdir()), "and leaves nothing when it ends well"


def test_too_long_a_place_is_left_to_hivemind(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 60)
    place_sockets(folder / "ab12")
    assert P2P._UNIX_SOCKET_PREFIX == STOCK
    assert len(os.fsencode(folder)) > MAX_SOCKET_PATH_BYTES - 40


def test_nothing_to_sweep_is_no_error(tmp_path: Path) -> None:
    sweep_sockets(tmp_path / "missing" / "ab12")
