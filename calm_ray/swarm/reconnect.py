"""A peer that lost everybody finds the swarm again, without a new process.

hivemind's node drops whoever does not answer from its routing table, and asks nobody in again: after a minute without
a network it is a swarm of its own, for good. Here the table is watched; once it is empty, the peers that we knew are
dialled anew, and entered with a ping.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from functools import partial

from hivemind.dht import DHT
from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P, PeerID

from calm_ray.errors import SwarmUnreachable
from calm_ray.swarm.addresses import live_addresses, peer_at
from calm_ray.swarm.diagnose import CONNECT_SECONDS, connect
from calm_ray.swarm.node import Swarm

logger = logging.getLogger(__name__)

PING_SECONDS = 10.0
PROBE_SECONDS = 2.0
MAX_DIALLED = 40


def reconnect(swarm: Swarm, addresses: Sequence[str]) -> int:
    """Dial those of `addresses` that accept connections; how many nodes we know afterwards."""
    wanted = [text for text in dict.fromkeys(addresses) if peer_at(text) not in ("", swarm.peer_id)][:MAX_DIALLED]
    with contextlib.suppress(SwarmUnreachable):
        live = live_addresses(wanted, timeout_seconds=PROBE_SECONDS) if wanted else []
        with contextlib.suppress(TimeoutError):
            swarm.call(partial(_dial, addresses=live), timeout_seconds=2 * CONNECT_SECONDS)
        swarm.run_in_dht(partial(_ping, peer_ids=sorted({peer_at(text) for text in live})))
    return len(swarm.routed_peers())


async def _dial(p2p: P2P, *, addresses: Sequence[str]) -> None:
    for address, problem in zip(addresses, await asyncio.gather(*(connect(p2p, a) for a in addresses)), strict=True):
        if problem:
            logger.info("reconnect address=%s problem=%r", address, problem)


async def _ping(_dht: DHT, node: DHTNode, *, peer_ids: Sequence[str]) -> None:
    """In the DHT's process: whoever answers enters the routing table."""
    calls = [node.protocol.call_ping(PeerID.from_base58(peer_id)) for peer_id in peer_ids]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PING_SECONDS):
            await asyncio.gather(*calls, return_exceptions=True)
