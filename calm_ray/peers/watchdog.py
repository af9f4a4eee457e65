"""`calm-ray peer`: start one child that does the work, judge its progress, restart it or park it, leave nothing behind.

This process imports neither torch nor hivemind and runs one thread: it must survive whatever happens to its child. The
child leads a session of its own and dies with us (PDEATHSIG); after it ends, its whole group is killed, because
hivemind's helpers outlive a parent that was killed. What a watchdog that was killed itself could not clean up is swept
at the start, once the folder's lock is ours.
"""

import contextlib
import logging
import os
import random
import selectors
import signal
import time
from collections.abc import Callable

from pydantic import ValidationError

from calm_ray.code import code_hash
from calm_ray.errors import CalmRayError
from calm_ray.peers import endings
from calm_ray.peers.budget import Cause, Failure, LedgerFile
from calm_ray.peers.control_server import ControlServer
from calm_ray.peers.endings import Ending
from calm_ray.peers.judge import Judge
from calm_ray.peers.lock import exclusive
from calm_ray.peers.log import RotatingLog
from calm_ray.peers.process import ChildProcess
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus
from calm_ray.peers.vitals import memory_limit, memory_of, num_oom_kills, sweep

logger = logging.getLogger(__name__)

LEAVE_SECONDS = 9.0
"""From the request to leave until the child's group is killed; users are promised ten."""
DUMP_SECONDS = 1.0
"""For a child that hangs to write its stacks, before it is asked to leave."""
FIRST_LEASE_SECONDS = 30.0
TICK_SECONDS = 0.2
MEMORY_SECONDS = 10.0
"""Between two looks at the child's memory: the kernel adds up its pages for us each time."""
DEFAULT_MEMORY_SHARE = 0.9
"""Of the machine, or of the container, unless `[peer] memory_limit_gb` says otherwise."""


class Watchdog:
    """One peer. `run()` blocks until it has left for good and returns an exit code."""

    def __init__(
        self, spec: PeerSpec, *, on_status: Callable[[PeerStatus], None] = lambda status: None,
        preflight: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`preflight` is called once, when the folder is ours; it may raise CalmRayError to call the start off."""
        self._spec = spec
        self._on_status, self._preflight = on_status, preflight
        self._base = PeerStatus(role=spec.role, pid=os.getpid(), code_hash=code_hash())
        self.status = self._base
        self._selector = selectors.DefaultSelector()
        self._control = ControlServer(
            self._selector, answer=lambda: self.status.model_dump_json().encode(), on_stop=self.leave
        )
        self._child: ChildProcess | None = None
        self._judge = Judge(now=time.monotonic())
        self._leave_at: float | None = None
        self._verdict: tuple[Cause, str] | None = None
        self._lease_deadline: float | None = None
        limit_gb = spec.peer.memory_limit_gb
        self._memory_limit = int(limit_gb * 1e9 if limit_gb else DEFAULT_MEMORY_SHARE * memory_limit())

    def run(self) -> int:
        spec = self._spec
        with contextlib.ExitStack() as stack:
            try:
                spec.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive(spec.folder))
                self._log = stack.enter_context(RotatingLog(spec.log_path))
            except OSError as exc:
                raise endings.disk_error(exc, where=spec.folder) from exc
            self._ledger = LedgerFile(spec.folder)
            if not spec.has_lease:
                self._ledger.keep(self._ledger.ledger.pardoned())
            elif self._ledger.ledger.is_parked(now=time.time()):
                raise CalmRayError(f"{spec.folder}: parked: {self._ledger.ledger.parked_why}; log: {spec.log_path}")
            endings.forget(spec.folder)
            if swept := sweep(spec.folder):
                self._say(f"ended what an earlier crash had left: {', '.join(swept)}")
            try:
                self._preflight()
                stack.enter_context(self._control.listening(spec.folder))
                self._listen_to_signals()
                if spec.has_lease:
                    self._lease_deadline = time.monotonic() + FIRST_LEASE_SECONDS
                return self._run_until_left()
            except CalmRayError as exc:
                self.status = self._base.model_copy(
                    update={"state": "left", "error": str(exc), "exit_code": exc.exit_code}
                )
                raise
            finally:
                endings.remember(spec.folder, self.status)

    def _listen_to_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup: it outlives its terminal
            signal.signal(number, lambda *_: self.leave())

    def leave(self) -> None:
        """Ask the child to go; it is killed if it has not gone in LEAVE_SECONDS."""
        if self._leave_at is None:
            self._leave_at = time.monotonic()
            if self._child is not None and not self._child.has_ended:
                self._child.ask_to_leave()

    def _run_until_left(self) -> int:
        while True:
            ending = self._run_child()
            if self._leave_at is not None or ending.cause is None:
                self._update(state="left", exit_code=ending.exit_code)
                return 0 if self._leave_at is not None else ending.exit_code
            now = time.time()
            has_worked = self.status.last_success_at is not None
            failure = Failure(at=now, cause=ending.cause, why=ending.why, has_worked=has_worked)
            decision = self._ledger.record(failure, now=now)
            if decision.park:
                endings.keep_last_lines(self._spec)
                self._update(state="parked", error=decision.park, exit_code=ending.exit_code)
                return ending.exit_code
            pause = decision.pause_seconds * random.uniform(0.5, 1.0)
            self.status = self._base.model_copy(update={"num_restarts": self.status.num_restarts + 1})
            self._update(
                state="restarting",
                detail=f"{ending.why}; trying again in {pause:.0f} s, log: {self._spec.log_path}",
            )  # fmt: skip
            self._pause(pause)
            if self._leave_at is not None:
                self._update(state="left", exit_code=0)
                return 0

    def _run_child(self) -> Ending:
        self._judge, self._verdict = Judge(now=time.monotonic()), None
        oom_kills = num_oom_kills()
        try:
            child = ChildProcess(self._spec, self._selector, on_output=lambda data: self._log.write(data),
                                 on_line=self._on_line)  # fmt: skip
        except OSError as exc:  # no memory for one more process
            return Ending(exit_code=1, cause="crashed", why=endings.process_words(exc))
        self._child = child
        if self._leave_at is not None:  # asked to leave while it was being started
            child.ask_to_leave()
        try:
            self._serve(child)
        finally:
            code = child.reap()
        return endings.ending_of(
            code, error=self.status.error, verdict=self._verdict, num_oom_kills=num_oom_kills() - oom_kills
        )

    # --- the loop ----------------------------------------------------------------------------------------------------

    def _serve(self, child: ChildProcess) -> None:
        look_at = time.monotonic() + MEMORY_SECONDS
        ends = _Ends(child)
        while not child.has_ended:
            self._turn()
            now = time.monotonic()
            if self._leave_at is not None:
                if now > self._leave_at + LEAVE_SECONDS:
                    child.kill()
                continue
            if self._verdict is None:
                if now >= look_at:
                    look_at = now + MEMORY_SECONDS
                    self._look_at_memory(child)
                if why := self._judge.verdict(now=now):
                    self._condemn("stalled", why)
            if self._verdict is not None:
                ends.go_on(now=now, should_dump=self._verdict[0] == "stalled")

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._leave_at is None:
            self._turn()

    def _turn(self) -> None:
        """Handle output, status, control requests, and the lease."""
        for key, _ in self._selector.select(timeout=TICK_SECONDS):
            key.data()
        if not self._spec.has_lease:
            return
        now = time.monotonic()
        if self._control.is_held:
            self._lease_deadline = None
        elif self._lease_deadline is None:
            self._lease_deadline = now + self._spec.orphan_seconds
        elif now > self._lease_deadline:
            self.leave()

    def _look_at_memory(self, child: ChildProcess) -> None:
        used = memory_of(child.pid)
        self.status = self.status.model_copy(update={"memory_bytes": used})
        if used > self._memory_limit:
            self._condemn("memory", f"uses more than the {self._memory_limit / 1e9:.2g} GB of memory that it may")

    def _condemn(self, cause: Cause, why: str) -> None:
        self._verdict = (cause, why)
        self._say(f"{cause}: {why}")
        self._update(state="stalled" if cause == "stalled" else "leaving", detail=why, doing="")

    def _on_line(self, line: bytes) -> None:
        try:
            told = PeerStatus.model_validate_json(line)
        except ValidationError:
            logger.exception("status line of the child is not one of ours")
            return
        self._judge.note(told.pulses, now=time.monotonic())
        if self._verdict is None:
            own = ("num_restarts", "pid", "code_hash", "memory_bytes")
            self._tell(told.model_copy(update={name: getattr(self.status, name) for name in own}))

    def _update(self, **fields: object) -> None:
        self._tell(self.status.model_copy(update=fields))

    def _tell(self, status: PeerStatus) -> None:
        self.status = status.model_copy(update={"restarts": self._ledger.ledger.restarts})
        with contextlib.suppress(OSError):  # whoever reads what we print may be gone: a terminal, a pipe, a full disk
            self._on_status(self.status)

    def _say(self, text: str) -> None:
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} watchdog: {text}\n".encode())


class _Ends:
    """A child that must go but not at once: stacks first, then a polite word, then SIGKILL."""

    def __init__(self, child: ChildProcess) -> None:
        self._child = child
        self._dumped_at: float | None = None
        self._asked_at: float | None = None

    def go_on(self, *, now: float, should_dump: bool) -> None:
        if should_dump and self._dumped_at is None:
            self._dumped_at = now
            self._child.dump_stacks()
        elif self._asked_at is None and now > (self._dumped_at or 0.0) + DUMP_SECONDS:
            self._asked_at = now
            self._child.ask_to_leave()
        elif self._asked_at is not None and now > self._asked_at + LEAVE_SECONDS:
            self._child.kill()
