"""Keep one peer: adopt or start its watchdog, look at it every second, start it again when it was killed.

A Ray actor's thread, without Ray. The watchdog restarts its child; who restarts the watchdog is here. Both count on the
same ledger in the slot's folder, so that a peer that cannot live is parked once, whoever notices.
"""

import contextlib
import fcntl
import json
import logging
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from calm_ray.actors.desired import Orders, bundle_digest
from calm_ray.errors import CalmRayError
from calm_ray.peers.budget import Cause, Failure, Ledger, LedgerFile, decide, read_ledger
from calm_ray.peers.control import ControlClient
from calm_ray.peers.handle import KILLED_CODE, PeerHandle
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
FOLDER_SECONDS = 20.0
"""For a peer that is on its way out: a trainer that lost its lease has ten seconds."""
STOP_SECONDS = 45.0
"""A start that is under way ends first."""
KNOWN_FILE = "known-peers.json"
"""Of `peers/known.py`, which a Ray worker does not import for its libraries' sake."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What became of a watchdog: `cause` is None while there is nothing to do, or nothing more to do."""

    cause: Cause | None = None
    why: str = ""


def judge_end(status: PeerStatus, *, num_epochs: int) -> Look:
    """A peer that has left: done, parked, or to be started again?"""
    if status.exit_code is None or status.state == "parked":
        return Look()
    if status.exit_code == KILLED_CODE:
        return Look(cause="killed", why="its watchdog was killed")
    if status.report is not None and status.report.epoch >= num_epochs:
        return Look()
    return Look(cause="crashed", why=status.error or f"left before the last epoch, with code {status.exit_code}")


class Keeper:
    """One peer's. `start()` begins; `status` and `is_adopted` may be read from any thread."""

    def __init__(self, orders: Orders, *, environment: dict[str, str] | None = None) -> None:
        self._orders, self._environment = orders, environment or {}
        self.status = PeerStatus(role=orders.spec.role)
        self.is_adopted = False
        self.num_revivals = 0
        self._handle: PeerHandle | None = None
        self._due_at: float | None = 0.0
        """Monotonic; None while it runs, or has ended for good."""
        self._ledger = Ledger()
        """Should the disk forget it."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> int:
        """Leave and wait; the peer's exit code."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS)
        return self._handle.stop() if self._handle is not None else 0

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.turn()
            except Exception:
                logger.exception("folder=%s action=look-again", self._orders.spec.folder)
            self._stop.wait(LOOK_SECONDS)

    def turn(self) -> None:
        """Look once, and do what is due."""
        if self._due_at is not None:
            if time.monotonic() >= self._due_at:
                self._start_peer()
            return
        if self._handle is None:
            return
        self.status = self._handle.status()
        if self.status.exit_code is None and not self._handle.is_held and answers(self._orders.spec.folder):
            self._start_peer()  # it was too busy to answer, and our lease is gone: take it again
            return
        look = judge_end(self.status, num_epochs=self._orders.num_epochs)
        if look.cause is not None:
            self._handle = None
            self._fail(look.cause, look.why)

    def _start_peer(self) -> None:
        spec = self._orders.spec
        wait_for_folder(spec.folder, is_adoptable=spec.role != "trainer", stop=self._stop)
        if not is_taken(spec.folder):
            forgive(spec.folder, before=self._orders.asked_at)
            ledger = read_ledger(spec.folder)
            if ledger.is_parked(now=time.time()):
                self._park(ledger.parked_why)
                return
            remember_addresses(self._orders)
        if self._stop.is_set():
            return
        handle = PeerHandle(fit(self._orders), environment=self._environment)
        try:
            handle.start(config_hash=self._orders.config_hash)
        except CalmRayError as exc:
            self._fail("crashed", str(exc))
            return
        self._handle, self._due_at, self.is_adopted = handle, None, handle.is_adopted
        self.status = handle.status()
        logger.info("folder=%s action=%s pid=%d", spec.folder, "adopt" if handle.is_adopted else "start", handle.pid)

    def _fail(self, cause: Cause, why: str) -> None:
        """Count it, and start again after a pause, or park."""
        file = LedgerFile(self._orders.spec.folder)
        has_worked = self.status.last_success_at is not None
        now = time.time()
        before = file.ledger if file.ledger.failures else self._ledger  # a disk may refuse to remember
        self._ledger = ledger = before.with_failure(Failure(at=now, cause=cause, why=why, has_worked=has_worked))
        decision = decide(ledger.failures, now=now)
        if decision.park:
            file.keep(ledger.parked(decision.park, now=now))
            self._park(decision.park)
            return
        file.keep(ledger.with_restart(cause))
        pause = decision.pause_seconds * random.uniform(0.5, 1.0)
        self.num_revivals += 1
        self._due_at = time.monotonic() + pause
        self.status = self.status.model_copy(
            update={
                "state": "restarting", "exit_code": None, "last_success_at": None,
                "detail": f"{why}; trying again in {pause:.0f} s, log: {self._orders.spec.log_path}",
            }
        )  # fmt: skip
        logger.info("folder=%s action=restart pause_seconds=%.1f why=%r", self._orders.spec.folder, pause, why)

    def _park(self, why: str) -> None:
        self._due_at = None
        exit_code = self.status.exit_code if self.status.exit_code is not None else 1
        self.status = self.status.model_copy(update={"state": "parked", "error": why, "exit_code": exit_code})
        logger.info("folder=%s action=park why=%r", self._orders.spec.folder, why)


def wait_for_folder(folder: Path, *, is_adoptable: bool, stop: threading.Event) -> None:
    """Until nobody is there, or somebody whom we may adopt. Gives up after FOLDER_SECONDS."""
    deadline = time.monotonic() + FOLDER_SECONDS
    while is_taken(folder) and time.monotonic() < deadline and not stop.is_set():
        if is_adoptable and answers(folder):
            return
        stop.wait(0.1)


def is_taken(folder: Path) -> bool:
    """Whether a watchdog holds the folder's lock."""
    try:
        with (folder / "lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def answers(folder: Path) -> bool:
    try:
        ControlClient(folder).close()
    except OSError:
        return False
    return True


def forgive(folder: Path, *, before: float) -> None:
    """A person has asked for this peer, and has surely mended what had parked it by then. The folder is nobody's."""
    file = LedgerFile(folder)
    if file.ledger.failures and file.ledger.failures[-1].at < before:
        file.keep(file.ledger.pardoned())


def fit(orders: Orders) -> PeerSpec:
    """The spec on this machine: the bundle where it lies, and no checkpoints where there are none."""
    spec = orders.spec
    if spec.bundle is not None:
        spec = spec.model_copy(update={"bundle": find_bundle(orders) or spec.bundle})
    if spec.resume is not None and not spec.resume.is_dir():
        spec = spec.model_copy(update={"resume": None})
    return spec


def find_bundle(orders: Orders) -> Path | None:
    """The folder on this machine that holds the run's bundle."""
    assert orders.spec.bundle is not None
    places = (orders.spec.bundle, own_bundle(orders))
    return next((place for place in places if bundle_digest(place) == orders.bundle_digest), None)


def own_bundle(orders: Orders) -> Path:
    """Where a bundle is put that was handed over."""
    return orders.spec.folder / "bundle"


def remember_addresses(orders: Orders) -> None:
    """On a blank machine, tell the peer where its swarm is; otherwise it knows better."""
    path = orders.spec.folder / KNOWN_FILE
    if orders.spec.bundle is None or not orders.known_addresses or path.exists():
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"addresses": orders.known_addresses}))
