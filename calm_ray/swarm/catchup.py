"""For a peer that missed something: the one average that it lacks, or the whole state.

Anybody can claim an epoch. A claim is believed if about as many make it as stand where we do, or if two show the same
average that led to it. Another one costs us some seconds, once in a while, and never the run.
"""

import logging
import random
import threading
import time
from collections.abc import Sequence

import torch

from calm_ray.errors import StateUnavailable
from calm_ray.swarm.doing import Doing
from calm_ray.swarm.holder import HeldState, StateHolder
from calm_ray.swarm.node import Swarm
from calm_ray.swarm.progress import ProgressTracker
from calm_ray.swarm.roster import Roster
from calm_ray.swarm.state import download_state
from calm_ray.swarm.verdict import digest_of
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
        self, swarm: Swarm, *, holder: StateHolder, wire: Wire, tracker: ProgressTracker, roster: Roster, doing: Doing
    ) -> None:
        self._swarm, self._holder, self._wire, self._tracker, self._roster = swarm, holder, wire, tracker, roster
        self._doing = doing

    def find(self, claimed: int, *, hint: str | None, stop: threading.Event) -> torch.Tensor | HeldState | None:
        """What brings us to the epoch that others claim: the average that we lack, or a state.

        `hint` is a peer that told us of it. None if only few claim it and no two of them can show the same average; or
        if nobody could show anything. StateUnavailable if they are many: we are then the ones who are lost.
        """
        own = self._holder.epoch
        donors, are_many = self._ahead(own, claimed=claimed, hint=hint, stop=stop)
        if claimed == own + 1 and donors:
            average = self.read_late(donors, epoch=own, first=hint, must_agree=not are_many)
            if average is not None:
                return average
        if are_many:
            return self.download(min_epoch=own + 1, stop=stop)
        if not stop.is_set():
            logger.warning("epoch %d is claimed, and not by most: going on at %d", claimed, own)
            self._tracker.disbelieve(claimed, seconds=DISBELIEVE_SECONDS)
            if hint is not None:
                self._wire.distrust(hint)
        return None

    def _ahead(self, own: int, *, claimed: int, hint: str | None, stop: threading.Event) -> tuple[list[str], bool]:
        """Those who offer to show an epoch past `own`, and whether not fewer claim one than stand where we do.

        Records of the same moment are read at different times, so this waits a little for them to agree.
        """
        deadline = time.monotonic() + ROSTER_LAG_SECONDS
        while True:
            holders = self._roster.refresh(timeout_seconds=ROSTER_LAG_SECONDS)
            donors = {peer for peer, holder in holders.items() if holder.epoch > own} | ({hint} if hint else set())
            records = self._tracker.records
            past = donors | {peer for peer, record in records.items() if record.epoch > own}
            with_us = {peer for peer, record in records.items() if record.epoch in (own - 1, own)}
            with_us |= {peer for peer, holder in holders.items() if holder.epoch in (own - 1, own)}
            num_with_us = len(with_us - past - {self._swarm.peer_id})
            # One step ahead, half are enough: a member of a round of two out of three may have died since.
            are_many = bool(donors) and len(past) >= num_with_us + (claimed > own + 1)
            could_agree = claimed == own + 1 and len(donors) >= 2
            if are_many or could_agree or time.monotonic() >= deadline or stop.wait(ROSTER_PAUSE_SECONDS):
                return sorted(donors), are_many

    def read_late(
        self, donors: Sequence[str], *, epoch: int, first: str | None = None, must_agree: bool = False
    ) -> torch.Tensor | None:
        """The averaged gradient that ended `epoch`, from one of `donors`; None if none of some has it.

        `must_agree`: only if another of them stepped with the same one. A sixth of the state's bytes in fp16 with
        AdamW, and the step gives the very bits of those who were there.
        """
        shuffled = random.sample(list(donors), len(donors))
        seen: set[str] = set()
        for donor in sorted(shuffled, key=lambda donor: donor != first)[:MAX_LATE_DONORS]:
            try:
                average = self._wire.fetch_last(donor, epoch=epoch)
            except Exception as exc:  # noqa: BLE001  one donor's failure of any kind: ask the next
                logger.info("late read epoch=%d donor=%s problem=%r", epoch, donor, exc)
                continue
            digest = digest_of(average)
            if must_agree and digest not in seen:
                seen.add(digest)
                continue
            logger.info("late read epoch=%d donor=%s", epoch, donor)
            return average
        return None

    def download(self, *, min_epoch: int, stop: threading.Event) -> HeldState:
        """The swarm's state, checked against our model; StateUnavailable after some tries, or once `stop` is set."""
        for attempt in range(MAX_STATE_TRIES):
            if stop.wait(STATE_PAUSE_SECONDS * attempt):  # donors may be averaging: give them time to finish
                break
            self._doing.begin_download(self._holder.state_bytes)
            try:
                state = download_state(
                    self._swarm, min_epoch=min_epoch, max_bytes=16 * self._holder.num_elements + (64 << 20),
                    timeout_seconds=STATE_TIMEOUT_SECONDS, check=self._holder.check, avoid=self._wire.out_of_step,
                    on_progress=self._doing.note_downloaded,
                )  # fmt: skip
            except StateUnavailable as exc:
                logger.warning("%s", exc)
                continue
            finally:
                self._doing.end_download()
            logger.info("state downloaded epoch=%d donor=%s", state.epoch, state.donor)
            return state
        raise StateUnavailable(
            f"no peer gave us the state of epoch {min_epoch} or later in {MAX_STATE_TRIES} tries; "
            "are there full peers, or only clients?"
        )
