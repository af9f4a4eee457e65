"""A reducer at work: it hears its senders, finishes parts as they become whole, and hands the averages to everyone.

Each caller's stream has two sides that do not wait for each other: what it sends goes into the reduction as it comes,
what it is owed goes out as it is ready. Senders are watched by the clock: one that keeps the others waiting in silence,
or is not done when most of the round's time is over, is banned, and reads on.
"""

import asyncio
import logging
from collections.abc import Callable

from calm_ray.swarm.exchange_frames import FrameKind, Stream
from calm_ray.swarm.exchange_messages import BadMessage, Ban, Ending, Failure, Opening
from calm_ray.swarm.group import Group
from calm_ray.swarm.part_codecs import BadPart, PartCodec, Vector
from calm_ray.swarm.reducer import Reduction, ReductionFailed
from calm_ray.swarm.verdict import SLOW, Outcome

logger = logging.getLogger(__name__)

LATEST_SENDER = 0.6
"""Share of a round's time after which senders who are not done are given up, if enough of the others are."""
SIGNS_OF_LIFE = 3
"""Times in limits.chunk_seconds that a reducer with nothing to hand out says that it is alive."""
SLICE_OF_LOOP_SECONDS = 0.005
"""Finishing parts in a row stops after this long to let streams be served."""


class ReducerDesk:
    """Serves one slice to a group: `serve` every caller, and `work` beside it. Made on the loop."""

    def __init__(
        self,
        group: Group,
        reduction: Reduction,
        *,
        codec: PartCodec,
        on_part: Callable[[int, bytes, Vector], None],
        on_ban: Callable[[str, str], None],
    ) -> None:
        """`on_part(number within the slice, encoded, decoded)` gets every average as it is finished.

        `on_ban(peer, reason)` is called when this desk bans a peer, so that the reducer's other desks do so too.
        """
        self._group, self.reduction, self._codec = group, reduction, codec
        self._on_part, self._on_ban = on_part, on_ban
        self._limits = group.limits
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._looked_at = self._called_for_at = self._began
        self._heard_at: dict[str, float] = {}
        self._callers: set[str] = set()
        self._changed = asyncio.Event()
        self.failure: Failure | None = None
        self.served: set[str] = set()
        """Callers who have hung up."""

    async def work(self) -> None:
        """Finish parts until the slice is done or cannot be; ends by itself, if not before then at the round's end."""
        while not self.reduction.is_complete and self.failure is None:
            await self._finish_what_is_ready()
            if self.reduction.is_complete or self.failure:
                break
            changed = self._changed
            try:
                async with asyncio.timeout(self._limits.chunk_seconds / 4):
                    await changed.wait()
            except TimeoutError:
                pass
            self._ban_the_slow()
            if self._loop.time() > self._began + self._limits.round_seconds:
                self.fail("timeout", "the round's time was over")

    def fail(self, outcome: Outcome, detail: str) -> None:
        """No more averages: everyone who waits for one is told."""
        if self.failure is None and not self.reduction.is_complete:
            self.failure = Failure(outcome=outcome, detail=detail[:400])
        self._notify()

    async def serve(self, peer: str, opening: Opening, stream: Stream) -> None:
        """Talk to one caller until it hangs up. One of PEER_FAULTS if it breaks off or breaks the protocol."""
        if peer in self._callers:
            await refuse(stream, "a second stream of the same peer")
            return
        self._callers.add(peer)
        if reason := self.reduction.admit(peer, opening.weight):
            logger.warning("sender_refused peer=%s reason=%s", peer, reason)
            self._on_ban(peer, reason)
        self._heard_at[peer] = self._loop.time()
        self._notify()
        hearing = asyncio.create_task(self._hear(peer, stream, is_sender=opening.weight != 0))
        handing_out = asyncio.create_task(self._hand_out(peer, stream))
        try:
            await asyncio.wait((hearing, handing_out), return_when=asyncio.FIRST_COMPLETED)
            if handing_out.done():
                handing_out.result()
            await hearing
        finally:
            hearing.cancel()
            handing_out.cancel()
            await asyncio.gather(hearing, handing_out, return_exceptions=True)
            self.served.add(peer)
            self._ban(peer, "its connection broke")

    def refuse_sender(self, peer: str, reason: str) -> None:
        """Wait neither for the parts of a peer whose opening was wrong, nor for it to read."""
        self.served.add(peer)
        self._ban(peer, reason)

    async def _hear(self, peer: str, stream: Stream, *, is_sender: bool) -> None:
        """Take in what a member sends until it hangs up; parts of who is banned, or has nothing to bring, are dropped.

        One of PEER_FAULTS if it breaks the protocol: then it is not served any longer.
        """
        max_bytes = self._codec.encoded_bytes(self._codec.part_elements)
        while True:
            try:
                kind, payload = await stream.receive(max_bytes=max_bytes)
                if kind != FrameKind.PART or not is_sender:
                    raise BadMessage(f"{kind.name.lower()} where none was due")
                self.reduction.add(peer, payload)
            except BadPart as exc:
                self._on_ban(peer, str(exc))
            except BadMessage as exc:
                self._ban(peer, str(exc))
                raise
            except (OSError, EOFError):
                return  # it has hung up; if it still owed something, `serve` bans it
            self._heard_at[peer] = self._loop.time()
            if self.reduction.is_ready:
                self._notify()

    async def _hand_out(self, peer: str, stream: Stream) -> None:
        """Send averages in order as they are finished; tell the caller if it is banned; end with the weights."""
        num_sent, is_told = 0, False
        finished = self.reduction.finished
        while True:
            changed = self._changed
            while num_sent < len(finished):
                await stream.send(FrameKind.PART, finished[num_sent])
                num_sent += 1
            if peer in self.reduction.banned and not is_told:
                counted = self.reduction.delivered_by(peer)
                ban = Ban(reason=self.reduction.banned[peer][:400], counted=counted)
                await stream.send(FrameKind.BAN, ban.encode())
                is_told = True
            if num_sent < len(finished):
                continue
            if self.reduction.is_complete:
                ending = Ending(weights=self.reduction.weights(), banned=self.reduction.banned)
                await stream.send(FrameKind.ENDING, ending.encode())
                return
            if self.failure is not None:
                await stream.send(FrameKind.FAILURE, self.failure.encode())
                return
            try:
                async with asyncio.timeout(self._limits.chunk_seconds / SIGNS_OF_LIFE):
                    await changed.wait()
            except TimeoutError:
                await stream.send(FrameKind.WAIT)

    async def _finish_what_is_ready(self) -> None:
        started = self._loop.time()
        try:
            while self.reduction.is_ready:
                number = len(self.reduction.finished)
                decoded = self.reduction.finish_next()
                self._on_part(number, self.reduction.finished[number], decoded)
                if self._loop.time() - started > SLICE_OF_LOOP_SECONDS:
                    self._notify()
                    await asyncio.sleep(0)
                    started = self._loop.time()
        except ReductionFailed as exc:
            self.fail(exc.outcome, exc.detail)
        self._notify()

    def _ban_the_slow(self) -> None:
        now, limits = self._loop.time(), self._limits
        if (asleep := now - self._looked_at - limits.chunk_seconds / 2) > 0:
            # It is we who were silent, on a machine that was suspended or too busy: what has come is not read yet.
            self._heard_at = {peer: heard_at + asleep for peer, heard_at in self._heard_at.items()}
            self._called_for_at += asleep
        self._looked_at = now
        for peer in self.reduction.awaited():
            silent_since = self._heard_at.get(peer, self._called_for_at + limits.request_seconds)
            if now - silent_since > limits.chunk_seconds:
                self._ban(peer, f"{SLOW}silent for {now - silent_since:.0f} s")
        incomplete = self.reduction.incomplete()
        num_complete = len(self.reduction.weights())
        if now - self._began > LATEST_SENDER * limits.round_seconds and num_complete >= self.reduction.quorum:
            for peer in incomplete:
                self._ban(peer, f"{SLOW}not done after {now - self._began:.0f} s")

    def ban(self, peer: str, reason: str) -> None:
        """Go on without what this sender still owes."""
        self.reduction.ban(peer, reason[:400])
        self._notify()

    def _ban(self, peer: str, reason: str) -> None:
        if peer in self.reduction.incomplete():
            self.reduction.ban(peer, reason[:400])
            self._on_ban(peer, reason)
            logger.warning("sender_banned peer=%s epoch=%d reason=%s", peer, self._group.epoch, reason)
        self._notify()

    def _notify(self) -> None:
        """Wake everybody who waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()


async def refuse(stream: Stream, detail: str) -> None:
    """Say why, and wait for the caller to hang up; the caller of this bounds the wait."""
    await stream.send(FrameKind.FAILURE, Failure(outcome="failed", detail=detail[:400]).encode())
    await stream.discard_until_hangup()
