"""Where a desk dials a newcomer back: libp2p is faked. Real ones are dialled in `tests/integration/test_desk.py`."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hivemind.p2p import PeerID

from calm_ray.swarm.desk import MAX_HOSTS, Desk

CALLER, OTHER = (PeerID.from_base58(f"QmQhps72kzA2DHfBJ6SAWvnXCaBW7KkMeNwt18AxgYxan{number}") for number in (1, 2))
BEFORE, NOW = "44.77.0.3", "44.77.0.33"


@dataclass
class Net:
    """`listed`: whom the desk's daemon is connected to, in its order; `there`: who answers."""

    listed: list[tuple[PeerID, str]]
    there: str = ""
    dialled: list[str] = field(default_factory=list)

    async def list_peers(self) -> list[object]:
        return [SimpleNamespace(peer_id=peer, addrs=[address]) for peer, address in self.listed]

    async def try_to_reach(self, address: str) -> str:
        self.dialled.append(address)
        return "" if self.there and self.there in address else "nobody answers at the observed address"


def answer(net: Net, monkeypatch: pytest.MonkeyPatch, *, times: int = 1) -> dict[str, Any]:
    monkeypatch.setattr("calm_ray.swarm.desk.open_bundle", lambda bundle: (SimpleNamespace(parts={}), None))
    monkeypatch.setattr("calm_ray.swarm.desk._try_to_reach", net.try_to_reach)
    desk: Any = Desk(Path("bundle"))
    desk._p2p = net

    async def ask() -> dict[str, Any]:
        return [await desk._dial_back("4001", CALLER) for _ in range(times)][-1]

    return asyncio.run(ask())


def test_newcomer_that_has_moved_is_dialled_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection of before lasts for some time. Dialled there alone, it was a client for the rest of its life."""
    odd = [(CALLER, "/ip6zone/eth0/ip6/fe80::1/tcp/4001"), (CALLER, f"/ip4/9.9.9.9/tcp/1/p2p/{OTHER}/p2p-circuit")]
    net = Net([(CALLER, f"/ip4/{BEFORE}/tcp/4001"), (OTHER, "/ip4/44.77.0.4/tcp/1"), *odd,
               (CALLER, f"/ip4/{NOW}/tcp/51234"), (CALLER, f"/ip4/{NOW}/tcp/4001")], there=NOW)  # fmt: skip
    assert answer(net, monkeypatch) == {"host": NOW, "is_reachable": True, "reason": ""}
    assert net.dialled == [f"/ip4/{host}/tcp/4001/p2p/{CALLER}" for host in (BEFORE, NOW)]


def test_caller_with_many_addresses_costs_no_more_than_a_few_dials(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net([(CALLER, f"/ip4/44.77.0.{number}/tcp/1") for number in range(50)])
    found = answer(net, monkeypatch, times=2)
    assert len(net.dialled) == MAX_HOSTS
    assert found["reason"] == "busy"


def test_caller_behind_a_relay_is_not_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net([(CALLER, f"/ip4/9.9.9.9/tcp/1/p2p/{OTHER}/p2p-circuit")])
    assert answer(net, monkeypatch)["reason"] == "not connected directly"
    assert not net.dialled
