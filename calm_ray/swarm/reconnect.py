"""A peer that lost everybody finds the swarm again, without a new process.

hivemind's node drops whoever does not answer from its routing table, and asks nobody in again: after a minute without
a network it is a swarm of its own, for good. Here the table is watched; once it is empty, the peers that we knew are
dialled anew, and entered with a ping.
"""

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from hivemind.dht import DHT
from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P, PeerID
from hivemind.utils.multiaddr import Multiaddr

from calm_ray.errors import SwarmUnreachable
from calm_ray.swarm.addresses import live_addresses, parse_address
from calm_ray.swarm.node import Swarm

logger = logging.getLogger(__name__)

DIAL_SECONDS = 10.0
PING_SECONDS = 10.0
PROBE_SECONDS = 2.0
MAX_DIALLED = 40


def num_known_nodes(swarm: Swarm) -> int:
    """Of other DHT nodes in our routing table. SwarmUnreachable if our own DHT process does not answer."""
    return int(swarm.run_in_dht(_count))


def reconnect(swarm: Swarm, addresses: Sequence[str]) -> int:
    """Dial those of `addresses` that accept connections; how many nodes we know afterwards."""
    try:
        live = live_addresses(addresses[:MAX_DIALLED], timeout_seconds=PROBE_SECONDS) if addresses else []
    except SwarmUnreachable:
        return 0
    others = [a for a in map(parse_address, live) if a.peer_id and a.peer_id != swarm.peer_id]
    swarm.call(partial(_dial, addresses=[a.text for a in others]), timeout_seconds=2 * DIAL_SECONDS)
    return int(swarm.run_in_dht(partial(_ping, peer_ids=sorted({a.peer_id for a in others}))))


async def _dial(p2p: P2P, *, addresses: Sequence[str]) -> None:
    async def dial(address: str) -> None:
        try:
            async with asyncio.timeout(DIAL_SECONDS):
                peer_id = PeerID.from_base58(parse_address(address).peer_id)
                await p2p._client.connect(peer_id, [Multiaddr(address.partition("/p2p/")[0])])
        except Exception as exc:  # noqa: BLE001  whatever it is, the others may answer
            logger.info("reconnect address=%s problem=%r", address, exc)

    await asyncio.gather(*map(dial, addresses))


async def _count(_dht: DHT, node: DHTNode) -> int:
    return len(node.protocol.routing_table.uid_to_peer_id)


async def _ping(dht: DHT, node: DHTNode, *, peer_ids: Sequence[str]) -> int:
    """In the DHT's process: whoever answers enters the routing table."""
    calls = [node.protocol.call_ping(PeerID.from_base58(peer_id)) for peer_id in peer_ids]
    try:
        async with asyncio.timeout(PING_SECONDS):
            await asyncio.gather(*calls, return_exceptions=True)
    except TimeoutError:
        pass
    return await _count(dht, node)
