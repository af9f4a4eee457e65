"""Matchmakers on libp2p daemons of one process: who looks for a group when, and whom each of them knows."""

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from hivemind.p2p import P2P

from calm_ray.swarm.gathering import Key, NoGroup, rank_of
from calm_ray.swarm.group import Group, Kind, Member
from calm_ray.swarm.limits import RoundLimits
from calm_ray.swarm.matchmaking import Matchmaker
from calm_ray.swarm.messages import Ticket
from calm_ray.swarm.wires import Behind
from tests.unit.swarm.loopback import Loopback, start_daemon

EPOCH = 7
SCHEMA = b"same"
LIMITS = RoundLimits(
    request_seconds=8.0, matchmaking_seconds=16.0, grace_seconds=8.0, chunk_seconds=4.0, round_seconds=20.0
)
"""Long enough for a busy machine: a leader begins at once when all are there."""
HASTY = replace(LIMITS, matchmaking_seconds=4.0, grace_seconds=1.5)
"""For those who wait in vain."""
MARGIN_SECONDS = 6.0
_runs = itertools.count()


@dataclass
class Seeker:
    """One peer: its matchmaker, the epoch it is at, and what it heard."""

    p2p: P2P
    maker: Matchmaker
    name: str
    epoch: int = EPOCH
    is_client: bool = False
    knocks: list[Key] = field(default_factory=list)


@dataclass
class Camp:
    """Peers of one run, best leader first."""

    seekers: list[Seeker]

    def names(self, *numbers: int) -> list[str]:
        return [self.seekers[number].name for number in numbers or range(len(self.seekers))]

    async def find(
        self, number: int, *, after: float = 0.0, knows: Collection[str] | None = None,
        expects: Mapping[str, bool] | None = None, limits: RoundLimits = LIMITS, kind: Kind = "gradients",
    ) -> Group | NoGroup | Behind:  # fmt: skip
        """What one of them finds. It knows all full peers, and expects everyone, unless a test says otherwise."""
        await asyncio.sleep(after)  # sleep: is what the tests are about
        seeker = self.seekers[number]
        others = [other for other in self.seekers if other is not seeker]
        full = [other.name for other in others if not other.is_client]
        everyone = {other.name: not other.is_client for other in others}
        try:
            return await seeker.maker.find(
                replace(TICKET, kind=kind, epoch=seeker.epoch, can_reduce=not seeker.is_client),
                candidates=lambda: full if knows is None else knows,
                expected=lambda: everyone if expects is None else expects,
                limits=limits,
            )
        except (NoGroup, Behind) as exc:
            return exc

    def end_round(self, *numbers: int, epoch: int) -> None:
        """They have stepped."""
        for seeker in (self.seekers[number] for number in numbers):
            seeker.maker.done()
            seeker.epoch = epoch


TICKET = Ticket(
    kind="gradients", epoch=EPOCH, schema=SCHEMA, is_sender=True, can_reduce=True, bandwidth=None, sketch=b""
)


@asynccontextmanager
async def camp(
    net: Loopback, *roles: type[Matchmaker] | None, count: int = 0, clients: Collection[int] = (),
    kind: Kind = "gradients",
) -> AsyncIterator[Camp]:  # fmt: skip
    """`roles`: the matchmaker that each of the best-ranked peers has; None: a daemon that knows nothing of this run."""
    count = max(count, len(roles))
    while len(net.daemons) < count:
        net.daemons.append(await start_daemon(net.daemons[:1]))
    run_id = f"camp{next(_runs)}"
    key: Key = (kind, EPOCH)
    daemons = sorted(net.daemons[:count], key=lambda p2p: rank_of(str(p2p.peer_id.to_base58()), run_id=run_id, key=key))
    found = Camp([])
    for number, p2p in enumerate(daemons):
        role = roles[number] if number < len(roles) else Matchmaker
        found.seekers.append(_seeker(p2p, role or Matchmaker, run_id=run_id, is_client=number in clients))
        if number >= len(roles) or role is not None:
            await found.seekers[-1].maker.serve(p2p, is_reachable=number not in clients)
    try:
        yield found
    finally:
        for number, seeker in enumerate(found.seekers):
            seeker.maker.leave()
            if number not in clients and not (number < len(roles) and roles[number] is None):
                await seeker.maker.remove_p2p_handlers(seeker.p2p, namespace=run_id)


def _seeker(p2p: P2P, role: type[Matchmaker], *, run_id: str, is_client: bool) -> Seeker:
    name = str(p2p.peer_id.to_base58())
    seeker: Seeker
    maker = role(
        run_id=run_id, schema=SCHEMA, epoch=lambda: seeker.epoch, on_knock=lambda key: seeker.knocks.append(key),
        form=form,
    )  # fmt: skip
    seeker = Seeker(p2p=p2p, maker=maker, name=name, is_client=is_client)
    return seeker


def form(key: Key, tickets: Mapping[str, Ticket]) -> Group:
    reducers = sum(ticket.can_reduce for ticket in tickets.values())
    members = tuple(
        Member(peer_id=peer, is_sender=True, fraction=ticket.can_reduce / reducers)
        for peer, ticket in sorted(tickets.items())
    )
    return Group(group_id=secrets.token_bytes(16), kind=key[0], epoch=key[1], members=members, limits=LIMITS)


def members_of(found: Group | NoGroup | Behind) -> set[str]:
    assert isinstance(found, Group), repr(found)
    return {member.peer_id for member in found.members}


def assert_one_group(found: Sequence[Group | NoGroup | Behind], *, of: Collection[str]) -> None:
    assert all(members_of(group) == set(of) for group in found), found
    assert len({group.group_id for group in found if isinstance(group, Group)}) == 1, "one group, not several alike"


class Watch:
    def __init__(self) -> None:
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started
