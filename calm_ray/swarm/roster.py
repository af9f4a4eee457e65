"""Which full peers hold the state, and at which epoch: a DHT record that each of them renews, read by everyone.

It is hivemind's own record (`{run_id}_state_averager.all_averagers`, subkey = peer id, value = priority), so newcomers
of either kind find donors in it. The priority is the epoch, plus one half for auxiliary peers: they have no gradients
to compute, so they are asked first. Cost: each peer reads one record of N entries every `refresh_seconds`,
or less often in a large swarm.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hivemind.p2p import PeerID
from hivemind.utils import get_dht_time

from calm_ray.errors import SwarmUnreachable
from calm_ray.swarm.node import Swarm

logger = logging.getLogger(__name__)

LIFETIME_SECONDS = 60.0
RENEW_SECONDS = 20.0
MIN_PAUSE_SECONDS = 1.0
"""Between two of our own writes: an epoch may be shorter than that."""
PAUSE_SECONDS_PER_PEER = 0.02
"""Each peer reads what all wrote, so the time between two reads grows with their number."""
EARLY_SECONDS = 60.0
"""Many peers start together, and those who know few others take them for the swarm: read often at first."""
MAX_PEERS = 4096


@dataclass(frozen=True, kw_only=True)
class Holder:
    """One peer that offers its state."""

    epoch: int
    is_auxiliary: bool
    expires_at: float = math.inf
    """DHT time. It renews its offer every RENEW_SECONDS, for LIFETIME_SECONDS each time."""

    def is_fresh(self, *, now: float) -> bool:
        """Whether it has renewed its offer lately: one renewal may get lost."""
        return self.expires_at - now > LIFETIME_SECONDS - 2.5 * RENEW_SECONDS


def state_prefix(run_id: str) -> str:
    """DHT prefix under which a run's training state is averaged and offered."""
    return f"{run_id}_state_averager"


def parse_roster(entries: Any, *, own_peer_id: str) -> dict[str, Holder]:
    """Pure: what strangers wrote, as far as it makes sense; at most MAX_PEERS of them."""
    holders: dict[str, Holder] = {}
    for peer, entry in list(entries.items())[:MAX_PEERS] if isinstance(entries, Mapping) else ():
        value = getattr(entry, "value", None)
        if not isinstance(peer, bytes) or not isinstance(value, int | float) or not 0 <= value < 1e9:
            continue
        peer_id = PeerID(peer).to_base58()
        if peer_id != own_peer_id:
            expires_at = getattr(entry, "expiration_time", math.inf)
            holders[peer_id] = Holder(epoch=int(value), is_auxiliary=value % 1 == 0.5, expires_at=expires_at)
    return holders


class Roster:
    """Reads the record in a thread of its own; `offer` makes us part of it."""

    def __init__(self, swarm: Swarm, *, refresh_seconds: float) -> None:
        self._swarm, self._refresh_seconds = swarm, refresh_seconds
        self._key = f"{state_prefix(swarm.run_id)}.all_averagers"
        self._holders: Mapping[str, Holder] = MappingProxyType({})
        self._offer: Callable[[], float | None] = lambda: None
        self._stop, self._wake = threading.Event(), threading.Event()
        self._served = threading.Condition()
        self._num_asked = self._num_served = 0
        self._thread = threading.Thread(target=self._run, name="roster", daemon=True)
        self._thread.start()

    @property
    def holders(self) -> Mapping[str, Holder]:
        """Peer id -> what it offers, ourselves not among them; as of the last read."""
        return self._holders

    def offer(self, priority: Callable[[], float | None]) -> None:
        """Publish `priority()` from now on; None: nothing. Ask for it again with `wake` when it has changed."""
        self._offer = priority
        self._wake.set()

    def wake(self) -> None:
        self._wake.set()

    def refresh(self, *, timeout_seconds: float) -> Mapping[str, Holder]:
        """Read the record now."""
        with self._served:
            self._num_asked += 1
            ticket = self._num_asked
            self._wake.set()
            self._served.wait_for(lambda: self._num_served >= ticket or self._stop.is_set(), timeout_seconds)
        return self._holders

    def close(self) -> None:
        """Withdraw our offer and end."""
        self._offer = lambda: None
        self._stop.set()
        self._wake.set()
        with self._served:
            self._served.notify_all()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        written, written_at, born_at = None, 0.0, time.monotonic()
        while True:
            is_last = self._stop.is_set()
            offered = self._offer()
            is_due = offered != written or (offered is not None and time.monotonic() > written_at + RENEW_SECONDS)
            if is_due and self._write(offered):
                written, written_at = offered, time.monotonic()
            if is_last:
                return
            self._read_once()
            pause = self._refresh_seconds if time.monotonic() > born_at + EARLY_SECONDS else MIN_PAUSE_SECONDS
            has_waiters = self._wake.wait(max(pause, PAUSE_SECONDS_PER_PEER * len(self._holders)))
            self._wake.clear()
            if has_waiters and offered is not None and time.monotonic() < written_at + MIN_PAUSE_SECONDS:
                self._stop.wait(0.2)

    def _write(self, value: float | None) -> bool:
        try:
            return bool(
                self._swarm.store(
                    self._key, subkey=self._swarm.dht.peer_id.to_bytes(), value=value,
                    expiration_time=get_dht_time() + LIFETIME_SECONDS,
                )
            )  # fmt: skip
        except SwarmUnreachable as exc:
            logger.warning("roster not written: %s", exc)
            return False

    def _read_once(self) -> None:
        ticket = self._num_asked
        try:
            found = self._swarm.get(self._key)
        except SwarmUnreachable as exc:
            logger.warning("roster not read: %s", exc)
            return
        self._holders = MappingProxyType(parse_roster(found, own_peer_id=self._swarm.peer_id))
        with self._served:
            self._num_served = ticket
            self._served.notify_all()
