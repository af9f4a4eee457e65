"""What every role has in common: come to the desk, join the swarm, publish reports, tell the watchdog, leave."""

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from calm_ray import __version__
from calm_ray.config import RunTable
from calm_ray.errors import CalmRayError, SwarmUnreachable
from calm_ray.invite import decode_invite
from calm_ray.peers.entry import enter
from calm_ray.peers.judge import BEAT_SECONDS, Pulse
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus
from calm_ray.peers.vigil import Vigil
from calm_ray.report import PeerReport, State, encode
from calm_ray.swarm.node import Swarm

logger = logging.getLogger(__name__)

Facts = Callable[[], dict[str, Any]]
Pulses = Callable[[], Mapping[str, Pulse]]
LOST_EXIT_CODE = 1
LEAST_REPORT_ALLOWANCE, REPORTS_MISSED = 300.0, 3.0
"""Seconds, and turns of the reporter, without a report that the DHT took. A call ends after 15 s, whatever happens."""


class PeerContext:
    """One peer's place in its run. `join` blocks; afterwards `swarm`, `run` and `bundle` are there."""

    swarm: Swarm
    run: RunTable
    bundle: Path
    is_first: bool
    """Nobody was there to join: we are the swarm's first peer."""

    def __init__(self, spec: PeerSpec, *, status_fd: int) -> None:
        self.spec = spec
        self.boot_id = uuid.uuid4().hex
        self.stop = threading.Event()
        self._status = PeerStatus(role=spec.role)
        self._status_file = os.fdopen(status_fd, "wb")
        self._lock = threading.Lock()
        self._facts: Facts = dict
        self._pulses: Pulses = dict
        self._words: Callable[[], str] = str
        self._num_reports = 0
        self._warnings: dict[str, str] = {}

    # --- joining -----------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Get the bundle and become a member of the DHT; see `entry.enter` for what it raises."""
        if self.spec.invite is not None:
            self._update(run_id=decode_invite(self.spec.invite).run_id)
        entry = enter(self.spec, say=lambda words: self.tell("joining", words))
        self.swarm, self.run, self.bundle, self.is_first = entry.swarm, entry.run, entry.bundle, entry.is_first
        self._update(
            run_id=self.run.run_id, config_hash=self.run.config_hash(), peer_id=self.swarm.peer_id,
            is_client_mode=entry.is_client_mode,
            addresses=() if entry.is_client_mode else tuple(self.swarm.addresses()),
        )  # fmt: skip
        self._vigil = Vigil(entry, folder=self.spec.folder, boot_id=self.boot_id, warn=self.warn)
        try:
            self._vigil.check_clock()
        except (SwarmUnreachable, OSError, EOFError) as exc:  # nobody answers in time: it is compared again, later
            logger.warning("clock not compared: %s", str(exc) or type(exc).__name__)

    # --- telling -----------------------------------------------------------------------------------------------------

    def tell(self, state: State, detail: str = "", **fields: Any) -> None:
        """Say what we are doing, to the watchdog at once and to the swarm with the next report."""
        self._update(state=state, detail=detail, **fields)

    @property
    def state(self) -> str:
        return self._status.state

    def note_success(self, at: float) -> None:
        """What this role is for has just gone well; told with the next beat."""
        with self._lock:
            self._status = self._status.model_copy(update={"last_success_at": at})

    def warn(self, about: str, text: str) -> None:
        """Show what is wrong `about` something, next to what we are doing; an empty text takes it back."""
        if self._warnings.get(about, "") == text:
            return
        if not text or about not in self._warnings:
            logger.warning("%s: %s", about, text or "well again")
        self._warnings = {key: value for key, value in {**self._warnings, about: text}.items() if value}
        self._update(warnings=tuple(self._warnings.values()))

    def _beat_for_ever(self) -> None:
        """Show the watchdog that this process runs, and what in it makes progress."""
        while not self.stop.wait(BEAT_SECONDS):
            allowance = reports_allowance(self.run.report_seconds)
            pulses = {"reports": Pulse(count=self._num_reports, allowance_seconds=allowance), **self._pulses()}
            self._update(pulses=pulses, doing=self._words())
            if lost := self.swarm.lost_process():
                self._end(lost, LOST_EXIT_CODE)

    def fail(self, message: str) -> None:
        """The last word before an exit."""
        self._update(state="leaving", error=message)

    def _update(self, **fields: Any) -> None:
        with self._lock:
            self._status = self._status.model_copy(update=fields)
            if not self._status_file.closed:
                self._status_file.write(self._status.model_dump_json().encode() + b"\n")
                self._status_file.flush()

    def report_with(self, facts: Facts, *, pulses: Pulses = dict, words: Callable[[], str] = str) -> None:
        """Publish a report every `report_seconds` from now on, its changing fields from `facts`.

        `pulses` for the watchdog to judge our progress by, `words` for what we are doing at this moment.
        """
        self._facts, self._pulses, self._words = facts, pulses, words
        for target in (self._beat_for_ever, self._report_for_ever):  # only now: hivemind forks while we join
            threading.Thread(target=target, name=target.__name__, daemon=True).start()

    def _report_for_ever(self) -> None:
        while not self.stop.is_set():
            started = time.monotonic()
            try:
                self._vigil.look()  # before we publish: who else uses our name shows only until then
            except CalmRayError as exc:
                self._end(str(exc), exc.exit_code)
            except (OSError, EOFError) as exc:
                logger.warning("vigil: %s", str(exc) or type(exc).__name__)
            if self.stop.is_set():
                return  # what we published now would stay behind: our goodbye is out, or on its way
            self.publish()
            self.stop.wait(max(0.1, self.run.report_seconds - (time.monotonic() - started)))

    def _end(self, message: str, code: int) -> None:
        """The watchdog starts us again, or not; no thread here can mend it."""
        if not self.stop.is_set():
            self.fail(message)
            os._exit(code)

    def publish(self) -> None:
        """Publish one report now; a DHT that does not answer is only logged, for the next report replaces this one.

        But it is no progress: a DHT process that hangs looks alive to everybody else.
        """
        report = PeerReport(
            peer_id=self.swarm.peer_id, boot_id=self.boot_id, role=self.spec.role, name=self.spec.peer.name,
            version=__version__, config_hash=self.run.config_hash(), is_client_mode=self._status.is_client_mode,
            published_at=time.time(), **{"state": self._status.state, **self._facts()},
        )  # fmt: skip
        try:
            self.swarm.publish(encode(report), lifetime_seconds=self.run.report_lifetime_seconds)
            self._num_reports += 1
        except SwarmUnreachable as exc:
            logger.warning("report not published: %s", exc)
        self._update(report=report)

    def close(self) -> None:
        """Leave the swarm."""
        self.stop.set()
        if hasattr(self, "swarm"):
            self.swarm.withdraw(lifetime_seconds=self.run.report_lifetime_seconds)
            self.swarm.close()


def reports_allowance(report_seconds: float) -> float:
    """Seconds that a peer may go without publishing a report, if it means to publish every `report_seconds`."""
    return max(LEAST_REPORT_ALLOWANCE, REPORTS_MISSED * report_seconds)
