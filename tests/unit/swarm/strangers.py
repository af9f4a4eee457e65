"""Strangers: daemons without our code, for whom a test speaks the protocol by hand, beside two honest trainers."""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from calm_ray.swarm.exchange_frames import PEER_FAULTS, FrameKind, Stream, Traffic, open_stream
from calm_ray.swarm.exchange_messages import Opening
from calm_ray.swarm.group import Group
from calm_ray.swarm.part_codecs import CODECS
from calm_ray.swarm.verdict import RoundResult
from tests.unit.swarm.loopback import (
    LIMITS,
    Loopback,
    Peer,
    group_of,
    random_vector,
    run_all,
    weighted_mean,
)

PART = CODECS["none"].part_elements
NUM_ELEMENTS = 8 * PART
"""Four parts for each of two reducers."""
STRICT = replace(LIMITS, request_seconds=1.0, chunk_seconds=1.5, round_seconds=20.0)
MARGIN_SECONDS = 1.0
"""A round may last this much longer than its limit: hashing, and a busy machine."""

VECTORS = [random_vector(seed, NUM_ELEMENTS) for seed in range(3)]
WEIGHTS = [1.0, 2.0, 4.0]
HONEST = weighted_mean(VECTORS[:2], WEIGHTS[:2])
EVERYONE = weighted_mean(VECTORS, WEIGHTS)


Frames = Sequence[tuple[FrameKind, bytes]]


@dataclass
class Answer:
    """What a reducer sent to a stranger."""

    kinds: list[FrameKind] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)

    def averages(self) -> list[bytes]:
        return [p for k, p in zip(self.kinds, self.payloads, strict=True) if k == FrameKind.PART]


def opening_of(group: Group, **changes: Any) -> bytes:
    usual = {
        "group_id": group.group_id.hex(), "kind": group.kind, "epoch": group.epoch, "weight": WEIGHTS[2],
        "num_elements": NUM_ELEMENTS, "codec": "none", "slice": 0,
    }  # fmt: skip
    return Opening(**{**usual, **changes}).encode()


def parts_for(reducer: int) -> list[bytes]:
    """The stranger's honest parts for one of two reducers with half of the vector each."""
    return [part.numpy().tobytes() for part in by_slice(VECTORS[2])[reducer]]


def by_slice(vector: torch.Tensor) -> torch.Tensor:
    """(NUM_ELEMENTS,) as (2 slices, 4 parts, PART): two reducers with equal fractions get every other part."""
    return vector.reshape(4, 2, PART).transpose(0, 1)


async def speak(stranger: Peer, reducer: Peer, *, opening: bytes, frames: Frames = (), raw: bytes = b"") -> Answer:
    """Open a stream, send all this, and listen until the reducer has no more to say."""
    answer = Answer()
    protocol = f"{stranger.namespace}::calm-1.exchange"
    async with open_stream(stranger.p2p, reducer.name, protocol, timeout_seconds=10.0, traffic=Traffic()) as stream:
        await stream.send(FrameKind.OPENING, opening)
        sending = asyncio.create_task(_send(stream, frames, raw))
        try:
            while not answer.kinds or answer.kinds[-1] not in (FrameKind.ENDING, FrameKind.FAILURE):
                kind, payload = await stream.receive()
                answer.kinds.append(kind)
                answer.payloads.append(payload)
        except PEER_FAULTS:
            pass
        finally:
            sending.cancel()
    return answer


async def listen(stream: Stream) -> None:
    """Hear everything, and confirm what must be, until the other side hangs up."""
    with contextlib.suppress(*PEER_FAULTS):
        while True:
            await stream.receive()


async def _send(stream: Stream, frames: Frames, raw: bytes) -> None:
    for kind, payload in frames:
        await stream.send(kind, payload)
    if raw:
        stream._writer.write(raw)


async def two_beside(
    net: Loopback, *, openings: dict[str, Any], frames: Sequence[Frames], raw: bytes = b"", is_member: bool = True,
) -> tuple[list[RoundResult], list[Answer], str]:  # fmt: skip
    """A round of two honest trainers and a stranger who says `frames[r]` to reducer r; and the stranger's name."""
    async with net.peers(3, num_elements=NUM_ELEMENTS, strangers=[2]) as members:
        everyone = group_of(members, fractions=[0.5, 0.5, 0.0], senders=[0, 1, 2], limits=STRICT)
        group = everyone if is_member else replace(everyone, members=everyone.members[:2])
        honest = asyncio.create_task(run_all(members[:2], group, vectors=VECTORS[:2], weights=WEIGHTS[:2]))
        answers = await asyncio.gather(
            *(
                speak(members[2], members[r], opening=opening_of(group, slice=r, **openings), frames=frames[r], raw=raw)
                for r in range(2)
            )
        )
        return await honest, answers, members[2].name


def frames_of(*payloads: bytes) -> Frames:
    return [(FrameKind.PART, payload) for payload in payloads]


def altered(index: int, value: float) -> bytes:
    part = np.frombuffer(parts_for(0)[1], dtype=np.float32).copy()
    part[index] = value
    return part.tobytes()


def assert_same(results: Sequence[RoundResult]) -> torch.Tensor:
    assert all(result.is_true for result in results), results
    assert len({result.digest for result in results}) == 1
    assert results[0].average is not None
    return results[0].average
