"""How long does a swarm need to get back what a fault took? One fault at a time, on a swarm that was in step."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.fault_account import Cost, cost_of, rate_of
from benchmarks.fault_bare_rig import BareRig
from benchmarks.fault_drive import TICK_SECONDS, in_step, say
from benchmarks.fault_inject import Injector
from benchmarks.fault_kinds import MONITOR, NODE, TRAINERS, Fault
from benchmarks.fault_rig import OurRig
from benchmarks.fault_watch import Sighting

CLEAN_ROUNDS = 2
"""In step, one after the other, before anything is broken."""
SAME_ROUND_SECONDS = 5.0
"""A round that ends so soon after a fault was made of what came before it."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One fault. Seconds count from it; None: not within the limit."""

    fault: Fault
    who: tuple[str, ...]
    at_work_seconds: float | None
    in_round_seconds: float | None
    cost: Cost
    limit_seconds: float


def measure(rig: OurRig | BareRig, fault: Fault, *, limit_seconds: float, target_batch_size: int) -> Measured | None:
    """None if there is nobody whom it could hit."""
    injector, watch = Injector(rig), rig.watch
    _wait_for_clean_rounds(rig, limit_seconds=limit_seconds)
    who = tuple(rig.residents()) if fault.target == NODE and isinstance(rig, OurRig) else (fault.target,)
    who = who if fault.target != NODE or isinstance(rig, OurRig) else (TRAINERS[2],)
    if not who:
        return None
    before = {name: watch.now(name) for name in who}
    workers = {name: rig.worker_pid(name) for name in who}
    rate = rate_of(watch.rounds(), until=time.monotonic())
    if not injector.hurt(fault):
        return None
    fault_at, mend_at = time.monotonic(), time.monotonic() + fault.kind.mend_seconds
    say(f"fault: {fault.kind.name}: {', '.join(who)}")
    back = {name: _changed(rig, fault, name, before=before[name], worker=workers[name]) for name in who}
    work_at: dict[str, float] = {}
    round_at: dict[str, float] = {}
    try:
        while time.monotonic() < fault_at + limit_seconds and len(round_at) < len(who):
            now = time.monotonic()
            if fault.kind.mend_seconds and now >= mend_at:
                injector.mend(fault)
                mend_at = float("inf")
            for name in who:
                if name not in work_at and back[name](fault_at):
                    work_at[name] = now
                if name in work_at and name not in round_at and (at := _round_after(rig, name, work_at[name])):
                    round_at[name] = at
            time.sleep(TICK_SECONDS)
    finally:
        injector.mend_all()
    is_back = len(round_at) == len(who)
    if is_back:
        _wait_for_round_after(rig, max(round_at.values()))
    held = fault.kind.held_seconds * rate / len(TRAINERS)
    cost = cost_of(
        watch.rounds(), fault_at=fault_at, back_at=max(round_at.values()) if is_back else fault_at + limit_seconds,
        rate=rate, held_samples=held, target=target_batch_size,
    )  # fmt: skip
    return Measured(
        fault=fault, who=who, cost=cost, limit_seconds=limit_seconds,
        at_work_seconds=max(work_at.values()) - fault_at if is_back else None,
        in_round_seconds=max(round_at.values()) - fault_at if is_back else None,
    )  # fmt: skip


def _changed(
    rig: OurRig | BareRig, fault: Fault, name: str, *, before: Sighting | None, worker: int | None
) -> Callable[[float], bool]:
    """A test of whether `name` is at work again, and not still."""
    is_trainer, how = name in TRAINERS, fault.kind.how

    def is_back(fault_at: float) -> bool:
        seen = rig.watch.now(name)
        if seen is None or not seen.is_at_work:
            return False
        if how == "stop":
            return time.monotonic() > fault_at + fault.kind.held_seconds
        if how in ("worker", "raylet") and not is_trainer:
            return rig.worker_pid(name) not in (None, worker)
        if how in ("p2pd", "dht") and isinstance(rig, BareRig):  # its process may live, cut off: only a round tells
            return bool(_round_after(rig, name, fault_at + SAME_ROUND_SECONDS))
        return bool(seen.boot) and before is not None and seen.boot != before.boot

    return is_back


def _round_after(rig: OurRig | BareRig, name: str, at: float) -> float | None:
    """When the first true round after `at` with `name` in it came; a monitor needs none."""
    if name == MONITOR:
        return at
    rounds = [r for r in rig.watch.rounds() if r.at > at]
    return next((r.at for r in rounds if (r.samples.get(name) if name in TRAINERS else name in r.members)), None)


def _wait_for_round_after(rig: OurRig | BareRig, at: float) -> None:
    deadline = time.monotonic() + 60.0
    while not any(r.at >= at for r in rig.watch.rounds()) and time.monotonic() < deadline:
        time.sleep(TICK_SECONDS)


def _wait_for_clean_rounds(rig: OurRig | BareRig, *, limit_seconds: float) -> None:
    for _ in range(CLEAN_ROUNDS):
        if why := in_step(rig, tolerance=1.0, timeout_seconds=limit_seconds):
            raise RuntimeError(f"the swarm is not in step before a fault: {why}")
