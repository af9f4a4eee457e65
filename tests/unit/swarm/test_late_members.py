"""One group, however unlike the starts: members come seconds apart, and the leader waits for those who are expected.

In stock hivemind they fall into pieces: `tests/integration/test_pitfalls_rounds.py`, P9.
"""

import asyncio
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest

from calm_ray.swarm.gathering import Key
from calm_ray.swarm.group import Group, Member
from calm_ray.swarm.matchmaking import Matchmaker
from calm_ray.swarm.messages import Ticket
from tests.unit.swarm.loopback import LIMITS, Loopback, loopback, start_daemon

# hivemind leaves sockets and subprocess transports to the garbage collector, after their loop was closed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:loop is closed:ResourceWarning"),
]

EPOCH = 7
DELAYS = (0.0, 0.3, 1.5, 2.5)
"""Seconds between the first member's start and each one's."""


@pytest.fixture(scope="module")
def net() -> Iterator[Loopback]:
    with loopback() as found:
        yield found


def form(key: Key, tickets: Mapping[str, Ticket]) -> Group:
    members = tuple(Member(peer_id=p, is_sender=True, fraction=1 / len(tickets)) for p in sorted(tickets))
    return Group(group_id=secrets.token_bytes(16), kind=key[0], epoch=key[1], members=members, limits=LIMITS)


def test_members_that_start_seconds_apart_are_one_group(net: Loopback) -> None:
    ticket = Ticket(
        kind="gradients", epoch=EPOCH, schema=b"same", is_sender=True, can_reduce=True, bandwidth=None, sketch=b""
    )
    limits = replace(LIMITS, request_seconds=2.0, matchmaking_seconds=20.0, grace_seconds=5.0)

    async def test() -> None:
        while len(net.daemons) < len(DELAYS):
            net.daemons.append(await start_daemon(net.daemons[:1]))
        peers = [str(p2p.peer_id.to_base58()) for p2p in net.daemons]
        makers = [
            Matchmaker(run_id="late", schema=b"same", epoch=lambda: EPOCH, on_knock=lambda key: None, form=form)
            for _ in DELAYS
        ]

        async def find(number: int) -> Group:
            await asyncio.sleep(DELAYS[number])  # sleep: is what the test is about
            return await makers[number].find(
                ticket, candidates=lambda: peers, expected=lambda: dict.fromkeys(set(peers) - {peers[number]}, True),
                limits=limits,
            )  # fmt: skip

        for maker, p2p in zip(makers, net.daemons, strict=True):
            await maker.serve(p2p, is_reachable=True)
        groups = await asyncio.gather(*(find(number) for number in range(len(DELAYS))))
        assert len({group.group_id for group in groups}) == 1
        assert {member.peer_id for member in groups[0].members} == set(peers)

    net.run(test())
