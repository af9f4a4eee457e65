"""Carry out a schedule of faults on a running swarm, and hand back what was done when."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.fault_account import Hold
from benchmarks.fault_bare_rig import BareRig
from benchmarks.fault_inject import Injector
from benchmarks.fault_kinds import NODE, TRAINERS, Fault, bare_target
from benchmarks.fault_orphans import Orphans
from benchmarks.fault_rig import OurRig
from benchmarks.fault_watch import words_of
from benchmarks.stolen import Stolen
from launchers.output import PEERS

TICK_SECONDS = 0.2
TRY_SECONDS = 90.0
"""For a target that an earlier fault has not come back from."""
PROGRESS_SECONDS = 60.0
SETTLE_SECONDS = 120.0


@dataclass(kw_only=True)
class Log:
    """What was done."""

    started_at: float = 0.0
    """Monotonic: the first true round."""
    done: list[tuple[float, Fault]] = field(default_factory=list)
    missed: list[Fault] = field(default_factory=list)
    """Their target was not there within TRY_SECONDS, or, in a bare swarm, does not exist."""
    holds: list[Hold] = field(default_factory=list)
    ended_at: float | None = None
    """Monotonic, if it was ended by the limit and not by the last round that was wanted."""
    orphans: list[str] = field(default_factory=list)
    """Processes that outlived their owner by more than ten seconds."""
    longest_orphan_seconds: float = 0.0
    busy_elsewhere: float = 0.0
    """Share of all cores' time, since the first true round, that went into anything but computing gradients."""
    stolen: float = 0.0
    """Share of all cores' time that the machine's host gave to others since then."""


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def drive(rig: OurRig | BareRig, faults: Sequence[Fault], *, num_epochs: int, limit_seconds: float) -> Log:
    """Until `num_epochs` true rounds have come after the first one, and every fault has. Stops at `limit_seconds`."""
    injector, log, watch = Injector(rig), Log(), rig.watch
    is_bare = isinstance(rig, BareRig)
    pending, mends = list(faults), list[tuple[float, Fault]]()
    orphans = Orphans(rig.out / PEERS) if isinstance(rig, OurRig) else None
    deadline = time.monotonic() + limit_seconds
    told_at = time.monotonic()
    began, stolen = (0.0, 0.0), Stolen()
    try:
        while time.monotonic() < deadline:
            now, rounds = time.monotonic(), watch.rounds()
            if not log.started_at and rounds:
                log.started_at, began, stolen = rounds[0].at, (time.monotonic(), _seconds_elsewhere()), Stolen()
            if orphans is not None and isinstance(rig, OurRig):
                orphans.look(rig.watchdogs())
            for due in [m for m in mends if now >= m[0]]:
                mends.remove(due)
                injector.mend(due[1])
            if log.started_at and pending and now >= log.started_at + pending[0].at:
                fault = _retargeted(pending[0]) if is_bare else pending[0]
                _try(injector, fault, log=log, mends=mends, since=max(log.started_at + pending[0].at, _last(log)))
                if fault is None or fault in log.missed or (log.done and log.done[-1][1] is fault):
                    pending.pop(0)
            if now >= told_at + PROGRESS_SECONDS:
                told_at = now
                say(f"epochs={max(0, len(rounds) - 1)} faults={len(log.done)} {words_of(watch.everyone())}")
            if len(rounds) > num_epochs and not pending and not mends:
                return log
            time.sleep(TICK_SECONDS)
        log.ended_at = time.monotonic()
    finally:
        injector.mend_all()
        if orphans is not None:
            log.orphans, log.longest_orphan_seconds = list(orphans.overdue.values()), orphans.longest
        if log.started_at:
            cores = os.cpu_count() or 1
            log.busy_elsewhere = (_seconds_elsewhere() - began[1]) / (cores * (time.monotonic() - began[0]))
            log.stolen = stolen.share()
    return log


def _seconds_elsewhere() -> float:
    """CPU seconds of all that is not niced, since the machine booted: our trainers nice the thread that computes."""
    user, _niced, system = (int(ticks) for ticks in Path("/proc/stat").read_text().split()[1:4])
    return (user + system) / os.sysconf("SC_CLK_TCK")


def _try(
    injector: Injector, fault: Fault | None, *, log: Log, mends: list[tuple[float, Fault]], since: float
) -> None:  # fmt: skip
    if fault is None:
        return
    residents = injector.rig.residents() if fault.target == NODE and isinstance(injector.rig, OurRig) else None
    now = time.monotonic()
    if not injector.hurt(fault):
        if now > since + TRY_SECONDS:
            log.missed.append(fault)
            say(f"not there: {fault}")
        return
    log.done.append((now, fault))
    who = f" ({', '.join(residents) or 'nobody there'})" if residents is not None else ""
    say(f"fault {len(log.done)}: {fault.kind.name}: {fault.target}{who}")
    if fault.kind.held_seconds:
        log.holds.append(Hold(name=fault.target, start=now, end=now + fault.kind.held_seconds))
    if fault.kind.mend_seconds:
        mends.append((now + fault.kind.mend_seconds, fault))


def _retargeted(fault: Fault) -> Fault | None:
    target = bare_target(fault)
    if target is None:
        return None
    return fault if target == fault.target else Fault(at=fault.at, kind=fault.kind, target=target)


def _last(log: Log) -> float:
    return log.done[-1][0] if log.done else log.started_at


def in_step(rig: OurRig | BareRig, *, tolerance: float, timeout_seconds: float = SETTLE_SECONDS) -> str:
    """Wait until all trainers are in one true round and hold parameters of one norm at one epoch; else why not."""
    deadline = time.monotonic() + timeout_seconds
    num_before = len(rig.watch.rounds())
    while True:
        seen = rig.watch.everyone()
        trainers = [seen[name] for name in TRAINERS if name in seen and seen[name].is_at_work]
        norms = [s.norm for s in trainers if s.norm]
        rounds = rig.watch.rounds()
        if len(trainers) < len(TRAINERS):
            why = f"not all trainers are alive: {words_of(seen)}"
        elif len({s.epoch for s in trainers}) > 1 or len(norms) < len(TRAINERS):
            why = f"not at one epoch: {[s.epoch for s in trainers]}"
        elif max(norms) - min(norms) > tolerance * max(norms):
            why = f"parameters differ: norms {norms}"
        elif len(rounds) <= num_before or any(not rounds[-1].samples.get(name) for name in TRAINERS):
            why = f"the last true round had samples of {sorted(rounds[-1].samples) if rounds else 'nobody'} only"
        else:
            return ""
        if time.monotonic() > deadline:
            return why
        time.sleep(TICK_SECONDS)
