"""For a peer that missed something: the one average that it lacks, or the whole state.

Anybody can claim an epoch. A claim is believed when shown: by the average that led to it, or by a state of it. One
that nobody shows costs us some seconds, once in a while, and never the run.
"""

import logging
import random
import threading
import time
from collections.abc import Sequence

import torch

from calm_ray.errors import StateUnavailable
from calm_ray.swarm.holder import HeldState, StateHolder
from calm_ray.swarm.node import Swarm
from calm_ray.swarm.progress import ProgressTracker
from calm_ray.swarm.roster import Roster
from calm_ray.swarm.state import download_state
from calm_ray.swarm.wires import Wire

logger = logging.getLogger(__name__)

MAX_STATE_TRIES = 5
"""Downloads of the state before a peer gives up and lets its watchdog restart it."""
STATE_PAUSE_SECONDS = 2.0
STATE_TIMEOUT_SECONDS = 600.0
MAX_LATE_DONORS = 3
ROSTER_LAG_SECONDS = 3.0
"""Progress records may be read a moment before the roster of the same peers is."""
ROSTER_PAUSE_SECONDS = 0.3
DISBELIEVE_SECONDS = 30.0


class Catcher:
    """Blocking; for the rounds thread, or before it runs."""

    def __init__(
        self, swarm: Swarm, *, holder: StateHolder, wire: Wire, tracker: ProgressTracker, roster: Roster
    ) -> None:
        self._swarm, self._holder, self._wire, self._tracker, self._roster = swarm, holder, wire, tracker, roster

    def find(self, claimed: int, *, hint: str | None, stop: threading.Event) -> torch.Tensor | HeldState | None:
        """What brings us to the epoch that others claim: the average that we lack, or a state.

        `hint` is a peer that told us of it. None if nobody can show it, and most stand with us; StateUnavailable if
        most do not: we are then the ones who are lost.
        """
        own = self._holder.epoch
        ahead = self._ahead(own, hint=hint, stop=stop)
        if claimed == own + 1 and (average := self.read_late(ahead, epoch=own, first=hint)) is not None:
            return average
        are_many = len(ahead) > self._num_with_us(own)
        if ahead:
            try:
                return self.download(min_epoch=own + 1, stop=stop, max_tries=MAX_STATE_TRIES if are_many else 1)
            except StateUnavailable:
                if are_many:
                    raise
        if stop.is_set():
            return None
        logger.warning("epoch %d is claimed, and no peer shows a state of it: going on at %d", claimed, own)
        self._tracker.disbelieve(claimed, seconds=DISBELIEVE_SECONDS)
        if hint is not None:
            self._wire.distrust(hint)
        return None

    def _ahead(self, own: int, *, hint: str | None, stop: threading.Event) -> list[str]:
        """Full peers that say that they are past `own`."""
        deadline = time.monotonic() + ROSTER_LAG_SECONDS
        while True:
            holders = self._roster.refresh(timeout_seconds=ROSTER_LAG_SECONDS)
            ahead = {peer for peer, holder in holders.items() if holder.epoch > own} | ({hint} if hint else set())
            if ahead or time.monotonic() >= deadline or stop.wait(ROSTER_PAUSE_SECONDS):
                return sorted(ahead)

    def _num_with_us(self, own: int) -> int:
        """Others whose records say that they stand where we do, or did when we made our last step."""
        trainers = {peer for peer, record in self._tracker.records.items() if record.epoch in (own - 1, own)}
        holders = {peer for peer, holder in self._roster.holders.items() if holder.epoch in (own - 1, own)}
        return len((trainers | holders) - {self._swarm.peer_id})

    def read_late(self, donors: Sequence[str], *, epoch: int, first: str | None = None) -> torch.Tensor | None:
        """The averaged gradient that ended `epoch`, from one of `donors`; None if none of some has it.

        A sixth of the state's bytes in fp16 with AdamW, and the step gives the very bits of those who were there.
        """
        shuffled = random.sample(list(donors), len(donors))
        for donor in sorted(shuffled, key=lambda donor: donor != first)[:MAX_LATE_DONORS]:
            try:
                average = self._wire.fetch_last(donor, epoch=epoch)
            except Exception as exc:  # noqa: BLE001  one donor's failure of any kind: ask the next
                logger.info("late read epoch=%d donor=%s problem=%r", epoch, donor, exc)
                continue
            logger.info("late read epoch=%d donor=%s", epoch, donor)
            return average
        return None

    def download(self, *, min_epoch: int, stop: threading.Event, max_tries: int = MAX_STATE_TRIES) -> HeldState:
        """The swarm's state, checked against our model; StateUnavailable after some tries, or once `stop` is set."""
        for attempt in range(max_tries):
            if stop.wait(STATE_PAUSE_SECONDS * attempt):  # donors may be averaging: give them time to finish
                break
            try:
                state = download_state(
                    self._swarm, min_epoch=min_epoch, max_bytes=16 * self._holder.num_elements + (64 << 20),
                    timeout_seconds=STATE_TIMEOUT_SECONDS, check=self._holder.check,
                )  # fmt: skip
            except StateUnavailable as exc:
                logger.warning("%s", exc)
                continue
            logger.info("state downloaded epoch=%d donor=%s", state.epoch, state.donor)
            return state
        raise StateUnavailable(
            f"no peer gave us the state of epoch {min_epoch} or later in {max_tries} tries; "
            "are there full peers, or only clients?"
        )
