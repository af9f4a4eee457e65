"""What does each kind of fault cost, in seconds and in samples? Ours beside bare hivemind of the same shape.

    python -m benchmarks.faults [--quick] [--only ours|stock] [--json FILE]

One fault at a time, each on a swarm in step. Seconds count from the fault: until the peer is at work again, and until a
true round has it (a trainer's samples are in the average, an auxiliary peer has the result), which comes at the end of
an epoch. Samples are what the whole swarm would have averaged at the rate that it had before, less what it did, from
the last round before the fault to that round; what the schedule itself holds down is excused. Ours: three trainers, two
auxiliary peers and a monitor on Ray. Bare: three `hivemind.Optimizer` trainers, each in its user's `while true` loop.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.fault_bare_rig import BareRig
from benchmarks.fault_drive import say
from benchmarks.fault_kinds import BOOTSTRAP, KINDS, NODE, TRAINERS, Fault, bare_target, in_turn
from benchmarks.fault_returns import Measured, measure
from benchmarks.fault_rig import OurRig
from benchmarks.fault_run import Prepared, prepare

EPOCH_SECONDS, QUICK_EPOCH_SECONDS = 15.0, 8.0
SOLO_SECONDS = 10.0
LIMIT_SECONDS, QUICK_LIMIT_SECONDS = 180.0, 90.0
QUICK = ("trainer's child", "p2pd", "Ray worker process")
Row = tuple[str, str]
"""(kind's name, target)."""


def run(
    make_rig: Callable[[], OurRig | BareRig], faults: Sequence[Fault], prepared: Prepared, *, limit_seconds: float
) -> dict[Row, Measured]:
    """One swarm for all faults; a new one after a fault that it has not come back from."""
    found: dict[Row, Measured] = {}
    pending = list(faults)
    while pending:
        with make_rig() as rig:
            rig.start()
            is_whole = True
            while pending and is_whole:
                fault = pending.pop(0)
                done = measure(rig, fault, limit_seconds=limit_seconds, target_batch_size=prepared.target_batch_size)
                if done is None:
                    say(f"not done: {fault.kind.name}: {fault.target}: nobody there")
                    continue
                back = _seconds(done, lambda m: m.in_round_seconds)
                say(f"{fault.kind.name}: {fault.target}: back in {back} s, cost {_cost(done)} samples (epochs)")
                found[fault.kind.name, fault.target] = done
                is_whole = done.in_round_seconds is not None
            for line in rig.end():
                say(f"left: {line}")
    return found


def bare_faults(faults: Sequence[Fault]) -> list[Fault]:
    """Those that have a counterpart there, as it is there."""
    return [
        Fault(at=0.0, kind=fault.kind, target=target) for fault in faults if (target := bare_target(fault)) is not None
    ]


def table(faults: Sequence[Fault], ours: dict[Row, Measured], stock: dict[Row, Measured]) -> str:
    """Markdown, a row per fault."""
    lines = [
        "| SIGKILL to, unless it says otherwise | of | ours: at work, s | in a true round, s | samples (epochs) "
        "| bare: in a true round, s | samples (epochs) |",
        "|---|---|---|---|---|---|---|",
    ]
    for fault in faults:
        mine = ours.get((fault.kind.name, fault.target))
        target = bare_target(fault)
        other = stock.get((fault.kind.name, target)) if target is not None else None
        work = _seconds(mine, lambda m: m.at_work_seconds)
        lines.append(
            f"| {fault.kind.name} | {_role(fault, mine)} | {work} | {_seconds(mine, lambda m: m.in_round_seconds)} "
            f"| {_cost(mine)} | {_seconds(other, lambda m: m.in_round_seconds) if target else 'has none'} "
            f"| {_cost(other) if target else ''} |"
        )
    return "\n".join(lines)


def _role(fault: Fault, measured: Measured | None) -> str:
    if fault.target == NODE:
        return ", ".join(measured.who) if measured is not None else "a node"
    return "bootstrap peer" if fault.target == BOOTSTRAP else fault.target.rsplit("-", 1)[0]


def _seconds(measured: Measured | None, what: Callable[[Measured], float | None]) -> str:
    if measured is None:
        return "-"
    seconds = what(measured)
    return f"{seconds:.1f}" if seconds is not None else f"**not within {measured.limit_seconds:.0f}**"


def _cost(measured: Measured | None) -> str:
    return f"{measured.cost.samples:.0f} ({measured.cost.epochs:.2f})" if measured is not None else "-"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three kinds and short epochs: to see that it runs")
    parser.add_argument("--only", choices=("ours", "stock"))
    parser.add_argument("--kinds", nargs="+", choices=[kind.name for kind in KINDS], help="these kinds only")
    parser.add_argument("--folder", type=Path, help="keep logs there (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write all results there")
    args = parser.parse_args()
    wanted = args.kinds or (QUICK if args.quick else [kind.name for kind in KINDS])
    faults = in_turn([kind for kind in KINDS if kind.name in wanted])
    limit = QUICK_LIMIT_SECONDS if args.quick else LIMIT_SECONDS
    ours: dict[Row, Measured] = {}
    stock: dict[Row, Measured] = {}
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        prepared = prepare(
            folder.resolve(), epoch_seconds=QUICK_EPOCH_SECONDS if args.quick else EPOCH_SECONDS,
            solo_seconds=SOLO_SECONDS,
        )  # fmt: skip
        say(f"solo: {prepared.swarm_rate:.1f} samples/s together; target_batch_size={prepared.target_batch_size}")
        if args.only != "stock":
            ours = run(prepared.ours, faults, prepared, limit_seconds=limit)
        if args.only != "ours":
            stock = run(prepared.stock, bare_faults(faults), prepared, limit_seconds=limit)
    if args.json:
        told = {kind: [asdict(m) for m in found.values()] for kind, found in (("ours", ours), ("stock", stock))}
        args.json.write_text(json.dumps(told, indent=1))
    print(f"{len(TRAINERS)} trainers, {prepared.target_batch_size} samples per epoch, "
          f"solo {prepared.swarm_rate:.0f} samples/s together\n")  # fmt: skip
    print(table(faults, ours, stock), flush=True)


if __name__ == "__main__":
    main()
