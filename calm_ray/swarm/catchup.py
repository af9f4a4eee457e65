"""For a peer that missed something: the one average that it lacks, or the whole state."""

import logging
import random
import threading
from collections.abc import Sequence

import torch

from calm_ray.errors import StateUnavailable
from calm_ray.swarm.holder import HeldState, StateHolder
from calm_ray.swarm.node import Swarm
from calm_ray.swarm.state import download_state
from calm_ray.swarm.wires import Wire

logger = logging.getLogger(__name__)

MAX_STATE_TRIES = 5
"""Downloads of the state before a peer gives up and lets its watchdog restart it."""
STATE_PAUSE_SECONDS = 2.0
STATE_TIMEOUT_SECONDS = 600.0
MAX_LATE_DONORS = 3


class Catcher:
    """Blocking; for the rounds thread, or before it runs."""

    def __init__(self, swarm: Swarm, *, holder: StateHolder, wire: Wire) -> None:
        self._swarm, self._holder, self._wire = swarm, holder, wire

    def read_late(self, donors: Sequence[str], *, epoch: int) -> torch.Tensor | None:
        """The averaged gradient that ended `epoch`, from one of `donors`; None if none of some has it.

        A sixth of the state's bytes in fp16 with AdamW, and the step gives the very bits of those who were there.
        """
        for donor in random.sample(list(donors), min(len(donors), MAX_LATE_DONORS)):
            try:
                average = self._wire.fetch_last(donor, epoch=epoch)
            except Exception as exc:  # noqa: BLE001  one donor's failure of any kind: ask the next
                logger.info("late read epoch=%d donor=%s problem=%r", epoch, donor, exc)
                continue
            logger.info("late read epoch=%d donor=%s", epoch, donor)
            return average
        return None

    def download(self, *, min_epoch: int, stop: threading.Event) -> HeldState:
        """The swarm's state, checked against our model; StateUnavailable after some tries, or once `stop` is set."""
        for attempt in range(MAX_STATE_TRIES):
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
            f"no peer gave us the state of epoch {min_epoch} or later in {MAX_STATE_TRIES} tries; "
            "are there full peers, or only clients?"
        )
