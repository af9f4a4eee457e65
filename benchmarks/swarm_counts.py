"""Count what a peer asks of others, in all of its processes: calls, messages and bytes by kind of call; DHT reads.

hivemind's DHT runs in a forked process, so the totals live in shared memory, and the counting is put into hivemind's
classes before they are forked. What a peer answers is what others ask: over a whole swarm both sums are equal, so each
message is counted once, at its caller. Bytes are those of the messages, without libp2p's framing and encryption.
"""

import multiprocessing
from collections.abc import AsyncIterator
from typing import Any

from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P

from calm_ray.swarm import exchange_collect, exchange_repair

KINDS = ("find", "store", "ping", "join_round", "exchange", "parts", "download_state", "other")
"""The first three are the DHT's, the fourth matchmaking's. `exchange` is the all-reduce; its bytes are in the results
of the rounds."""
MEASURES = ("calls", "messages", "bytes")
DHT_MEASURES = ("reads", "records_read", "writes")
SLOTS = tuple(f"{kind}_{measure}" for kind in KINDS for measure in MEASURES) + DHT_MEASURES
_INDEX = {slot: index for index, slot in enumerate(SLOTS)}


class WireCounter:
    """Install it once, in a peer's own process, before anything of hivemind is started."""

    def __init__(self) -> None:
        self._totals = multiprocessing.Array("d", len(SLOTS))

    def read(self) -> dict[str, float]:
        """Running totals by slot."""
        with self._totals.get_lock():
            return dict(zip(SLOTS, self._totals[:], strict=True))

    def add(self, slot: str, number: float = 1.0) -> None:
        with self._totals.get_lock():
            self._totals[_INDEX[slot]] += number

    def install(self) -> None:
        self._count_calls()
        self._count_streams()
        self._count_dht()

    def _count_calls(self) -> None:
        stock = P2P._call_unary_protobuf_handler

        async def call(p2p: P2P, peer_id: Any, handle_name: str, request: Any, output_type: Any) -> Any:
            kind = kind_of(handle_name)
            self.add(f"{kind}_calls")
            self.add(f"{kind}_messages")
            self.add(f"{kind}_bytes", request.ByteSize())
            response: Any = await stock(p2p, peer_id, handle_name, request, output_type)
            self.add(f"{kind}_messages")
            self.add(f"{kind}_bytes", response.ByteSize())
            return response

        P2P._call_unary_protobuf_handler = call

    def _count_streams(self) -> None:
        """Those with messages of hivemind's format, and the raw ones of our own wire."""
        stock_iterate, stock_open = P2P._iterate_protobuf_stream_handler, P2P.call_binary_stream_handler

        async def counted(stream: Any, kind: str) -> AsyncIterator[Any]:
            async for message in stream:
                self.add(f"{kind}_messages")
                self.add(f"{kind}_bytes", message.ByteSize())
                yield message

        async def iterate(p2p: P2P, peer_id: Any, name: str, requests: Any, output_type: Any) -> Any:
            kind = kind_of(name)
            return counted(await stock_iterate(p2p, peer_id, name, counted(requests, kind), output_type), kind)

        async def open_stream(p2p: P2P, peer_id: Any, handler_name: str) -> Any:
            self.add(f"{kind_of(handler_name)}_calls")
            return await stock_open(p2p, peer_id, handler_name)

        P2P._iterate_protobuf_stream_handler, P2P.call_binary_stream_handler = iterate, open_stream
        for module in (exchange_collect, exchange_repair):
            self._count_raw_streams(module)

    def _count_raw_streams(self, module: Any) -> None:
        stock = module.open_stream

        def open_stream(p2p: P2P, peer_id: str, protocol: str, **options: Any) -> Any:
            self.add(f"{kind_of(protocol)}_calls")
            return stock(p2p, peer_id, protocol, **options)

        module.open_stream = open_stream

    def _count_dht(self) -> None:
        stock_get, stock_store = DHTNode.get, DHTNode.store

        async def get(node: DHTNode, *args: Any, **kwargs: Any) -> Any:
            found: Any = await stock_get(node, *args, **kwargs)
            self.add("reads")
            self.add("records_read", _num_records(found))
            return found

        async def store(node: DHTNode, *args: Any, **kwargs: Any) -> Any:
            self.add("writes")
            return await stock_store(node, *args, **kwargs)

        DHTNode.get, DHTNode.store = get, store


def kind_of(handle_name: str) -> str:
    """`DHTProtocol.rpc_find` -> `find`, `run::calm-1.exchange` -> `exchange`."""
    name = handle_name.rpartition(".")[2].removeprefix("rpc_")
    name = "join_round" if name == "call_round" else name  # the other half of matchmaking
    return name if name in KINDS else "other"


def _num_records(found: Any) -> int:
    if found is None:
        return 0
    return len(found.value) if isinstance(found.value, dict) else 1
