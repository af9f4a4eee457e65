"""Find each other for a round: everyone asks the same leader, who begins when all are there or waited for long enough.

hivemind's peers announce themselves in the DHT, poll it for others, and follow whoever expires first: with starts some
seconds apart, groups fall into pieces (3 + 2 of 5), and an epoch cannot be shorter than the polling. Here the leader of
a round follows from what all know: full peers ranked by a hash of run, round and peer id. Whoever cannot reach the
first asks the next; a leader calls those who do not come, and sends its followers to a better one that it learns of.
Whoever follows somebody sends its own followers there, and takes no word to ask itself: nobody waits in a circle. Cost:
one request and at most one call per member and round, and N members of about 70 bytes to each of N.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

# hivemind tells a stream by typing's alias, and only by that.
from typing import Any, AsyncIterator  # noqa: UP035

from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase

from calm_ray.swarm.gathering import Gathering, Key, NoGroup, is_quorum, rank_of, should_begin
from calm_ray.swarm.group import Group
from calm_ray.swarm.knock import Calls, understand, unless_called
from calm_ray.swarm.limits import RoundLimits
from calm_ray.swarm.messages import (
    MAX_EPOCH,
    MAX_MEMBERS,
    Malformed,
    Ticket,
    pack,
    pack_group,
    pack_ticket,
    unpack,
    unpack_ticket,
)
from calm_ray.swarm.wires import Behind

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.1
RETRY_SECONDS = 0.3
RELOOK_SECONDS = 0.5
"""How often a leader looks whether a better one has come up."""
SUSPECT_SECONDS = 30.0
"""A peer that did not answer is asked last for so long."""
HANG_UP_SECONDS = 10.0
ANSWER_SECONDS = 300.0
"""A follower is kept for so long at most, more than any search for a group lasts."""
TELL_SECONDS = 0.5
"""How soon followers hear that we have stepped without them."""
MAX_HOPS = 4
MAX_FAILED_ROUNDS = 2
"""In a row under one leader; then another one leads. Its groups may not exist."""


class Matchmaker(ServicerBase):
    """All methods run on the swarm's loop. `epoch` and `on_knock` are the controller's."""

    def __init__(
        self, *, run_id: str, schema: bytes, epoch: Callable[[], int], on_knock: Callable[[Key], None],
        form: Callable[[Key, Mapping[str, Ticket]], Group],
    ) -> None:  # fmt: skip
        self._run_id, self._schema, self._epoch, self._on_knock, self._form = run_id, schema, epoch, on_knock, form
        self._gatherings: dict[Key, Gathering] = {}
        self._leaders: dict[Key, str] = {}
        self._past: tuple[Key, str] | None = None
        """A round that somebody told us is over. Until we have caught up, our followers must not wait for us."""
        self._calls_to_us = Calls()
        self._ceiling: RoundLimits
        self._suspects: dict[str, float] = {}
        self._unreachable: dict[str, float] = {}
        self._closed_states: set[int] = set()
        self._failed_rounds: Counter[str] = Counter()
        self._calls: set[asyncio.Task[None]] = set()
        self._active: Key | None = None
        self._followed: str | None = None
        self._is_leaving = False
        self.num_missing: int | None = None
        """Peers that we wait for, while we lead a gathering."""
        self._p2p: P2P | None = None
        self._own_id = ""
        self._is_served = False

    async def serve(self, p2p: P2P, *, is_reachable: bool) -> None:
        self._p2p, self._own_id, self._is_served = p2p, p2p.peer_id.to_base58(), is_reachable
        if is_reachable:
            await self.add_p2p_handlers(p2p, namespace=self._run_id)

    # --- what others ask ---------------------------------------------------------------------------------------------

    async def rpc_join_round(self, request: BytesValue, context: P2PContext) -> AsyncIterator[BytesValue]:
        """Answer `refused`, `over`, `redirect`, or `accepted` and then `begin`. The caller hangs up."""
        peer_id = context.remote_id.to_base58()
        self._unreachable.pop(peer_id, None)
        try:
            ticket = unpack_ticket(request.value)
        except Malformed as exc:
            yield _message("refused", why=f"malformed: {exc}")
            await asyncio.sleep(HANG_UP_SECONDS)
            return
        key: Key = (ticket.kind, ticket.epoch)
        gathering, refusal = self._admit(key, ticket)
        if gathering is None:
            yield refusal
            await asyncio.sleep(HANG_UP_SECONDS)
            return
        gathering.tickets[peer_id] = ticket
        try:
            self._on_knock(key)
            yield _message("accepted")
            yield await self._answer(key, gathering)
            await asyncio.sleep(HANG_UP_SECONDS)
        finally:
            if not gathering.answer.done() and gathering.tickets.get(peer_id) is ticket:  # it may have asked anew
                del gathering.tickets[peer_id]

    async def _answer(self, key: Key, gathering: Gathering) -> BytesValue:
        """What becomes of a gathering: its group, who leads it instead, or that we have gone on without."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            if (await asyncio.wait({gathering.answer}, timeout=TELL_SECONDS))[0]:
                return BytesValue(value=gathering.answer.result())
            if self._is_over(key):
                return _message("over", epoch=self._epoch())
        return _message("refused", why="nobody came")

    def _is_over(self, key: Key) -> bool:
        kind, epoch = key
        return epoch < self._epoch() or (kind == "state" and epoch in self._closed_states)

    def _admit(self, key: Key, ticket: Ticket) -> tuple[Gathering | None, BytesValue]:
        epoch = ticket.epoch
        if ticket.schema != self._schema:
            return None, _message("refused", why="another model, optimizer or compression: compare the run's config")
        if self._is_over(key):
            return None, _message("over", epoch=self._epoch())
        if epoch > self._epoch():
            return None, _message("refused", why="not there yet")
        if self._is_leaving:
            return None, _message("refused", why="leaving")
        if key in self._leaders:
            return None, _message("redirect", to=self._leaders[key])
        if self._past is not None and self._past[0] == key:
            return None, _message("redirect", to=self._past[1])
        gathering = self._gatherings.get(key)
        if gathering is None:
            self._gatherings = {k: g for k, g in self._gatherings.items() if k[1] >= epoch}  # what is over may go
            gathering = self._gatherings[key] = Gathering()
        if gathering.answer.done() or len(gathering.tickets) >= MAX_MEMBERS:
            return None, _message("refused", why="begun, or full")
        return gathering, BytesValue()

    async def rpc_call_round(self, request: BytesValue, context: P2PContext) -> BytesValue:
        """A leader says that a round is due: those whose view of the swarm is older hear of it at once."""
        leader = context.remote_id.to_base58()
        self._unreachable.pop(leader, None)
        with contextlib.suppress(Malformed):
            fields = unpack(request.value)
            if fields.get("epoch") == self._epoch():
                self._note_call((fields.get("kind"), self._epoch()), leader)
        return BytesValue(value=pack(epoch=self._epoch(), active=list(self._active or ())))

    def _note_call(self, key: Any, leader: str) -> None:
        if leader in self._suspects:
            return
        if key[0] == "gradients":
            self._on_knock(key)
        self._calls_to_us.note(key, leader)

    # --- what we do --------------------------------------------------------------------------------------------------

    def distrust(self, peer_id: str) -> None:
        """`peer_id` says that a round is over, and cannot show it: do not listen to it for a while."""
        self._past = None
        self._suspects[peer_id] = time.monotonic() + SUSPECT_SECONDS

    @property
    def unreachable(self) -> set[str]:
        """Full peers that could not be called or asked lately."""
        now = time.monotonic()
        return {peer for peer, until in self._unreachable.items() if until > now}

    def done(self, *, has_failed: bool = False) -> None:
        """The round that `find` found a group for is over."""
        key, self._active = self._active, None
        if not has_failed:
            self._failed_rounds.clear()
            return
        if key is not None and (gathering := self._gatherings.get(key)) is not None and gathering.answer.done():
            del self._gatherings[key]  # its members will ask again, at once
        if self._followed is not None:
            self._failed_rounds[self._followed] += 1
            if self._failed_rounds[self._followed] >= MAX_FAILED_ROUNDS:
                self.distrust(self._followed)
                self._failed_rounds.clear()

    def leave(self) -> None:
        """Follow and lead nobody any more; followers are told so."""
        self._is_leaving = True
        for key in list(self._gatherings):
            self._close(key, _message("refused", why="leaving").value)

    def close_state_round(self, epoch: int) -> None:
        """We will not average parameters at `epoch` any more: whoever asks is told at once."""
        self._closed_states = {e for e in self._closed_states if e >= epoch - 2} | {epoch}

    async def find(
        self, ticket: Ticket, *, candidates: Callable[[], Iterable[str]], expected: Callable[[], Mapping[str, bool]],
        limits: RoundLimits, ceiling: RoundLimits | None = None,
    ) -> Group:  # fmt: skip
        """The group of (ticket.kind, ticket.epoch). Raises NoGroup, or Behind if others are past it.

        `candidates`: full peers, in any order; `expected`: peers that should come, and whether they can be called.
        Both are asked again and again. `ceiling`: what a leader may ask for on behalf of the slowest, times some.
        """
        self._ceiling = ceiling or limits
        key: Key = (ticket.kind, ticket.epoch)
        self._followed = self._past = None
        self._unreachable = {peer: until for peer, until in self._unreachable.items() if until > time.monotonic()}
        deadline = time.monotonic() + limits.matchmaking_seconds
        try:
            while True:
                group = await self._follow_somebody(ticket, key, candidates, limits, deadline)
                if group is None and self._is_served:
                    group = await self._lead(ticket, key, candidates, expected, limits, deadline)
                if group is not None:
                    self._active = key
                    for member in group.members:
                        self._unreachable.pop(member.peer_id, None)
                    return group
                if time.monotonic() >= deadline:
                    alone = self._is_served or any(True for _ in candidates())
                    raise NoGroup("timeout" if alone else "only_clients", "nobody to average with was found in time")
                await asyncio.sleep(RETRY_SECONDS)
        except Behind as exc:
            self._past = (key, exc.peer_id)
            self._close(key, _message("redirect", to=exc.peer_id).value)
            raise
        finally:
            self.num_missing = None
            self._leaders.pop(key, None)
            self._close(key, _message("refused", why="gave up").value)

    def _better(self, key: Key, candidates: Iterable[str]) -> list[str]:
        """Whom to ask before leading ourselves, best first; those who did not answer lately come last."""
        own = rank_of(self._own_id, run_id=self._run_id, key=key)
        now = time.monotonic()
        self._suspects = {peer: until for peer, until in self._suspects.items() if until > now}
        ranks = {p: rank_of(p, run_id=self._run_id, key=key) for p in set(candidates) if p != self._own_id}
        sound = sorted((p for p in ranks if p not in self._suspects), key=ranks.__getitem__)
        if self._is_served:
            return [p for p in sound if ranks[p] < own]
        return sound + sorted(self._suspects.keys() & ranks.keys(), key=ranks.__getitem__)

    async def _follow_somebody(
        self, ticket: Ticket, key: Key, candidates: Callable[[], Iterable[str]], limits: RoundLimits, deadline: float
    ) -> Group | None:
        caller = self._calls_to_us.take(key)
        for candidate in [*([caller] if caller else []), *self._better(key, candidates())]:
            leader: str | None = candidate
            for _ in range(MAX_HOPS):
                if leader is None or leader == self._own_id:
                    break
                answer = await self._ask(leader, ticket, key, limits, deadline)
                if isinstance(answer, Group):
                    self._followed = leader
                    return answer
                leader = answer
            if time.monotonic() >= deadline:
                return None
        return None

    async def _ask(
        self, leader: str, ticket: Ticket, key: Key, limits: RoundLimits, deadline: float
    ) -> Group | str | None:
        """Ask `leader` for a place: the group; another leader to ask; or None. Raises Behind."""
        stream: Any = None
        try:
            async with asyncio.timeout(limits.request_seconds):
                answer = await unless_called(self._open(leader, ticket), self._calls_to_us, key=key, leader=leader)
            if isinstance(answer, str):
                return answer
            stream, fields = answer
            self._unreachable.pop(leader, None)
            if fields.get("type") == "accepted":
                self._leaders[key] = leader
                self._close(key, _message("redirect", to=leader).value)
                patience = max(0.0, deadline - time.monotonic()) + limits.grace_seconds + limits.request_seconds
                async with asyncio.timeout(patience):
                    fields = unpack((await anext(stream)).value)
                self._calls_to_us.take(key)  # our leader's own
            return understand(fields, leader=leader, key=key, own_peer_id=self._own_id, limits=self._ceiling)
        except Behind:
            raise
        except Exception as exc:  # noqa: BLE001  whatever a stranger's peer does, it is not our leader
            logger.info("matchmaking kind=%s epoch=%d leader=%s problem=%r", *key, leader, exc)
            self._suspects[leader] = time.monotonic() + SUSPECT_SECONDS
            if stream is None and not isinstance(exc, Malformed):
                self._unreachable[leader] = self._suspects[leader]
            return None
        finally:
            self._leaders.pop(key, None)
            if stream is not None:
                with contextlib.suppress(Exception):
                    await stream.aclose()

    async def _open(self, leader: str, ticket: Ticket) -> tuple[Any, dict[str, Any]]:
        assert self._p2p is not None
        stub = self.get_stub(self._p2p, PeerID.from_base58(leader), namespace=self._run_id)
        stream: Any = await stub.rpc_join_round(BytesValue(value=pack_ticket(ticket)))
        try:
            return stream, unpack((await anext(stream)).value)
        except BaseException:
            await stream.aclose()
            raise

    async def _lead(
        self, ticket: Ticket, key: Key, candidates: Callable[[], Iterable[str]],
        expected: Callable[[], Mapping[str, bool]], limits: RoundLimits, deadline: float,
    ) -> Group | None:  # fmt: skip
        """Collect followers until it is time to begin; None if a better leader has come up, or nobody came."""
        gathering = self._gatherings.get(key)
        if gathering is None or gathering.answer.done():
            gathering = self._gatherings[key] = Gathering()
        gathering.tickets[self._own_id] = ticket
        relook_at = time.monotonic() + RELOOK_SECONDS
        while (now := time.monotonic()) < deadline + TICK_SECONDS:
            awaited = expected()
            away = awaited.keys() - gathering.tickets.keys()
            missing = away - gathering.unreachable
            self.num_missing = len(missing)
            for peer_id in missing - gathering.called:
                gathering.called.add(peer_id)
                if not awaited[peer_id]:
                    continue
                call = asyncio.create_task(self._call(peer_id, key, gathering, limits))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)
            if gathering.behind is not None:
                raise gathering.behind
            if (busy := gathering.begun_by) is not None:
                gathering.called.discard(busy)  # ask it anew, for that round may fail
                gathering.begun_by = None
                return None
            num_here = len(gathering.tickets)
            if gathering.quorum_at is None and is_quorum(num_here=num_here, num_others=len(away)):
                gathering.quorum_at = now
            age = now - gathering.opened_at
            quorum_age = None if gathering.quorum_at is None else now - gathering.quorum_at
            if should_begin(
                num_here=num_here, num_missing=len(missing), num_unreachable=len(away - missing), age=age,
                quorum_age=quorum_age, limits=limits,
            ):  # fmt: skip
                group = self._form(key, dict(gathering.tickets))
                gathering.answer.set_result(pack_group(group))
                return group
            if now >= relook_at:
                relook_at = now + RELOOK_SECONDS
                if self._better(key, candidates()):
                    return None
            await asyncio.sleep(TICK_SECONDS / 2)
        return None

    def _close(self, key: Key, answer: bytes) -> None:
        """Send our followers of a round away. One that has begun stays, so that latecomers are told so."""
        gathering = self._gatherings.get(key)
        if gathering is not None and not gathering.answer.done():
            gathering.tickets.pop(self._own_id, None)
            gathering.answer.set_result(answer)
            del self._gatherings[key]

    async def _call(self, peer_id: str, key: Key, gathering: Gathering, limits: RoundLimits) -> None:
        """Ask somebody to come to our round. Who cannot be reached is not waited for, unless it comes by itself."""
        assert self._p2p is not None
        try:
            stub = self.get_stub(self._p2p, PeerID.from_base58(peer_id), namespace=self._run_id)
            message = BytesValue(value=pack(kind=key[0], epoch=key[1]))
            fields = unpack((await stub.rpc_call_round(message, timeout=limits.request_seconds)).value)
        except Exception as exc:  # noqa: BLE001  dead, a client, not of this run: it may still come by itself
            logger.debug("matchmaking kind=%s epoch=%d call=%s problem=%r", *key, peer_id, exc)
            gathering.unreachable.add(peer_id)
            self._unreachable[peer_id] = time.monotonic() + SUSPECT_SECONDS
            return
        self._unreachable.pop(peer_id, None)
        epoch = fields.get("epoch")
        if isinstance(epoch, int) and key[1] < epoch <= MAX_EPOCH and peer_id not in self._suspects:
            gathering.behind = Behind(epoch, peer_id)
        elif fields.get("active") == list(key):
            gathering.begun_by = peer_id


def _message(kind: str, **fields: Any) -> BytesValue:
    return BytesValue(value=pack(type=kind, **fields))
