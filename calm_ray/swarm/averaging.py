"""One call per round on our own wire: find the group, bring the vector, get the average and the verdict.

Blocking for the caller; inside, coroutines on the swarm's loop. `wires.py` says what the step controller needs of it.
"""

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping

import torch
from hivemind.utils import get_dht_time

from calm_ray.swarm.exchange import Exchange
from calm_ray.swarm.gathering import Key, NoGroup
from calm_ray.swarm.group import Group, Kind, Member
from calm_ray.swarm.health import RoundFact, RoundHealth, after_round
from calm_ray.swarm.limits import RoundLimits, round_limits
from calm_ray.swarm.matchmaking import Matchmaker
from calm_ray.swarm.messages import MAX_TIMES_OWN, Ticket
from calm_ray.swarm.node import Swarm
from calm_ray.swarm.progress import ProgressTracker
from calm_ray.swarm.roster import Roster
from calm_ray.swarm.shares import balance
from calm_ray.swarm.sketch import TOLERANCE, Sketch, reference_of, relative_distance, standing
from calm_ray.swarm.verdict import SLOW, RoundResult
from calm_ray.swarm.wires import BYTES_PER_ELEMENT, NUM_ROUNDS_IN_A_TURN, Take
from calm_ray.tables import AveragingTable

logger = logging.getLogger(__name__)

RECORD_LAG_SECONDS = 1.0
"""Between two peers' steps at the end of one epoch, and a record of it to be read."""
BEAT_SECONDS = 4.0
SLOWEST = 1.0
"""Bytes per second, less than anybody is waited for: see `limits.round_limits`."""
NUM_MEASURED = 20
SOLO_SECONDS = 300.0
"""Whoever has lost everybody goes on alone after so long: they may really have gone."""
SERVE_TIMEOUT_SECONDS = 15.0
LINGER_SECONDS = 15.0
SETTLE_SECONDS = 30.0
"""More than a round's own limits before we take our own loop to be stuck."""


class OwnAveraging:
    """Our own wire. `epoch`, `sketch` and `on_knock` are the controller's."""

    lead_seconds = 0.0

    def __init__(
        self, swarm: Swarm, *, num_elements: int, schema: bytes, table: AveragingTable, tracker: ProgressTracker,
        roster: Roster, epoch: Callable[[], int], sketch: Callable[[], Sketch], on_knock: Callable[[int], None],
        is_auxiliary: bool, max_weight: float, bandwidth: float | None,
    ) -> None:  # fmt: skip
        self._swarm, self._table, self._tracker, self._roster = swarm, table, tracker, roster
        self._num_elements, self._schema, self._sketch = num_elements, schema, sketch
        self._is_auxiliary, self._max_weight, self._bandwidth = is_auxiliary, max_weight, bandwidth
        self._is_reachable = not swarm.is_client_mode
        self._measured: deque[float] = deque(maxlen=NUM_MEASURED)
        self._absent: dict[str, float] = {}
        self._silent_since: dict[str, float] = {}
        self._epoch = epoch
        self.health = RoundHealth()
        self._last_group: Group | None = None
        self.exchange = Exchange(num_elements={"gradients": num_elements, "state": num_elements})
        self._matchmaker = Matchmaker(
            run_id=swarm.run_id, schema=schema, epoch=epoch, form=self._form,
            on_knock=lambda key: on_knock(key[1]) if key[0] == "gradients" else None,
        )  # fmt: skip
        swarm.loop.run(self._serve(), timeout_seconds=SERVE_TIMEOUT_SECONDS)

    async def _serve(self) -> None:
        p2p = await self._swarm.p2p()
        await self._matchmaker.serve(p2p, is_reachable=self._is_reachable)
        await self.exchange.serve(p2p, namespace=self._swarm.run_id, is_reachable=self._is_reachable)

    # --- who is there ------------------------------------------------------------------------------------------------

    def _candidates(self, kind: Kind) -> list[str]:
        """Full peers that may lead: those who have died are still in the records for a minute."""
        if kind == "state":
            return [peer for peer, is_full in self._expected("state").items() if is_full]
        since = get_dht_time() - self._tracker.live_seconds
        trainers = [p for p, record in self._tracker.records.items() if not record.client_mode and record.time > since]
        return [*trainers, *(p for p, holder in self._roster.holders.items() if holder.is_auxiliary)]

    def _expected(self, kind: Kind = "gradients") -> dict[str, bool]:
        """Peers that should come to this epoch's round, and whether they can be called."""
        if kind == "state":  # decided by the group that has just stepped
            members = self._last_group.members if self._last_group else ()
            return {m.peer_id: m.fraction > 0 for m in members if m.peer_id != self._swarm.peer_id}
        epoch, since, expected = self._epoch(), get_dht_time() - self._tracker.live_seconds, {}
        for peer, record in self._tracker.records.items():
            is_live = record.time > max(since, self._absent.get(peer, 0.0))
            # What was written before our own step says nothing of who has stepped since: two that are quick would take
            # themselves for the whole swarm. Those who are past this epoch will not come, but count as missing: nor
            # must what is left of a swarm that has stepped. Whoever is called says that it is past us.
            if is_live and (record.epoch >= epoch or record.time < self._tracker.began_at + RECORD_LAG_SECONDS):
                expected[peer] = not record.client_mode
        for peer, holder in self._roster.holders.items():
            is_known = not holder.is_auxiliary and peer in self._tracker.records  # else it has only just come
            is_here = abs(holder.epoch - epoch) <= 1 and holder.epoch > self._absent.get(peer, -1.0)
            if is_here and not is_known:
                expected[peer] = True
        expected.pop(self._swarm.peer_id, None)
        return expected

    def has_company(self) -> bool:
        """Whether anybody else seems alive: not only expected now, and not found unreachable since it last wrote.

        Whoever says no here steps alone, so one failed round is no reason to.
        """
        now = get_dht_time()
        since = now - self._tracker.live_seconds
        alive = {peer for peer, record in self._tracker.records.items() if record.time > since}
        alive |= {peer for peer, holder in self._roster.holders.items() if holder.is_fresh(now=now)}
        reachable = alive - self._matchmaker.unreachable - {self._swarm.peer_id}
        self._note_silent(reachable)
        return bool(reachable)

    @property
    def is_forsaken(self) -> bool:
        """Whoever leaves withdraws its records; whoever's are only old has died, or our line to it has."""
        return bool(self._silent_since)

    def _note_silent(self, reachable: set[str]) -> None:
        known = self._tracker.records.keys() | self._roster.holders.keys() | self._silent_since.keys()
        silent = known - reachable - {self._swarm.peer_id}
        now = time.monotonic()
        since = {peer: self._silent_since.get(peer, now) for peer in silent}
        self._silent_since = {peer: at for peer, at in since.items() if now < at + SOLO_SECONDS}

    @property
    def patience_seconds(self) -> float:
        limits = self.limits("gradients")
        return NUM_ROUNDS_IN_A_TURN * (limits.matchmaking_seconds + limits.round_seconds + SETTLE_SECONDS)

    @property
    def num_missing(self) -> int | None:
        return self._matchmaker.num_missing

    def _note_absent(self, group: Group | None) -> None:
        """Do not wait again for those who did not come, until they show a sign of life.

        Without a group, that is only those who cannot be reached: the others may be looking for us at this moment.
        """
        expected = self._expected()
        present = {member.peer_id for member in group.members} if group else set()
        missing = expected.keys() - present
        if group is None:
            missing = {p for p in missing if not expected[p] or p in self._matchmaker.unreachable}
        for peer in missing:
            record, holder = self._tracker.records.get(peer), self._roster.holders.get(peer)
            self._absent[peer] = record.time if record else float(holder.epoch if holder else 0)
        known = self._tracker.records.keys() | self._roster.holders.keys()
        self._absent = {peer: seen for peer, seen in self._absent.items() if peer in known - present}

    # --- after a round -----------------------------------------------------------------------------------------------

    @property
    def is_out_of_step(self) -> bool:
        """Whether the last group found our parameters to be another model's."""
        return self._swarm.peer_id in self.out_of_step

    @property
    def out_of_step(self) -> Collection[str]:
        """Members of the last group whose parameters are not those of most."""
        return self._last_group.out_of_step if self._last_group is not None else ()

    def is_state_due(self, epoch: int) -> bool:
        """All members of the last group decide alike: parameters are averaged now and then, if they differ at all."""
        group = self._last_group
        is_turn = epoch % self._table.average_state_every == 0
        return is_turn and group is not None and group.drift > 0 and not self.is_out_of_step

    def close_state_round(self, epoch: int) -> None:
        self._matchmaker.close_state_round(epoch)

    def forget_group(self) -> None:
        """We step with an average that we read from others: what the last group was says nothing."""
        self._last_group = None

    def distrust(self, peer_id: str) -> None:
        self._matchmaker.distrust(peer_id)

    def fetch_last(self, donor: str, *, epoch: int) -> torch.Tensor:
        """The averaged gradient that ended `epoch`, from a peer that was there. Raises whatever kept us from it."""
        limits = self.limits("gradients")
        average, _ = self._swarm.loop.run(
            self.exchange.fetch_last(donor, kind="gradients", epoch=epoch, limits=limits),
            timeout_seconds=limits.round_seconds + SETTLE_SECONDS,
        )
        return average

    # --- one round ---------------------------------------------------------------------------------------------------

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second of our line: what `[peer]` says, else what the last rounds have shown, if anything."""
        return self._bandwidth or self.exchange.bytes_per_second

    def limits(self, kind: Kind, *, slowest: float | None = None) -> RoundLimits:
        codec, expected = self._codec(kind), self._expected()
        return round_limits(
            num_bytes=self._num_elements * BYTES_PER_ELEMENT[codec], num_members=len(expected) + 1,
            num_reducers=sum(expected.values()) + self._is_reachable, network=self._table.network,
            slowest_bandwidth=slowest or self.bandwidth,
            measured_seconds=tuple(self._measured) if kind == "gradients" else (),
            matchmaking_seconds=self._table.matchmaking_seconds,
            averaging_timeout_seconds=self._table.averaging_timeout_seconds,
            matchmaking_factor=self.health.matchmaking.factor, averaging_factor=self.health.averaging.factor,
        )  # fmt: skip

    def _note(self, result: RoundResult, group: Group | None, *, num_live: int) -> None:
        """Learn from a gradient round: who did not come, how long it took, whether the times were long enough."""
        self._note_absent(group)
        num_slow = sum(reason.startswith(SLOW) for reason in result.banned.values())
        fact = RoundFact(
            outcome=result.outcome, group_size=len(group.members) if group else 0, num_live=num_live,
            num_too_slow=num_slow,
        )  # fmt: skip
        before, self.health = self.health, after_round(self.health, fact)
        if self.health.advice and self.health.advice != before.advice:
            logger.warning("health %s", self.health.advice)
        if result.is_true and not num_slow:
            self._measured.append(result.seconds)

    def average(self, kind: Kind, epoch: int, take: Take) -> RoundResult:
        limits = self.limits(kind)
        ceiling = self.limits(kind, slowest=SLOWEST)
        bound = MAX_TIMES_OWN * (ceiling.matchmaking_seconds + ceiling.round_seconds) + SETTLE_SECONDS
        sketch = self._sketch().to_bytes()  # here, not on the loop: it reads all parameters
        try:
            return self._swarm.loop.run(
                self._average(kind, epoch, take, limits, ceiling, sketch), timeout_seconds=bound
            )
        except TimeoutError:
            return RoundResult(outcome="failed", detail=f"our own loop was stuck for {bound:.0f} s")

    async def _average(
        self, kind: Kind, epoch: int, take: Take, limits: RoundLimits, ceiling: RoundLimits, sketch: bytes
    ) -> RoundResult:
        beating = asyncio.create_task(self._beat())
        try:
            return await self._find_and_run(kind, epoch, take, limits, ceiling, sketch)
        finally:
            beating.cancel()

    async def _beat(self) -> None:
        """A long round is no reason for others to take us for dead."""
        while not self._is_auxiliary:
            await asyncio.sleep(BEAT_SECONDS)
            self._tracker.renew()

    async def _find_and_run(
        self, kind: Kind, epoch: int, take: Take, limits: RoundLimits, ceiling: RoundLimits, sketch: bytes
    ) -> RoundResult:
        ticket = Ticket(
            kind=kind, epoch=epoch, schema=self._schema, is_sender=kind == "state" or not self._is_auxiliary,
            can_reduce=self._is_reachable, bandwidth=self.bandwidth, sketch=sketch,
        )  # fmt: skip
        num_live = len(self._expected()) + 1
        try:
            group = await self._matchmaker.find(
                ticket, candidates=lambda: self._candidates(kind), expected=lambda: self._expected(kind), limits=limits,
                ceiling=ceiling,
            )  # fmt: skip
        except NoGroup as exc:
            result = RoundResult(outcome=exc.outcome, detail=str(exc), group_size=1)
            if kind == "gradients":
                self._note(result, None, num_live=num_live)
            return result
        has_failed = True
        try:
            self._last_group = group
            contribution = await asyncio.get_running_loop().run_in_executor(None, take)
            vector, weight = contribution if contribution is not None else (None, 0.0)
            if self._swarm.peer_id in group.out_of_step:
                vector, weight = None, 0.0
            max_weight = self._max_weight if kind == "gradients" else 1.0
            result = await self.exchange.run(
                group, vector=vector, weight=weight, codec=self._codec(kind), max_weight=max_weight
            )
            has_failed = result.outcome in ("partial", "timeout", "only_clients", "failed")
        finally:
            self._matchmaker.done(has_failed=has_failed)
        if kind == "gradients":
            self._note(result, group, num_live=num_live)
        return result

    def _codec(self, kind: Kind) -> str:
        return self._table.compression if kind == "gradients" else "none"

    def _form(self, key: Key, tickets: Mapping[str, Ticket]) -> Group:
        """For the leader: who takes which share, who is out of step, and how long everything may take."""
        peers = sorted(tickets)
        sketches = {peer: _sketch_of(tickets[peer]) for peer in peers}
        known = [sketch for sketch in sketches.values() if sketch is not None]
        reference = reference_of(known)
        astray = [p for p in peers if (s := sketches[p]) is None or standing(s, reference=reference) == "out_of_step"]
        drift = max(relative_distance(reference, s) for p, s in sketches.items() if s is not None and p not in astray)
        is_sender = [tickets[p].is_sender and p not in astray for p in peers]
        fractions = balance(
            [tickets[p].bandwidth for p in peers], is_sender=is_sender,
            can_reduce=[tickets[p].can_reduce for p in peers],
        )  # fmt: skip
        members = tuple(
            Member(peer_id=p, is_sender=sends, fraction=f)
            for p, sends, f in zip(peers, is_sender, fractions, strict=True)
        )
        slowest = min((b for p in peers if (b := tickets[p].bandwidth)), default=None)
        return Group(
            group_id=secrets.token_bytes(16), kind=key[0], epoch=key[1], members=members,
            limits=self.limits(key[0], slowest=slowest), drift=drift, out_of_step=tuple(astray),
        )  # fmt: skip

    def close(self) -> None:
        """Some groupmates may take longer than we can wait for."""
        with contextlib.suppress(TimeoutError):
            self._swarm.loop.run(self._close(), timeout_seconds=LINGER_SECONDS)

    async def _close(self) -> None:
        self._matchmaker.leave()
        await self.exchange.close()


def _sketch_of(ticket: Ticket) -> Sketch | None:
    try:
        return Sketch.from_bytes(ticket.sketch)
    except ValueError:
        return None


def schema_of(shapes: list[tuple[int, ...]], *, compression: str, optimizer: str) -> bytes:
    """What must be equal for two peers to average: a digest of the parameters' shapes, the codec and the optimizer."""
    return hashlib.sha256(f"{shapes}/{compression}/{optimizer}/{TOLERANCE}".encode()).digest()
