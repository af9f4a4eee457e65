"""One round of one member, from the group's beginning to the verdict."""

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from hivemind.p2p import P2P

from calm_ray.swarm.exchange_collect import Collection, Courier
from calm_ray.swarm.exchange_frames import Stream, Traffic
from calm_ray.swarm.exchange_messages import Opening, PartsRequest
from calm_ray.swarm.exchange_reduce import ReducerDesk, refuse
from calm_ray.swarm.exchange_repair import Kept, Repair
from calm_ray.swarm.group import Group
from calm_ray.swarm.part_codecs import MAX_VALUE, PartCodec, Vector, is_sane
from calm_ray.swarm.parts import Layout
from calm_ray.swarm.reducer import Reduction
from calm_ray.swarm.verdict import Outcome, RoundResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What this peer brings: `vector`, shape (num_elements,), or None for a reader; and why, if it had more."""

    vector: Vector | None
    weight: float
    objection: str = ""


def check_contribution(vector: torch.Tensor | None, *, weight: float, max_weight: float) -> Contribution:
    """Stop what is not finite, or absurd, before it is sent: then we only read. Takes a pass over the vector."""
    if vector is None or weight == 0:
        return Contribution(vector=None, weight=0.0)
    if not (math.isfinite(weight) and 0 < weight <= max_weight):
        return Contribution(
            vector=None, weight=0.0, objection=f"own weight {weight:g}, expected at most {max_weight:g}"
        )
    values = vector.detach().numpy()
    if not is_sane(values):
        return Contribution(
            vector=None, weight=0.0, objection=f"own vector: a value is not finite, or larger than {MAX_VALUE:.0f}"
        )
    return Contribution(vector=values, weight=weight)


@dataclass(frozen=True, kw_only=True)
class Protocols:
    """Names of the two libp2p protocols of a run."""

    exchange: str
    parts: str


@dataclass
class Round:
    """`start` on the loop, then `run`; `serve` others from then until they hang up, even after `run` has returned."""

    p2p: P2P
    group: Group
    own_id: str
    protocols: Protocols
    contribution: Contribution
    codec: PartCodec
    max_weight: float
    num_elements: int
    carried: Vector | None
    """What our reductions still owe the average, times its weight, shape (num_elements,)."""
    traffic: Traffic
    hashing: Executor
    """A single thread."""
    handlers: set["asyncio.Task[None]"] = field(default_factory=set)

    def start(self) -> None:
        members, loop = self.group.members, asyncio.get_running_loop()
        self.began = loop.time()
        self.deadline = self.began + self.group.limits.round_seconds
        self.layout = Layout.from_fractions(
            [member.fraction for member in members],
            num_elements=self.num_elements,
            part_elements=self.codec.part_elements,
        )
        self.collection = Collection(self.layout, self.codec, hashing=self.hashing)
        self.residual = (
            np.zeros(self.num_elements, dtype=np.float32)
            if self.codec.is_biased and self.contribution.vector is not None
            else None
        )
        self.place = [member.peer_id for member in members].index(self.own_id)
        self.others = {member.peer_id for member in members} - {self.own_id}
        self.weights: dict[str, float] = {}
        own = [number for number in self.layout.slices if self.layout.reducers[number] == self.place]
        self.desks = {number: self._desk(number) for number in own}
        self.work = [asyncio.create_task(desk.work()) for desk in self.desks.values()]
        self.couriers = [self._courier(number) for number in self.layout.slices if number not in self.desks]

    def opening(self, number: int, weight: float) -> Opening:
        """What a member who brings `weight` says to the reducer of a slice."""
        return Opening(
            group_id=self.group.group_id.hex(),
            kind=self.group.kind,
            epoch=self.group.epoch,
            weight=weight,
            num_elements=self.num_elements,
            codec=self.codec.name,
            slice=number,
        )

    async def run(self) -> RoundResult:
        """Bring, collect, repair, judge. Never longer than the round's time, and raises for no peer's fault."""
        is_late = False
        try:
            async with asyncio.timeout_at(self.deadline):
                await asyncio.gather(*(self._collect_from(courier) for courier in self.couriers))
                await self._finish_work()
        except TimeoutError:
            is_late = True
        return await self._judge(is_late=is_late)

    async def _finish_work(self) -> None:
        """Our slices go on being reduced for others when this wait ends early."""
        if self.work:
            done, _ = await asyncio.wait(self.work, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()

    async def serve(self, peer: str, opening: Opening, stream: Stream) -> None:
        """Reduce for one caller. One of PEER_FAULTS if it breaks off."""
        desk = self.desks.get(opening.slice)
        if peer not in self.others:
            await refuse(stream, "not in this group")
        elif desk is None:
            await refuse(stream, "I do not reduce this slice")
        elif opening.model_dump(exclude={"weight"}) != self.opening(opening.slice, 0.0).model_dump(exclude={"weight"}):
            self._refuse(peer, "its round differs from ours (kind, epoch, size or codec)")
            await refuse(stream, "your round differs from mine (kind, epoch, size or codec)")
        elif repr(self.weights.setdefault(peer, opening.weight)) != repr(opening.weight):  # a NaN is not itself
            self._refuse(peer, "it names more than one weight")
            await refuse(stream, "you name more than one weight")
        else:
            await desk.serve(peer, opening, stream)

    def kept(self, digest: str = "") -> Kept:
        return Kept(
            group_id=self.group.group_id.hex(), epoch=self.group.epoch, collection=self.collection, digest=digest
        )

    def is_served(self) -> bool:
        """Whether nobody needs us any more: all who came have hung up, and the others had time enough to come."""
        now, limits = asyncio.get_running_loop().time(), self.group.limits
        if now >= self.deadline:
            return True
        have_come = all(desk.served == self.others for desk in self.desks.values())
        return (have_come or now > self.began + limits.request_seconds + limits.chunk_seconds) and not self.handlers

    def release(self) -> None:
        """The verdict is out: let go of vectors, and keep only what others may still want."""
        self.couriers.clear()
        self.contribution = replace(self.contribution, vector=None)
        self.collection.release()
        self.residual = self.carried = None

    async def cancel(self) -> None:
        """End everything that this round still does."""
        tasks = [*self.handlers, *self.work]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _desk(self, number: int) -> ReducerDesk:
        parts = self.layout.parts_of(number)
        own, members = self.contribution.vector, self.group.members
        is_sender = members[self.place].is_sender and own is not None
        senders = {member.peer_id for member in members if member.is_sender} - {self.own_id}
        reduction = Reduction(
            lengths=[len(range(*self.layout.span(part))) for part in parts],
            senders=senders | {self.own_id} if is_sender else senders,
            codec=self.codec,
            max_weight=self.max_weight,
            carried=self._views(self.carried, parts) if self.carried is not None else None,
        )
        if is_sender and own is not None:
            reduction.contribute(self.own_id, self._views(own, parts), self.contribution.weight)
        return ReducerDesk(
            self.group,
            reduction,
            codec=self.codec,
            on_part=lambda index, payload, decoded: self.collection.keep(parts[index], payload, decoded),
            on_ban=self._ban,
        )

    def _views(self, vector: Vector, parts: Sequence[int]) -> list[Vector]:
        return [vector[slice(*self.layout.span(part))] for part in parts]

    def _ban(self, peer: str, reason: str) -> None:
        for desk in self.desks.values():
            desk.ban(peer, reason)

    def _refuse(self, peer: str, reason: str) -> None:
        for desk in self.desks.values():
            desk.refuse_sender(peer, reason)

    def _courier(self, number: int) -> Courier:
        return Courier(
            self.p2p,
            protocol=self.protocols.exchange,
            reducer=self.group.members[self.layout.reducers[number]].peer_id,
            opening=self.opening(number, self.contribution.weight),
            vector=self.contribution.vector,
            residual=self.residual,
            collection=self.collection,
            limits=self.group.limits,
            traffic=self.traffic,
        )

    async def _collect_from(self, courier: Courier) -> None:
        await courier.run()
        if courier.failure is not None and courier.failure.outcome != "failed":
            return  # nobody has what its reducer could not make
        if self.collection.missing(courier.number):
            repair = Repair(
                self.p2p,
                protocol=self.protocols.parts,
                request=PartsRequest(group_id=self.group.group_id.hex(), kind=self.group.kind, epoch=self.group.epoch),
                peers=self._likely_holders(self.layout.reducers[courier.number]),
                collection=self.collection,
                limits=self.group.limits,
                traffic=self.traffic,
            )
            await repair.run(courier.number)

    def _likely_holders(self, lost: int) -> list[str]:
        """The other members: those who can surely be called first, the reducer that we lost last."""
        places = [place for place in range(len(self.group.members)) if place != self.place]
        members = self.group.members
        places.sort(key=lambda place: (place == lost, -members[place].fraction))
        return [members[place].peer_id for place in places]

    async def _judge(self, *, is_late: bool) -> RoundResult:
        outcome, detail = self._outcome(is_late=is_late)
        average, digest = None, ""
        if outcome == "averaged":
            average = self.collection.average
            digest = await self.collection.digest()
        weights, banned = self._witnessed()
        return RoundResult(
            outcome=outcome,
            detail=detail,
            average=torch.from_numpy(average) if average is not None else None,
            digest=digest,
            group_size=len(self.group.members),
            num_senders=self.group.num_senders,
            weights=weights,
            total_weight=math.fsum(weights.values()),
            banned=banned,
            missing_fraction=self.collection.missing_fraction(),
            seconds=asyncio.get_running_loop().time() - self.began,
            residual=torch.from_numpy(self.residual) if average is not None and self.residual is not None else None,
        )

    def _outcome(self, *, is_late: bool) -> tuple[Outcome, str]:
        if not self.collection.num_missing:
            return "averaged", self.contribution.objection
        failures = [courier.failure for courier in self.couriers if courier.failure is not None]
        failures += [desk.failure for desk in self.desks.values() if desk.failure is not None]
        for failure in sorted(failures, key=lambda failure: failure.outcome == "failed"):
            if failure.outcome == "zero_weight" and self.contribution.objection:
                return "non_finite", self.contribution.objection
            if failure.outcome not in ("failed", "averaged"):
                return failure.outcome, failure.detail
        if is_late:
            return "timeout", f"not done after {self.group.limits.round_seconds:.0f} s"
        return "partial", "; ".join(failure.detail for failure in failures)[:400] or "a reducer was lost"

    def _witnessed(self) -> tuple[Mapping[str, float], dict[str, str]]:
        """Weights that we received, or else that every reducer says it received; and all that were banned."""
        endings = [courier.ending for courier in self.couriers if courier.ending is not None]
        banned = {peer: reason for ending in endings for peer, reason in ending.banned.items()}
        if self.contribution.objection:
            banned[self.own_id] = self.contribution.objection
        ours = [desk.reduction for desk in self.desks.values() if desk.reduction.is_complete]
        for reduction in ours:
            banned |= reduction.banned
        told = [reduction.weights() for reduction in ours] or [ending.weights for ending in endings]
        common = set.intersection(*(set(weights) for weights in told)) if told else set()
        return {peer: min(weights[peer] for weights in told) for peer in sorted(common)}, banned
