"""What a peer's place in the swarm tells without a swarm: why it was not let in, who can be dialled, what hangs."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hivemind.dht.protocol import ValidationError
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError

from calm_ray.errors import SwarmUnreachable
from calm_ray.swarm import node
from calm_ray.swarm.node import NobodyThere, NodeOptions, Swarm

FULL, CLIENT = (f"QmQhps72kzA2DHfBJ6SAWvnXCaBW7KkMeNwt18AxgYxan{number}" for number in (1, 2))


class Faked(Swarm):
    """Its DHT process and its libp2p daemon answer as told."""

    def __init__(self, *, routed: Any = frozenset({FULL}), listed: Any = ()) -> None:
        self._routed, self._listed = routed, listed

    def run_in_dht(self, action: object) -> Any:
        return self._routed if not isinstance(self._routed, Exception) else self._raise(self._routed)

    def call(self, action: Callable[..., Any], *, timeout_seconds: float) -> Any:
        return self._listed if not isinstance(self._listed, Exception) else self._raise(self._listed)

    def _raise(self, exc: Exception) -> None:
        raise exc


def test_neighbours_are_full_peers_at_addresses_that_can_be_dialled() -> None:
    relay = f"/ip4/44.77.0.7/tcp/4001/p2p/{CLIENT}/p2p-circuit"
    swarm = Faked(
        listed=[
            SimpleNamespace(peer_id=FULL, addrs=["/ip4/127.0.0.1/tcp/4001", "/ip4/44.77.0.1/tcp/4001", relay]),
            SimpleNamespace(peer_id=FULL, addrs=["/ip6zone/eth0/ip6/fe80::1/tcp/4001", "/ip4/44.77.0.1/udp/4001/quic"]),
            SimpleNamespace(peer_id=CLIENT, addrs=["/ip4/44.77.0.2/tcp/51234"]),
        ]
    )  # fmt: skip
    assert swarm.neighbours() == [f"/ip4/44.77.0.1/tcp/4001/p2p/{FULL}", f"/ip4/127.0.0.1/tcp/4001/p2p/{FULL}"]


@pytest.mark.parametrize(
    ("routed", "listed", "expected"),
    [
        (frozenset(), (), ""),
        (SwarmUnreachable("the DHT did not answer"), (), "the DHT process does not answer"),
        (frozenset(), TimeoutError(), "the libp2p daemon does not answer"),
        (frozenset(), ConnectionRefusedError(), "the libp2p daemon does not answer"),
    ],
)
def test_process_that_hangs_is_named_and_no_neighbour_is_known(routed: Any, listed: Any, expected: str) -> None:
    swarm = Faked(routed=routed, listed=listed)
    assert swarm.stuck_process() == expected
    assert swarm.neighbours() == []


CLOCK = ValidationError("local time must be within 3 seconds  of others(local: 1790000010.0, peer: 1790000000.0)")
WALL = ValidationError("Peer Qm can't access this node. Probably, libp2p has failed to bypass the firewall")
NO_LIBP2P = P2PDaemonError("Daemon failed to start: 2026/11/21 17:39:48 failed to connect to bootstrap peers")


class Entrance:
    """In the place of hivemind's DHT: lets nobody in for `problem`, unless it is of those that may be overlooked."""

    def __init__(self, problem: Exception) -> None:
        self._problem, self.tried = problem, list[bool]()

    def __call__(self, *, strict: bool, **options: object) -> object:
        self.tried.append(strict)
        if strict or not isinstance(self._problem, ValidationError):
            raise self._problem
        return SimpleNamespace()


@pytest.fixture
def join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Entrance], Swarm]:
    def join_by(entrance: Entrance) -> Swarm:
        monkeypatch.setattr("hivemind.DHT", entrance)
        monkeypatch.setattr(node, "_helpers_of", lambda dht: {})
        monkeypatch.setattr(node, "bind_children_to_parent", lambda: None)
        monkeypatch.setattr(node, "live_addresses", list)
        options = NodeOptions(is_client_mode=False, listen="/ip4/127.0.0.1/tcp/0", identity_path=tmp_path / "id")
        return Swarm.join("r", initial_peers=[f"/ip4/127.0.0.1/tcp/1/p2p/{FULL}"], options=options)

    return join_by


def test_clock_that_is_off_keeps_nobody_out(join: Callable[[Entrance], Swarm]) -> None:
    """hivemind's own limit is 3 s; what is told, and what is refused, is decided in `peers/vigil.py`."""
    entrance = Entrance(CLOCK)
    join(entrance)
    assert entrance.tried == [True, False]


@pytest.mark.parametrize(
    ("problem", "kind", "words"),
    [
        (WALL, SwarmUnreachable, "the swarm cannot call this peer back: a firewall"),
        (
            P2PDaemonError("Daemon failed to start: bind: permission denied"),
            SwarmUnreachable,
            "libp2p did not start on",
        ),
        (NO_LIBP2P, NobodyThere, "answers, but libp2p cannot connect"),
        (RuntimeError("none of the initial_peers responded to a ping"), NobodyThere, "not as a peer of this swarm"),
    ],
)
def test_nobody_there_is_told_from_trouble_of_our_own(
    join: Callable[[Entrance], Swarm], problem: Exception, kind: type[Exception], words: str
) -> None:
    entrance = Entrance(problem)
    with pytest.raises(SwarmUnreachable, match=words) as caught:
        join(entrance)
    assert type(caught.value) is kind
    assert entrance.tried == [True]
