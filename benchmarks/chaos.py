"""Sixty faults over a hundred epochs: is everybody there at the end, and how much was trained meanwhile?

    python -m benchmarks.chaos [--quick] [--stock] [--seed N]       (`make chaos`)

Three trainers, two auxiliary peers and a monitor, kept by the job's supervisor on a head and a worker raylet, on this
machine. The schedule follows from the seed and is printed first. Goodput = samples in true rounds / (3 x solo rate x
wall time), less only the time in which the schedule itself holds a trainer down; every restart counts against us, with
the cores that it takes from the others. The solo rate is measured before and after, three trainers computing at once;
the faster one counts, for a rented machine slows down now and then.
`--stock`: a swarm of three bare `hivemind.Optimizer` trainers in `while true` loops, under the same schedule.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.fault_account import Goodput, goodput, missing_epochs
from benchmarks.fault_bare_rig import BareRig
from benchmarks.fault_drive import Log, drive, in_step, say
from benchmarks.fault_kinds import KINDS, TRAINERS, Fault, schedule
from benchmarks.fault_rig import OurRig
from benchmarks.fault_run import DUTY_CYCLE, Prepared, prepare

NUM_FAULTS, NUM_EPOCHS, EPOCH_SECONDS = 60, 100, 24.0
NUM_QUICK_FAULTS, NUM_QUICK_EPOCHS, QUICK_EPOCH_SECONDS = 6, 6, 15.0
QUICK = ("trainer's child", "monitor's child", "bootstrap peer, whole", "p2pd", "Ray worker process",
         "SIGSTOP of a trainer, 15 s")  # fmt: skip
SOLO_SECONDS, SOLO_QUICK_SECONDS = 60.0, 8.0
EXPECTED = 0.85
"""Of the solo rates: the goodput to reach, and by which the schedule is stretched over the epochs."""
PATIENCE, START_SECONDS = 3.0, 120.0
"""Given up after so many times the time that the epochs should take. Bare hivemind gets the time that ours took."""
NORM_TOLERANCE = 1e-4


@dataclass(kw_only=True)
class Result:
    """Of one swarm."""

    kind: str
    goodput: Goodput | None
    num_faults: int
    num_missed: int
    busy_elsewhere: float
    stolen: float
    """Of the machine, by its host."""
    solo_rates: tuple[float, float] = (0.0, 0.0)
    """Samples per second of three, before and after."""
    longest_orphan_seconds: float
    problems: list[str]


def run_ours(prepared: Prepared, faults: tuple[Fault, ...], *, num_epochs: int, limit_seconds: float) -> Result:
    with prepared.ours() as rig:
        say("starting the cluster and the job")
        rig.start()
        log = drive(rig, faults, num_epochs=num_epochs, limit_seconds=limit_seconds)
        measured = _measure(rig, log, prepared)
        problems = [f"{fault.kind.name}: {fault.target} was not there to be hurt" for fault in log.missed]
        problems += [f"without its owner for more than ten seconds: {line}" for line in log.orphans]
        if len(rig.watch.rounds()) <= num_epochs:
            problems.append(f"{len(rig.watch.rounds())} true rounds, wanted more than {num_epochs}")
        if why := in_step(rig, tolerance=NORM_TOLERANCE):
            problems.append(why)
        last = rig.watch.epoch()
        time.sleep(3.0)  # the monitor reads once a second
        missing, double = missing_epochs(rig.feed_epochs(), first=0, last=last - 2)
        problems += [f"the feed lacks epochs {missing}"] if missing else []
        problems += [f"the feed has epochs {double} more than once"] if double else []
        say("ending the run")
        problems += [f"left: {line}" for line in rig.end()]
    return Result(
        kind="ours", goodput=measured, num_faults=len(log.done), num_missed=len(log.missed), problems=problems,
        busy_elsewhere=log.busy_elsewhere, stolen=log.stolen, longest_orphan_seconds=log.longest_orphan_seconds,
    )  # fmt: skip


def run_stock(prepared: Prepared, faults: tuple[Fault, ...], *, num_epochs: int, limit_seconds: float) -> Result:
    with prepared.stock() as rig:
        say("starting three bare trainers")
        rig.start()
        log = drive(rig, faults, num_epochs=num_epochs, limit_seconds=limit_seconds)
        measured = _measure(rig, log, prepared)
        why = in_step(rig, tolerance=NORM_TOLERANCE, timeout_seconds=30.0)
        problems = ([why] if why else []) + [f"left: {line}" for line in rig.end()]
    return Result(
        kind="stock", goodput=measured, num_faults=len(log.done), num_missed=len(log.missed), problems=problems,
        busy_elsewhere=log.busy_elsewhere, stolen=log.stolen, longest_orphan_seconds=log.longest_orphan_seconds,
    )  # fmt: skip


def _measure(rig: OurRig | BareRig, log: Log, prepared: Prepared) -> Goodput | None:
    rounds = rig.watch.rounds()
    if len(rounds) < 2:
        return None
    end = log.ended_at or rounds[-1].at
    computed = rig.watch.computed(TRAINERS, first=rounds[0].epoch + 1, last=rounds[-1].epoch)
    return goodput(
        rounds, spans=rig.watch.spans(TRAINERS, end=end), holds=log.holds, solo_rate=prepared.solo_rate,
        computed=computed, num_trainers=len(TRAINERS), end=end,
    )  # fmt: skip


def rescaled(found: Goodput, *, by: float) -> Goodput:
    """The same, held against a solo rate that many times as high; what that changes is put under the last cause."""
    share = found.share / by
    *causes, last = found.lost
    lost = {cause: found.lost[cause] for cause in causes}
    lost[last] = 1.0 - share - sum(lost.values())
    return Goodput(**{**asdict(found), "share": share, "lost": lost})


def table(results: list[Result]) -> str:
    """Markdown."""
    known = [(r.kind, r.goodput) for r in results if r.goodput is not None]
    head = [
        "| % of 3 x solo rate x time | " + " | ".join(kind for kind, _ in known) + " |",
        "|---|" + "---|" * len(known),
    ]
    rows = [("goodput", [g.share for _, g in known])]
    rows += [(cause, [g.lost[cause] for _, g in known]) for cause in (known[0][1].lost if known else ())]
    lines = [f"| {name} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |" for name, shares in rows]
    facts = [
        f"{r.kind}: {r.num_faults} faults done, {r.num_missed} without a target; "
        + (f"{r.goodput.num_rounds} true rounds in {r.goodput.seconds:.0f} s, held down {r.goodput.held_seconds:.0f} s"
           if r.goodput is not None else "no two true rounds")
        + f"; alone {r.solo_rates[0]:.0f} samples/s before and {r.solo_rates[1]:.0f} after"
        + f"; {100 * r.stolen:.0f} % of the machine was taken away by its host"
        + (f"; {100 * r.busy_elsewhere:.0f} % of all cores' time went into something else than computing gradients; "
           f"no process was seen without its owner for longer than {r.longest_orphan_seconds:.0f} s"
           if r.kind == "ours" else "")
        for r in results
    ]  # fmt: skip
    return "\n".join([*head, *lines, "", *facts])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="6 faults in 6 epochs: to see that it runs")
    parser.add_argument("--stock", action="store_true", help="a bare swarm under the same schedule as well")
    parser.add_argument("--only-stock", action="store_true", help="that alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--faults", type=int, help="0: an undisturbed run, to compare with")
    parser.add_argument("--epoch-seconds", type=float, help="of an epoch that nothing disturbs")
    parser.add_argument("--duty-cycle", type=float, default=DUTY_CYCLE, help="of each trainer, see docs/faults.md")
    parser.add_argument("--folder", type=Path, help="keep logs and feed there (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write all results there")
    args = parser.parse_args()
    num_epochs = args.epochs or (NUM_QUICK_EPOCHS if args.quick else NUM_EPOCHS)
    number = args.faults if args.faults is not None else NUM_QUICK_FAULTS if args.quick else NUM_FAULTS
    epoch_seconds = args.epoch_seconds or (QUICK_EPOCH_SECONDS if args.quick else EPOCH_SECONDS)
    solo_seconds = SOLO_QUICK_SECONDS if args.quick else SOLO_SECONDS
    kinds = [kind for kind in KINDS if not args.quick or kind.name in QUICK]
    duration = num_epochs * epoch_seconds / EXPECTED
    faults = schedule(kinds, number=number, seed=args.seed, duration=0.95 * duration)
    print(f"{number} faults in about {duration:.0f} s, seed {args.seed}:", *faults, sep="\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        prepared = prepare(
            folder.resolve(), epoch_seconds=epoch_seconds, solo_seconds=solo_seconds, duty_cycle=args.duty_cycle
        )
        say(
            f"solo: {prepared.swarm_rate:.1f} samples/s of three{prepared.stolen_words}; "
            f"target_batch_size={prepared.target_batch_size}"
        )
        results, taken = [], 0.0
        for kind, run in (("ours", run_ours), ("stock", run_stock)):
            if (kind == "stock" and not (args.stock or args.only_stock)) or (kind == "ours" and args.only_stock):
                continue
            limit = PATIENCE * duration + START_SECONDS if kind == "ours" else taken or duration
            started = time.monotonic()
            found = run(prepared, faults, num_epochs=num_epochs, limit_seconds=limit)
            taken = time.monotonic() - started
            after = prepared.measure_again(seconds=solo_seconds)
            found.solo_rates = (prepared.swarm_rate, after.swarm_rate)
            say(f"solo afterwards: {after.swarm_rate:.1f} samples/s{after.stolen_words}")
            if found.goodput is not None and after.solo_rate > prepared.solo_rate:
                found.goodput = rescaled(found.goodput, by=after.solo_rate / prepared.solo_rate)
            results.append(found)
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=1))
    print(table(results), flush=True)
    ours = [r for r in results if r.kind == "ours"]
    for problem in [problem for r in ours for problem in r.problems]:
        print(f"- NO  {problem}")
    has_ended_well = not any(r.problems for r in ours)
    if has_ended_well and ours:
        print("- yes all trainers alive and in step, the feed has every epoch once, nothing is left")
    reached = bool(ours) and all(r.goodput is not None and r.goodput.share >= EXPECTED for r in ours)
    if ours:
        print(f"- {'yes' if reached else 'NO '} goodput of at least {EXPECTED}", flush=True)
    return 0 if has_ended_well and (reached or args.quick or not ours) else 1


if __name__ == "__main__":
    sys.exit(main())
