"""One host of `benchmarks.averaging`: takes rounds from its standard input, line by line, and prints what it measured.

Its codec counts the processor time of every call, which is what the benchmark's limit is made of.
"""

import asyncio
import json
import resource
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from hivemind.p2p import P2P
from pydantic import BaseModel

from calm_ray.swarm.exchange import Exchange
from calm_ray.swarm.group import Group, Member
from calm_ray.swarm.limits import RoundLimits
from calm_ray.swarm.matchmaking import Matchmaker
from calm_ray.swarm.messages import Ticket
from calm_ray.swarm.part_codecs import CODECS, PartCodec, Vector
from calm_ray.swarm.shares import balance

RUN_ID = "averaging"
SCHEMA = b"\0" * 32
LIMITS = RoundLimits(
    request_seconds=10.0, matchmaking_seconds=60.0, grace_seconds=30.0, chunk_seconds=30.0, round_seconds=300.0
)
TILE_ELEMENTS = 1_000_000
START_SECONDS = 60.0


class HostSpec(BaseModel):
    """What a host is told when it starts."""

    number: int
    address: str
    bootstrap: list[str]
    num_elements: int
    bandwidth: float
    """Bytes/s in each direction."""
    is_sender: bool


class RoundSpec(BaseModel):
    """One round to take part in."""

    epoch: int
    codec: str
    is_weighted: bool
    everyone: list[str]
    """Peer ids, all of which are waited for."""


@dataclass
class TimedCodec:
    """A codec that adds up the processor time that it takes."""

    codec: PartCodec
    seconds: float = 0.0
    name: str = field(init=False)
    part_elements: int = field(init=False)
    is_biased: bool = field(init=False)

    def __post_init__(self) -> None:
        self.name, self.part_elements = self.codec.name, self.codec.part_elements
        self.is_biased, self.encoded_bytes = self.codec.is_biased, self.codec.encoded_bytes

    def encode(self, values: Vector) -> bytes:
        started = time.thread_time()
        payload = self.codec.encode(values)
        self.seconds += time.thread_time() - started
        return payload

    def decode(self, payload: bytes, num_elements: int) -> Vector:
        started = time.thread_time()
        values = self.codec.decode(payload, num_elements)
        self.seconds += time.thread_time() - started
        return values


class Host:
    """A peer without training: a libp2p daemon, a matchmaker and an exchange."""

    def __init__(self, spec: HostSpec) -> None:
        self.spec = spec
        self.round: RoundSpec | None = None
        noise = torch.randn(TILE_ELEMENTS, generator=torch.Generator().manual_seed(0))
        self.noise = noise.repeat(-(-spec.num_elements // TILE_ELEMENTS))[: spec.num_elements]
        # As a trainer's: a vector that is there already when the group is formed, and parameters to apply to.
        self.vector = self.noise * (1 + spec.number) if spec.is_sender else None
        self.applied = torch.ones(spec.num_elements)

    async def run(self) -> None:
        spec = self.spec
        async with asyncio.timeout(START_SECONDS):
            p2p = await P2P.create(
                initial_peers=spec.bootstrap or None,
                host_maddrs=[spec.address],
                auto_nat=False,
                nat_port_map=False,
                startup_timeout=START_SECONDS,
            )
        self.name = p2p.peer_id.to_base58()
        assert p2p._child is not None
        self.daemon = psutil.Process(p2p._child.pid)
        exchange = Exchange(num_elements={"gradients": spec.num_elements})
        await exchange.serve(p2p, namespace=RUN_ID)
        matchmaker = Matchmaker(
            run_id=RUN_ID,
            schema=SCHEMA,
            epoch=lambda: self.round.epoch if self.round else 0,
            form=self._form,
            on_knock=lambda key: None,
        )
        await matchmaker.serve(p2p, is_reachable=True)
        addresses = [str(address) for address in await p2p.get_visible_maddrs()]
        say(peer_id=self.name, addresses=addresses)
        while line := await asyncio.to_thread(sys.stdin.readline):
            self.round = RoundSpec.model_validate_json(line)
            say(**await self._take_part(exchange, matchmaker, self.round))
        await exchange.close()
        await p2p.shutdown()

    async def _take_part(self, exchange: Exchange, matchmaker: Matchmaker, spec: RoundSpec) -> dict[str, Any]:
        ticket = Ticket(
            kind="gradients", epoch=spec.epoch, schema=SCHEMA, is_sender=self.spec.is_sender, can_reduce=True,
            bandwidth=self.spec.bandwidth, sketch=b"",
        )  # fmt: skip
        others = [peer for peer in spec.everyone if peer != self.name]
        started = time.monotonic()
        group = await matchmaker.find(
            ticket, candidates=lambda: others, expected=lambda: dict.fromkeys(others, True), limits=LIMITS
        )
        formed = time.monotonic()
        codec = TimedCodec(CODECS[spec.codec])
        used, daemon_used = _cpu_seconds(), sum(self.daemon.cpu_times()[:2])
        CODECS[spec.codec] = codec
        try:
            result = await exchange.run(
                group, vector=self.vector, weight=1.0 if self.spec.is_sender else 0.0, codec=spec.codec, max_weight=10.0
            )
        finally:
            CODECS[spec.codec] = codec.codec
        if result.average is not None:
            self.applied.copy_(result.average)
        ended = time.monotonic()
        matchmaker.done()
        return {
            "outcome": result.outcome,
            "detail": result.detail,
            "digest": result.digest,
            "group_size": len(group.members),
            "fractions": {member.peer_id: member.fraction for member in group.members},
            "started": started,
            "formed": formed,
            "ended": ended,
            "codec_seconds": codec.seconds,
            "cpu_seconds": _cpu_seconds() - used,
            "daemon_seconds": sum(self.daemon.cpu_times()[:2]) - daemon_used,
            "bytes_sent": result.bytes_sent,
            "bytes_received": result.bytes_received,
            "error": self._error(result.average, num_senders=result.num_senders),
        }

    def _error(self, average: torch.Tensor | None, *, num_senders: int) -> float:
        """Largest difference to the true mean of `noise * (1 + number)`, relative to its largest value."""
        if average is None:
            return float("nan")
        mean = self.noise * ((1 + num_senders) / 2)
        return float((average - mean).abs().max() / mean.abs().max())

    def _form(self, key: Any, tickets: Mapping[str, Ticket]) -> Group:
        assert self.round is not None
        peers = sorted(tickets)
        senders = [tickets[peer].is_sender for peer in peers]
        bandwidths = [tickets[peer].bandwidth if self.round.is_weighted else None for peer in peers]
        fractions = balance(bandwidths, is_sender=senders, can_reduce=[True] * len(peers))
        return Group(
            group_id=secrets.token_bytes(16),
            kind=key[0],
            epoch=key[1],
            members=tuple(
                Member(peer_id=peer, is_sender=sends, fraction=fraction)
                for peer, sends, fraction in zip(peers, senders, fractions, strict=True)
            ),
            limits=LIMITS,
        )


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    torch.set_num_threads(1)
    asyncio.run(Host(HostSpec.model_validate_json(sys.argv[1])).run())
