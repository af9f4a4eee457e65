"""Libp2p daemons on the loopback interface, all in one process and on one loop, and rounds among them."""

import asyncio
import contextlib
import gc
import itertools
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from hivemind.p2p import P2P

from calm_ray.swarm.exchange import Exchange
from calm_ray.swarm.group import Group, Kind, Member
from calm_ray.swarm.limits import RoundLimits
from calm_ray.swarm.verdict import RoundResult

T = TypeVar("T")

MAX_WEIGHT = 1000.0
STARTUP_SECONDS = 60.0
TEST_SECONDS = 100.0

LIMITS = RoundLimits(
    request_seconds=10.0, matchmaking_seconds=10.0, grace_seconds=1.0, chunk_seconds=20.0, round_seconds=60.0
)


@dataclass(kw_only=True)
class Peer:
    """A member with a daemon of its own; `exchange` belongs to one test's run."""

    p2p: P2P
    exchange: Exchange
    namespace: str

    @property
    def name(self) -> str:
        return str(self.p2p.peer_id.to_base58())


@dataclass
class Loopback:
    """Daemons that live as long as a test module; each costs most of a second to start."""

    loop: asyncio.AbstractEventLoop
    daemons: list[P2P] = field(default_factory=list)
    _runs: Iterator[int] = field(default_factory=itertools.count)

    def run(self, test: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(test, TEST_SECONDS))

    @contextlib.asynccontextmanager
    async def peers(
        self, count: int, *, num_elements: int, clients: Collection[int] = (), strangers: Collection[int] = ()
    ) -> AsyncIterator[list[Peer]]:
        """`count` peers of a run of their own. Clients answer no calls; of strangers there is only the daemon."""
        while len(self.daemons) < count:
            self.daemons.append(await start_daemon(self.daemons[:1]))
        namespace = f"run{next(self._runs)}"
        sizes: dict[Kind, int] = {"gradients": num_elements, "state": num_elements}
        found = [
            Peer(p2p=p2p, exchange=Exchange(num_elements=sizes), namespace=namespace) for p2p in self.daemons[:count]
        ]
        served = [peer for number, peer in enumerate(found) if number not in strangers]
        for peer in served:
            await peer.exchange.serve(peer.p2p, namespace=namespace, is_reachable=found.index(peer) not in clients)
        try:
            yield found
        finally:
            await asyncio.gather(*(peer.exchange.close() for peer in served))


@contextlib.contextmanager
def loopback() -> Iterator[Loopback]:
    """For a module's fixture."""
    loop = asyncio.new_event_loop()
    net = Loopback(loop)
    try:
        yield net
    finally:
        for p2p in net.daemons:
            loop.run_until_complete(p2p.shutdown())
        loop.run_until_complete(asyncio.sleep(0.1))  # sleep: transports close on the next turns
        loop.close()
        gc.collect()  # here, where its complaints are expected, rather than in another file's test


async def start_daemon(known: Sequence[P2P] = ()) -> P2P:
    """A daemon that is connected to those in `known`."""
    bootstrap = [str(address) for p2p in known for address in await p2p.get_visible_maddrs()]
    return await P2P.create(
        initial_peers=bootstrap or None, auto_nat=False, nat_port_map=False, startup_timeout=STARTUP_SECONDS
    )


def group_of(
    members: Sequence[Peer], *, fractions: Sequence[float], senders: Collection[int], epoch: int = 7,
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
    """The results of one round of `members`, who may be fewer than the group's."""
    return await asyncio.gather(
        *(
            peer.exchange.run(group, vector=vector, weight=weight, codec=codec, max_weight=MAX_WEIGHT)
            for peer, vector, weight in zip(members, vectors, weights, strict=True)
        )
    )


async def eventually(predicate: Callable[[], bool], *, timeout_seconds: float = 10.0) -> None:
    """As tests.eventually, on a loop."""
    async with asyncio.timeout(timeout_seconds):
        while not predicate():
            await asyncio.sleep(0.02)  # sleep: this is `eventually`


def random_vector(seed: int, num_elements: int) -> torch.Tensor:
    return torch.randn(num_elements, generator=torch.Generator().manual_seed(seed))


def weighted_mean(vectors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = sum(vector.double() * weight for vector, weight in zip(vectors, weights, strict=True))
    assert isinstance(total, torch.Tensor)
    return total / sum(weights)
