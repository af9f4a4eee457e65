"""What auxiliary peers do for newcomers, by RPC: give the bundle and the time, and dial back to tell who is reachable.

Messages are protobuf's own StringValue and BytesValue, so that there is no schema to compile. The dial-back connects a
fresh libp2p daemon to the address that *we observed*, never to one that the caller names: nobody can point us at a
third party. One at a time, and seldom for one address.
"""

import asyncio
import json
import logging
import time
from collections import OrderedDict
from pathlib import Path

# hivemind tells a stream by typing's alias, and only by that.
from typing import AsyncIterator  # noqa: UP035

from google.protobuf.wrappers_pb2 import BytesValue, StringValue
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError

from calm_ray.bundle import MANIFEST, SIGNATURE, open_bundle
from calm_ray.swarm.addresses import parse_address, peer_at

logger = logging.getLogger(__name__)

CHUNK_BYTES = 256 * 1024
MAX_CONCURRENT_DOWNLOADS = 8
"""More newcomers than this wait their turn: the desk shares its uplink with averaging."""
DIAL_TIMEOUT_SECONDS = 8.0
DIAL_PAUSE_SECONDS = 5.0
"""At most one dial-back per caller's host in this time. Each costs a daemon of about 60 MB for a second."""
MAX_HOSTS, MAX_REMEMBERED_HOSTS = 3, 1024


class Desk(ServicerBase):
    """Serve a verified bundle folder. Parts are looked up in the manifest, so no path outside it can be asked for."""

    def __init__(self, bundle: Path) -> None:
        self._bundle = bundle
        manifest, _ = open_bundle(bundle)
        self._parts = frozenset(manifest.parts) | {MANIFEST, SIGNATURE}
        self._downloads = asyncio.Semaphore(MAX_CONCURRENT_DOWNLOADS)
        self._dials = asyncio.Lock()
        self._dialled_at: OrderedDict[str, float] = OrderedDict()
        self._p2p: P2P | None = None

    async def serve(self, p2p: P2P, *, run_id: str) -> None:
        self._p2p = p2p
        await self.add_p2p_handlers(p2p, namespace=run_id)

    async def rpc_part(
        self,
        requests: AsyncIterator[StringValue],
        context: P2PContext,  # noqa: ARG002  hivemind's signature
    ) -> AsyncIterator[BytesValue]:
        """Stream each part that is asked for, then an empty message; an unknown name gives only that.

        The caller hangs up, never we: when a handler ends, libp2p's daemon closes the stream, stumbles over its other
        half and resets it, and what was still under way is lost (one download in some hundreds on an idle machine).
        """
        async for request in requests:
            if request.value in self._parts:
                async with self._downloads:
                    with (self._bundle / request.value).open("rb") as file:
                        while chunk := file.read(CHUNK_BYTES):
                            yield BytesValue(value=chunk)
            yield BytesValue()

    async def rpc_time(self, request: StringValue, context: P2PContext) -> StringValue:  # noqa: ARG002
        """This machine's clock in Unix seconds, for `clock_offset.py`."""
        return StringValue(value=f"{time.time():.6f}")

    async def rpc_dial_back(self, request: StringValue, context: P2PContext) -> StringValue:
        """Answer {"host": observed host, "is_reachable": bool, "reason": str} for the TCP port in `request`."""
        answer = await self._dial_back(request.value, context.remote_id)
        logger.info("dial_back peer=%s %s", context.remote_id, answer)
        return StringValue(value=json.dumps(answer))

    async def _dial_back(self, port: str, caller: PeerID) -> dict[str, object]:
        if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            return {"host": "", "is_reachable": False, "reason": "not a port"}
        hosts = await self._observed_hosts(caller)
        if not hosts:
            return {"host": "", "is_reachable": False, "reason": "not connected directly"}
        now = time.monotonic()
        last = max(self._dialled_at.get(host, float("-inf")) for host in hosts)
        if now - last < DIAL_PAUSE_SECONDS or self._dials.locked():
            return {"host": hosts[0], "is_reachable": False, "reason": "busy"}
        self._dialled_at.update(dict.fromkeys(hosts, now))
        while len(self._dialled_at) > MAX_REMEMBERED_HOSTS:
            self._dialled_at.popitem(last=False)
        async with self._dials:
            tries = (_try_to_reach(f"/{_family(host)}/{host}/tcp/{port}/p2p/{caller}") for host in hosts)
            found = list(zip(await asyncio.gather(*tries), hosts, strict=True))
        reason, host = min(found, key=lambda answer: bool(answer[0]))
        return {"host": host, "is_reachable": not reason, "reason": reason}

    async def _observed_hosts(self, caller: PeerID) -> list[str]:
        """Of one that has moved, the connection from where it was lasts for some time beside the new one."""
        assert self._p2p is not None
        seen = [
            f"{a}/p2p/{caller}" for peer in await self._p2p.list_peers() if peer.peer_id == caller for a in peer.addrs
        ]
        return list(dict.fromkeys(parse_address(text).host for text in seen if peer_at(text)))[:MAX_HOSTS]


def _family(host: str) -> str:
    return "ip6" if ":" in host else "ip4"


async def _try_to_reach(address: str) -> str:
    """Connect a new, anonymous daemon to `address`, peer id included; the reason if it fails, else an empty string."""
    try:
        probe = await P2P.create(
            initial_peers=[address], dht_mode="client", auto_nat=False, nat_port_map=False, use_relay=False,
            no_listen=True, startup_timeout=DIAL_TIMEOUT_SECONDS,
        )  # fmt: skip
    except P2PDaemonError:
        return "nobody answers at the observed address"
    await probe.shutdown()
    return ""
