"""Does anything grow for ever? `python -m benchmarks.soak [--minutes 45]`

The swarm of `benchmarks.chaos`, undisturbed. Every ten seconds each process of each peer, the supervisor's and the
actors' Ray workers and Ray's own processes are sampled: memory (PSS: what is shared by forking counts once), open
files, threads; and each peer's log and the monitor's feed. Slopes per hour are those of the second half, see
`soak_fit`. A feed grows with its epochs and a log with its lines, each up to a bound: they are compared with what they
may grow. CPU is what each used on average, in per cent of a core.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.fault_drive import say
from benchmarks.fault_kinds import EVERYONE
from benchmarks.fault_rig import OurRig
from benchmarks.fault_run import DUTY_CYCLE, prepare
from benchmarks.soak_fit import Fit, fit
from launchers.output import PEERS

SAMPLE_SECONDS = 10.0
EPOCH_SECONDS, SOLO_SECONDS = 15.0, 5.0
MEGABYTE = 1e6


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """What is measured, and how much of it per hour is nothing."""

    unit: str
    tolerated_share: float
    tolerated: float


QUANTITIES = {
    "PSS": Quantity(unit="MB", tolerated_share=0.05, tolerated=5.0),
    "files": Quantity(unit="", tolerated_share=0.05, tolerated=2.0),
    "threads": Quantity(unit="", tolerated_share=0.05, tolerated=2.0),
    # 240 epochs an hour, of six peers' rows at 1.2 kB; a log may have 16 MB in all.
    "feed": Quantity(unit="MB", tolerated_share=0.0, tolerated=4.0),
    "log": Quantity(unit="MB", tolerated_share=0.0, tolerated=8.0),
}
CPU = "CPU"
"""Seconds since the process began: not judged, for it is a sum."""
Series = dict[tuple[str, str, str], list[tuple[float, float]]]
"""(peer, process, quantity) -> (seconds, value)."""


def sample(rig: OurRig) -> Iterator[tuple[str, str, str, float]]:
    """(peer, process, quantity, value) of all that lives now."""
    for name in rig.names:
        folder, tree = rig.out / PEERS / name, rig.tree(name)
        if tree is not None:
            known = {tree.top.pid: "watchdog"}
            known |= {p.pid: label for p, label in ((tree.child, "child"), (tree.dht, "DHT"), (tree.p2pd, "p2pd")) if p}
            for process in tree.everyone:
                yield from _process(name, known.get(process.pid), process)
        if (pid := rig.worker_pid(name)) is not None:
            with contextlib.suppress(psutil.Error):
                yield from _process(name, "Ray worker", psutil.Process(pid))
        yield name, "disk", "log", _size(folder, "peer.log*")
        if name.startswith("monitor"):
            yield name, "disk", "feed", _size(folder, "feed.sqlite*")
    if (pid := rig.supervisor_pid()) is not None:
        with contextlib.suppress(psutil.Error):
            yield from _process("supervisor", "Ray worker", psutil.Process(pid))
    for process in rig.daemons():
        yield from _process("Ray", None, process)


def _process(name: str, label: str | None, process: psutil.Process) -> Iterator[tuple[str, str, str, float]]:
    with contextlib.suppress(psutil.Error, OSError):
        label = label or process.name()
        yield name, label, "PSS", process.memory_full_info().pss / MEGABYTE
        yield name, label, "files", float(process.num_fds())
        yield name, label, "threads", float(process.num_threads())
        used = process.cpu_times()
        yield name, label, CPU, used.user + used.system


def _size(folder: Path, pattern: str) -> float:
    total = 0
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total / MEGABYTE


def collect(rig: OurRig, *, seconds: float, path: Path | None) -> Series:
    series: Series = defaultdict(list)
    started = told_at = time.monotonic()
    while (now := time.monotonic()) < started + seconds:
        sums: dict[tuple[str, str, str], float] = defaultdict(float)
        for peer, process, quantity, value in sample(rig):
            sums[peer, process, quantity] += value  # several of one name count together
        for place, value in sums.items():
            series[place].append((now - started, value))
        if now >= told_at + 60:
            told_at = now
            total = sum(points[-1][1] for (_, _, q), points in series.items() if q == "PSS")
            say(f"minute {(now - started) / 60:.0f}: epoch {rig.watch.epoch()}, {total:.0f} MB in all")
            if path is not None:
                path.write_text(json.dumps([[*place, points] for place, points in series.items()]))
        time.sleep(max(0.1, SAMPLE_SECONDS - (time.monotonic() - now)))
    return series


def judged(series: Series) -> dict[tuple[str, str, str], Fit]:
    found = {}
    for place, points in series.items():
        if place[2] == CPU:
            continue
        quantity = QUANTITIES[place[2]]
        with contextlib.suppress(ValueError):  # a process that was there for some seconds only
            found[place] = fit(points, tolerated_share=quantity.tolerated_share, tolerated=quantity.tolerated)
    return found


def cpu_shares(series: Series) -> dict[tuple[str, str], float]:
    """(peer, process) -> cores that it used, from the first sample of all to the last."""
    return {
        (peer, process): (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
        for (peer, process, quantity), points in series.items()
        if quantity == CPU and len(points) > 1
    }


def table(fits: dict[tuple[str, str, str], Fit], shares: dict[tuple[str, str], float]) -> str:
    """Markdown: a row per process, a column per quantity: what it is at the end, and its slope per hour."""
    names = list(QUANTITIES)
    head = " | ".join(f"{name}{', ' + QUANTITIES[name].unit if QUANTITIES[name].unit else ''}" for name in names)
    lines = [f"| peer | process | {head} | CPU, % | levels off |", "|---|---|" + "---|" * (len(names) + 2)]
    for peer, process in dict.fromkeys((peer, process) for peer, process, _ in fits):
        own = {name: fits.get((peer, process, name)) for name in names}
        cells = [f"{f.last:.1f} ({f.per_hour:+.1f}/h)" if f is not None else "" for f in own.values()]
        verdict = "yes" if all(f.does_level_off for f in own.values() if f is not None) else "**NO**"
        share = f"{100 * shares[peer, process]:.1f}" if (peer, process) in shares else ""
        lines.append(f"| {peer} | {process} | {' | '.join(cells)} | {share} | {verdict} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--duty-cycle", type=float, default=DUTY_CYCLE, help="of each trainer, see docs/faults.md")
    parser.add_argument("--folder", type=Path, help="keep logs and feed there (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write all samples there, each minute")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        prepared = prepare(
            folder.resolve(), epoch_seconds=EPOCH_SECONDS, solo_seconds=SOLO_SECONDS, duty_cycle=args.duty_cycle
        )
        with prepared.ours() as rig:
            rig.start()
            say(f"{len(EVERYONE)} peers are at work")
            series = collect(rig, seconds=60 * args.minutes, path=args.json)
            num_epochs, left = rig.watch.epoch(), rig.end()
    fits = judged(series)
    print(f"{args.minutes:g} minutes, {num_epochs} epochs; in brackets the slope of the second half\n")
    print(table(fits, cpu_shares(series)), flush=True)
    growing = [" ".join(place) for place, f in fits.items() if not f.does_level_off]
    print(f"- {'NO  these grow: ' + ', '.join(growing) if growing else 'yes everything levels off'}")
    print(f"- {'NO  left: ' + ', '.join(left) if left else 'yes nothing is left'}", flush=True)
    return 1 if growing or left else 0


if __name__ == "__main__":
    sys.exit(main())
