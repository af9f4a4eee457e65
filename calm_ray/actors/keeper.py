"""Keep one peer: adopt or start its watchdog, look at it every second, start it again when it was killed.

A Ray actor's thread, without Ray. The watchdog restarts its child; who restarts the watchdog is here. Both count on the
same ledger in the slot's folder, so that a peer that cannot live is parked once, whoever notices. A parked one is tried
again after PARKED_SECONDS, or when a person asks for it: what had parked it may be mended by then.
"""

import contextlib
import logging
import random
import threading
import time
from pathlib import Path

from calm_ray.actors.bundles import find_bundle
from calm_ray.actors.desired import Orders
from calm_ray.errors import CalmRayError, StateUnavailable
from calm_ray.peers import known
from calm_ray.peers.budget import PARKED_SECONDS, Cause, Failure, Ledger, LedgerFile, read_ledger
from calm_ray.peers.control import CALL_TIMEOUT_SECONDS, ask
from calm_ray.peers.endings import Ending, cause_of, disk_words
from calm_ray.peers.handle import KILLED_CODE, START_SECONDS, STOP_SECONDS, PeerHandle
from calm_ray.peers.lock import holder
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
FOLDER_SECONDS = 20.0
"""For a peer that is on its way out: a trainer that lost its lease has ten seconds."""
START_LIMIT_SECONDS = START_SECONDS + 2 * CALL_TIMEOUT_SECONDS
"""Of a start that is under way: it asks who is there, launches, and takes the lease."""
LEAVE_SECONDS = START_LIMIT_SECONDS + STOP_SECONDS
"""For `Keeper.stop`, at the worst."""


def judge_end(status: PeerStatus, *, num_epochs: int) -> Ending:
    """A peer that has left and is not parked. The `cause` is None if it has done all that it had to."""
    code = status.exit_code or 0
    if code == KILLED_CODE:
        return Ending(exit_code=code, cause="killed", why="its watchdog was killed")
    if status.report is not None and status.report.epoch >= num_epochs:
        return Ending(exit_code=code, cause=None)
    return Ending(exit_code=code, cause="crashed", why=status.error or f"left before the last epoch, with code {code}")


class Keeper:
    """One peer's. `start()` begins; `status`, `asked_at` and `is_adopted` may be read from any thread."""

    def __init__(self, orders: Orders, *, environment: dict[str, str] | None = None, has_news: bool = True) -> None:
        """`has_news`: the orders have just been given."""
        self._orders, self._environment, self._has_news = orders, environment or {}, has_news
        self.status = PeerStatus(role=orders.spec.role)
        self.is_adopted = False
        self.num_revivals = 0
        self.asked_at = self._heard_at = self._forgive_before = orders.asked_at
        """By the clock of whoever asked; what is forgiven is by ours as well."""
        self._handle: PeerHandle | None = None
        self._due_at: float | None = 0.0
        """Monotonic: when to start it. None while it runs, or has done all it had to."""
        self._ledger = Ledger()
        """Should the disk forget it."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ask_again(self, asked_at: float) -> None:
        """A person asks for this peer: if it is parked, or waits to be started again, it starts now."""
        self._heard_at = max(self._heard_at, asked_at)

    def stop(self) -> int:
        """Leave and wait; the peer's exit code. Whoever else runs in the folder leaves as well. CalmRayError if it does
        not, or if a start that is under way does not come to an end."""
        folder = self._orders.spec.folder
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(START_LIMIT_SECONDS)
            if self._thread.is_alive():
                raise CalmRayError(f"{folder}: a start that was under way has not ended")
        if self._handle is not None:
            return self._handle.stop()
        if ask(folder, "stop") is not None and not ends_within(folder, STOP_SECONDS):
            raise CalmRayError(f"{folder}: process {holder(folder)} does not leave")
        return 0

    def _run(self) -> None:
        while not self._stop.is_set():
            self.turn()
            self._stop.wait(LOOK_SECONDS)

    def turn(self) -> None:
        """Look once, and do what is due. Whatever goes wrong is counted, told in the status, and paused after."""
        if self._heard_at > self.asked_at:
            self._heed()
        try:
            if self._due_at is not None:
                if time.monotonic() >= self._due_at:
                    self._start_peer()
            elif self._handle is not None:
                self._look(self._handle)
        except CalmRayError as exc:
            self._fail(cause_of(exc.exit_code), str(exc))
        except OSError as exc:
            self._fail("disk", f"{self._orders.spec.folder}: {disk_words(exc)}")
        except Exception as exc:
            logger.exception("folder=%s", self._orders.spec.folder)
            self._fail("crashed", f"{type(exc).__name__}: {exc} (this is a bug; please report it with the actor's log)")

    def _heed(self) -> None:
        heard_at = self._heard_at
        self._forgive_before = max(heard_at, time.time())
        self._ledger = Ledger()
        if self._due_at is not None:
            self._due_at = 0.0
        if self.status.state == "parked":
            self._wake()
        self.asked_at = heard_at  # last: who reads it must not find what this forgives

    def _look(self, handle: PeerHandle) -> None:
        self.status = handle.status()
        if self.status.exit_code is None:
            if not handle.is_held and ask(self._orders.spec.folder) is not None:
                self._start_peer()  # it was too busy to answer, and our lease is gone: take it again
            return
        if self.status.state == "parked":
            self._park(self.status.error)
            return
        ending = judge_end(self.status, num_epochs=self._orders.num_epochs)
        if ending.cause is not None:
            self._fail(ending.cause, ending.why)

    def _start_peer(self) -> None:
        spec = self._orders.spec
        if self.status.state == "parked":
            self._wake()
        wait_for_folder(spec.folder, is_adoptable=spec.role != "trainer", stop=self._stop)
        if not holder(spec.folder):
            forgive(spec.folder, before=self._forgive_before)
            ledger, now = read_ledger(spec.folder), time.time()
            if ledger.parked_at is not None and ledger.is_parked(now=now):
                self._park(ledger.parked_why, seconds=ledger.parked_at + PARKED_SECONDS - now)
                return
            require_beginning(self._orders)
            remember_addresses(self._orders, is_news=self._has_news)
            self._has_news = False
        if self._stop.is_set():
            return
        handle = PeerHandle(fit(self._orders), environment=self._environment)
        handle.start(config_hash=self._orders.config_hash)
        self._handle, self._due_at, self.is_adopted = handle, None, handle.is_adopted
        self.status = handle.status()
        logger.info("folder=%s action=%s pid=%d", spec.folder, "adopt" if handle.is_adopted else "start", handle.pid)

    def _fail(self, cause: Cause, why: str) -> None:
        """Count it, and start again after a pause, or park."""
        file, now = LedgerFile(self._orders.spec.folder), time.time()
        if not file.ledger.failures:
            file.ledger = self._ledger  # a disk may refuse to remember
        has_worked = self.status.last_success_at is not None
        decision = file.record(Failure(at=now, cause=cause, why=why, has_worked=has_worked), now=now)
        self._ledger = file.ledger
        if decision.park:
            self._park(decision.park)
            return
        pause = decision.pause_seconds * random.uniform(0.5, 1.0)
        self.num_revivals += 1
        self._handle, self._due_at = None, time.monotonic() + pause
        detail = f"{why}; trying again in {pause:.0f} s, log: {self._orders.spec.log_path}"
        self._become("restarting", detail=detail)
        logger.info("folder=%s action=restart pause_seconds=%.1f why=%r", self._orders.spec.folder, pause, why)

    def _park(self, why: str, *, seconds: float = PARKED_SECONDS) -> None:
        self._handle, self._due_at = None, time.monotonic() + seconds
        exit_code = self.status.exit_code if self.status.exit_code is not None else 1
        self.status = self.status.model_copy(update={"state": "parked", "error": why, "exit_code": exit_code})
        logger.info("folder=%s action=park seconds=%.0f why=%r", self._orders.spec.folder, seconds, why)

    def _wake(self) -> None:
        """It is parked, and tried once more."""
        self.num_revivals += 1
        self._become("starting", detail=f"it had given up: {self.status.error}")

    def _become(self, state: str, *, detail: str) -> None:
        self.status = self.status.model_copy(
            update={"state": state, "detail": detail, "error": "", "exit_code": None, "last_success_at": None}
        )


def wait_for_folder(folder: Path, *, is_adoptable: bool, stop: threading.Event) -> None:
    """Until nobody is there, or somebody whom we may adopt. Gives up after FOLDER_SECONDS."""
    deadline = time.monotonic() + FOLDER_SECONDS
    while holder(folder) and time.monotonic() < deadline and not stop.is_set():
        if is_adoptable and ask(folder) is not None:
            return
        stop.wait(0.1)


def ends_within(folder: Path, seconds: float) -> bool:
    """Whether nobody holds the folder any more after so long."""
    deadline = time.monotonic() + seconds
    while held := bool(holder(folder)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return not held


def forgive(folder: Path, *, before: float) -> None:
    """A person has asked for this peer, and has surely mended what had parked it by then. The folder is nobody's."""
    file = LedgerFile(folder)
    if file.ledger.failures and file.ledger.failures[-1].at <= before:
        file.keep(file.ledger.pardoned())


def require_beginning(orders: Orders) -> None:
    """StateUnavailable where the first auxiliary peer would begin the run anew without a word: on a machine that has
    none of its checkpoints, not even that of epoch 0, and with nobody to ask."""
    spec = orders.spec
    if spec.bundle is None or spec.resume is None:
        return
    if not (spec.resume.is_dir() or orders.known_addresses or spec.known_path.exists()):
        raise StateUnavailable(
            f"{spec.resume}: this machine has no checkpoint of the run, and knows nobody who is in it; end it with "
            "--down, and give the command again where its checkpoints are"
        )


def fit(orders: Orders) -> PeerSpec:
    """The spec on this machine: the bundle where it lies, and no checkpoints where there are none."""
    spec = orders.spec
    if spec.bundle is not None:
        spec = spec.model_copy(update={"bundle": find_bundle(orders) or spec.bundle})
    if spec.resume is not None and not spec.resume.is_dir():
        spec = spec.model_copy(update={"resume": None})
    return spec


def remember_addresses(orders: Orders, *, is_news: bool) -> None:
    """Tell a first auxiliary peer where its swarm is: what the supervisor knew when it gave its orders, and later, only
    if the peer knows nothing itself, for those orders grow old."""
    spec = orders.spec
    if spec.bundle is None or not orders.known_addresses or not (is_news or not spec.known_path.exists()):
        return
    with contextlib.suppress(OSError):
        spec.folder.mkdir(parents=True, exist_ok=True)
        known.remember(spec.folder, orders.known_addresses)
