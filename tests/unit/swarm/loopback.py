"""Libp2p daemons on the loopback interface, all in one process and on one loop, and rounds among them."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from hivemind.p2p import P2P

from calm_ray.swarm.exchange import Exchange
from calm_ray.swarm.group import Group, Kind, Member
from calm_ray.swarm.limits import RoundLimits
from calm_ray.swarm.verdict import RoundResult

T = TypeVar("T")

NAMESPACE = "tiny"
MAX_WEIGHT = 1000.0
STARTUP_SECONDS = 60.0

LIMITS = RoundLimits(
    request_seconds=5.0, matchmaking_seconds=5.0, grace_seconds=1.0, chunk_seconds=20.0, round_seconds=60.0
)


@dataclass(kw_only=True)
class Peer:
    """A member with a daemon of its own."""

    p2p: P2P
    exchange: Exchange
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.p2p.peer_id.to_base58()


def run(test: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end, as `asyncio.run`."""
    return asyncio.run(test())


@contextlib.asynccontextmanager
async def daemons(count: int) -> AsyncIterator[list[P2P]]:
    """`count` libp2p daemons that know each other; shut down at the end."""
    started: list[P2P] = []
    try:
        for number in range(count):
            bootstrap = [str(a) for a in await started[0].get_visible_maddrs()] if started else None
            started.append(
                await P2P.create(
                    initial_peers=bootstrap, auto_nat=False, nat_port_map=False, startup_timeout=STARTUP_SECONDS,
                )
            )  # fmt: skip
            assert number == len(started) - 1
        yield started
    finally:
        for p2p in started:
            await p2p.shutdown()


@contextlib.asynccontextmanager
async def peers(
    count: int, *, num_elements: int, clients: Sequence[int] = (), kind: Kind = "gradients"
) -> AsyncIterator[list[Peer]]:
    """`count` peers ready for rounds; those whose numbers are in `clients` answer no calls."""
    async with daemons(count) as found:
        members = [Peer(p2p=p2p, exchange=Exchange(num_elements={kind: num_elements})) for p2p in found]
        for number, peer in enumerate(members):
            await peer.exchange.serve(peer.p2p, namespace=NAMESPACE, is_reachable=number not in clients)
        try:
            yield members
        finally:
            await asyncio.gather(*(peer.exchange.close() for peer in members))


def group_of(
    members: Sequence[Peer], *, fractions: Sequence[float], senders: Sequence[int], epoch: int = 7,
    limits: RoundLimits = LIMITS, kind: Kind = "gradients",
) -> Group:  # fmt: skip
    return Group(
        group_id=secrets.token_bytes(16),
        kind=kind,
        epoch=epoch,
        members=tuple(
            Member(peer_id=peer.name, is_sender=number in senders, fraction=fraction)
            for number, (peer, fraction) in enumerate(zip(members, fractions, strict=True))
        ),
        limits=limits,
    )


async def run_all(
    members: Sequence[Peer], group: Group, *, vectors: Sequence[torch.Tensor | None], weights: Sequence[float],
    codec: str = "none",
) -> list[RoundResult]:  # fmt: skip
    """Every member's result of one round."""
    return await asyncio.gather(
        *(
            peer.exchange.run(group, vector=vector, weight=weight, codec=codec, max_weight=MAX_WEIGHT)
            for peer, vector, weight in zip(members, vectors, weights, strict=True)
        )
    )


def weighted_mean(vectors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = sum(vector.double() * weight for vector, weight in zip(vectors, weights, strict=True))
    assert isinstance(total, torch.Tensor)
    return total / sum(weights)
