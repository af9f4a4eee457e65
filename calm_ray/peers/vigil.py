"""What a peer looks after while it works: its helpers, its line, its clock, its disk, its address, its name.

Each look ends in a warning next to the peer's state, which goes when the trouble goes; or in an error, if only a new
process can mend it. Runs on the reporter's thread, at most every LOOK_SECONDS.
"""

import contextlib
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from calm_ray.errors import CalmRayError, ConfigError, Moved, SwarmUnreachable
from calm_ray.peers.entry import Entry
from calm_ray.peers.known import PROBE_SECONDS, KnownPeers, one_each, save_known
from calm_ray.peers.place import has_moved, own_place
from calm_ray.report import PeerReport, ReportRejected, decode
from calm_ray.swarm.addresses import live_addresses, peer_at
from calm_ray.swarm.clock_offset import MAX_OFFSET_SECONDS, ClockOffset, ask_clocks, how_to_sync
from calm_ray.swarm.reconnect import reconnect

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
REMEMBER_SECONDS = 30.0
CLOCK_SECONDS = 300.0
FIRST_NAME_SECONDS, NAME_SECONDS = 20.0, 120.0
MAX_RECONNECT_PAUSE = 60.0
JUMP_SECONDS = 1.0
"""A wall clock that moves so far against the monotonic one was set by somebody."""
MAX_CLOCK_SECONDS = 30.0
"""Records are kept for a minute or two: a clock that is off by more makes them expire before anybody reads them."""
NUM_STRANGERS = 3
"""Desks that must tell their time before our clock keeps us out, unless they are the organiser's: one liar among three
does not move their median."""
LEAST_FREE_BYTES = 64 << 20
CLOCK_CALL_SECONDS = 20.0
NUM_UNANSWERED = 4
"""Calls in a row, of 15 s each, that one of our own processes leaves unanswered before we take it for lost."""
MAX_PROBED = 64


class Vigil:
    """`look()` now and then. `warn(about, text)` shows what is wrong; an empty text takes it back."""

    def __init__(self, entry: Entry, *, folder: Path, boot_id: str, warn: Callable[[str, str], None]) -> None:
        self._entry, self._swarm, self._folder, self._boot_id, self._warn = entry, entry.swarm, folder, boot_id, warn
        self._known: KnownPeers | None = None
        now = time.monotonic()
        self._look_at = self._remember_at = now
        self._clock_at, self._name_at = now + CLOCK_SECONDS, now + FIRST_NAME_SECONDS
        self._other: PeerReport | None = None
        self._wall_minus_monotonic = time.time() - now
        self._reconnect_at, self._reconnect_pause = now, LOOK_SECONDS
        self._had_company = bool(entry.former.addresses) or not entry.is_first
        self._lonely_since: float | None = None
        """Since when we have known no other node, though there were some."""
        self._place = own_place()
        self._auxiliary: frozenset[str] = frozenset()
        self._dialled: set[str] = set()
        """Addresses of neighbours that have accepted a connection."""

    def look(self) -> None:
        """Raises Moved, ConfigError if another process has our identity, or CalmRayError if one of ours hangs."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_SECONDS
        self._look_at_disk()
        self._look_at_address()
        self._look_at_helpers()
        try:
            self._look_at_line(now)
            self._look_at_clock(now)
            self._look_at_name(now)
        except (SwarmUnreachable, OSError, EOFError) as exc:
            logger.warning("vigil: %s", exc or type(exc).__name__)
        if now >= self._remember_at:
            self._remember_at = now + REMEMBER_SECONDS
            self._remember()

    # --- the line ----------------------------------------------------------------------------------------------------

    def _look_at_helpers(self) -> None:
        """Processes of ours that hang look like a line that is cut, for ever. Only they are asked: nobody else can make
        us start again."""
        for _ in range(NUM_UNANSWERED):
            stuck = self._swarm.lost_process() or self._swarm.stuck_process()
            if not stuck:
                return
            logger.warning("vigil: %s", stuck)
        raise CalmRayError(f"{stuck}: starting again")

    def _look_at_line(self, now: float) -> None:
        if self._swarm.routed_peers():
            self._had_company, self._lonely_since = True, None
            self._reconnect_pause = LOOK_SECONDS
            self._warn("line", "")
            return
        if not self._had_company:  # the first peer of a run, before anybody has come
            return
        if self._lonely_since is None:
            self._lonely_since = now
        self._warn("line", line_words(now - self._lonely_since))
        if now >= self._reconnect_at:
            self._reconnect_at = now + self._reconnect_pause
            self._reconnect_pause = min(MAX_RECONNECT_PAUSE, 1.5 * self._reconnect_pause)
            found = reconnect(self._swarm, [*self._entry.bootstrap, *self._addresses()])
            logger.info("reconnect lonely_seconds=%.0f num_found=%d", now - self._lonely_since, found)

    def _addresses(self) -> tuple[str, ...]:
        return (self._known or self._entry.former).addresses

    def _remember(self) -> None:
        """Who can be dialled: auxiliary peers first, then those we have known for longest; then those who have gone."""
        former = self._addresses()
        rank = {text: number for number, text in enumerate(former)}
        found = sorted(
            self._swarm.neighbours(),
            key=lambda text: (peer_at(text) not in self._auxiliary, rank.get(text, len(rank))),
        )[:MAX_PROBED]
        self._dialled &= set(found)
        if untried := [text for text in found if text not in self._dialled]:
            with contextlib.suppress(SwarmUnreachable):
                self._dialled.update(live_addresses(untried, timeout_seconds=PROBE_SECONDS))
        there = [text for text in found if text in self._dialled]
        known = self._entry.known.model_copy(update={"addresses": one_each([*there, *former])})
        if known != self._known:
            self._known = known
            save_known(self._folder, known)

    # --- the clock ---------------------------------------------------------------------------------------------------

    def check_clock(self) -> None:
        """At the start. ConfigError if the clock is too far off to take part at all, and no stranger can feign it."""
        offset, is_sure = self._ask_clocks()
        if offset is not None and is_sure and offset.is_agreed and offset.exceeds(MAX_CLOCK_SECONDS):
            raise ConfigError(clock_words(offset.offset_seconds))
        self._tell_of(offset)

    def _look_at_clock(self, now: float) -> None:
        drift = time.time() - now - self._wall_minus_monotonic
        has_jumped = abs(drift) > JUMP_SECONDS
        if has_jumped:
            self._wall_minus_monotonic += drift
            logger.warning("the clock was set: it went %.1f s %s", abs(drift), "forward" if drift > 0 else "back")
        if has_jumped or now >= self._clock_at:
            self._clock_at = now + CLOCK_SECONDS
            self._tell_of(self._ask_clocks()[0])

    def _tell_of(self, offset: ClockOffset | None) -> None:
        if offset is None or not offset.is_agreed:
            return
        is_off = offset.exceeds(MAX_OFFSET_SECONDS)
        self._warn("clock", clock_words(offset.offset_seconds) if is_off else "")

    def _ask_clocks(self) -> tuple[ClockOffset | None, bool]:
        """What desks say, and whether it is sure: the invite's are the organiser's, any others may be anybody's."""
        for addresses, least in ((self._entry.bootstrap, 1), (self._addresses(), NUM_STRANGERS)):
            desks = [peer for peer in map(peer_at, addresses) if peer not in ("", self._swarm.peer_id)]
            offset = self._ask_desks(desks) if desks else None
            if offset is not None:
                return offset, offset.num_desks >= least
        return None, False

    def _ask_desks(self, desks: list[str]) -> ClockOffset | None:
        return self._swarm.call(
            lambda p2p: ask_clocks(p2p, desks, run_id=self._swarm.run_id), timeout_seconds=CLOCK_CALL_SECONDS
        )

    # --- the disk, the address, the name -----------------------------------------------------------------------------

    def _look_at_disk(self) -> None:
        try:
            free = shutil.disk_usage(self._folder).free
        except OSError as exc:
            self._warn("disk", f"{self._folder}: {exc.strerror}")
            return
        self._warn("disk", disk_state(self._folder, free=free, is_writable=os.access(self._folder, os.W_OK)))

    def _look_at_address(self) -> None:
        now = own_place()
        if has_moved(self._place, now):
            raise Moved(f"this machine's address has changed from {self._place} to {now}: joining again")

    def _look_at_name(self, now: float) -> None:
        """Two processes with one identity: the DHT shows now one's report, now the other's. One of them gives way."""
        if now < self._name_at:
            return
        other, before = self._other_report(), self._other
        self._other = other
        self._name_at = now + (LOOK_SECONDS if other is not None else NAME_SECONDS)
        if other is None or before is None or other.boot_id != before.boot_id or other == before:
            self._warn("name", "")
            return
        words = name_words(self._folder)
        if self._boot_id > other.boot_id:
            raise ConfigError(words)
        self._warn("name", words)

    def _other_report(self) -> PeerReport | None:
        """What is under our name and is not from us. By the way, who is an auxiliary peer."""
        other, auxiliary = None, set()
        for owner, data in self._swarm.snapshot():
            with contextlib.suppress(ReportRejected):
                report = decode(data)
                if report.role == "auxiliary":
                    auxiliary.add(owner)
                if owner == self._swarm.peer_id and report.boot_id != self._boot_id:
                    other = report
        self._auxiliary = frozenset(auxiliary)
        return other


def name_words(folder: Path) -> str:
    """Two peers bear one identity."""
    return (
        f"{folder}: its identity is in use by another process, perhaps on another machine with a copy of this folder; "
        "choose another --folder, or delete identity.key in one of the two"
    )


def line_words(seconds: float) -> str:
    """For somebody whose line has failed, or who is the last one there."""
    age = f"{seconds / 60:.0f} min" if seconds >= 60 else "some seconds"  # not each second anew: it is printed
    return f"cut off: nobody of the swarm has answered for {age}; trying those that we knew, again and again"


def clock_words(offset_seconds: float) -> str:
    """`offset_seconds`: our clock minus the swarm's."""
    side = "ahead of" if offset_seconds > 0 else "behind"
    remedy = how_to_sync(platform=sys.platform, is_wsl="microsoft" in platform.release().lower())
    return f"this machine's clock is {abs(offset_seconds):.1f} s {side} the swarm's; {remedy}"


def disk_state(folder: Path, *, free: int, is_writable: bool) -> str:
    """What is wrong with a disk, or nothing."""
    if not is_writable:
        return f"{folder}: cannot be written, the disk may be read-only: logs and checkpoints are lost until it can"
    if free < LEAST_FREE_BYTES:
        return f"{folder}: less than {LEAST_FREE_BYTES >> 20} MB free: make room, or logs and checkpoints are lost"
    return ""
