"""The efficiency benchmark's tables, as Markdown."""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.efficiency import Result

COMPUTE, WASTED, SLOWED = "computing useful samples", "computing samples of no true round", "computing, slowed down"
STEP, IDLE = "compute thread in step()", "idle or waiting"


def result_table(results: Sequence["Result"]) -> str:
    """One row per kind: efficiency by repeat, its median and spread, and what the loss says."""
    reference = [r.loss_drop for r in results if r.kind == "bare-synchronous"]
    lines = [
        "| kind | efficiency by repeat | median | spread | s/epoch | true rounds | stale | loss drop | of sync's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(r.kind for r in results):
        own = [r for r in results if r.kind == kind]
        ratios, drop = [r.efficiency for r in own], statistics.median(r.loss_drop for r in own)
        seconds = statistics.median(r.account.seconds / r.account.num_rounds for r in own)
        share = f"{drop / statistics.median(reference):.3f}" if reference else "-"
        lines.append(
            f"| {kind} | {', '.join(f'{x:.3f}' for x in ratios)} | {statistics.median(ratios):.3f} "
            f"| {min(ratios):.3f}-{max(ratios):.3f} | {seconds:.2f} "
            f"| {sum(r.account.num_true_rounds for r in own)}/{sum(r.account.num_rounds for r in own)} "
            f"| {sum(r.account.num_stale_samples for r in own)} | {drop:.3f} | {share} |"
        )
    rates = [sum(r.solo.samples_per_second) for r in results]
    told = f"solo: {statistics.median(rates):.2f} samples/s ({min(rates):.2f}-{max(rates):.2f})"
    lines.append(f"| limit: both alone, no swarm | {told} | 1.000 | | | | | | |")
    return "\n".join(lines)


def breakdown_table(results: Sequence["Result"]) -> str:
    """Share of the cores' time in the clock, mean of trainers and repeats."""
    kinds = list(dict.fromkeys(r.kind for r in results if r.kind != "control"))
    shares = {kind: _mean_shares([r for r in results if r.kind == kind]) for kind in kinds}
    rows = list(dict.fromkeys(row for kind in kinds for row in shares[kind]))
    lines = ["| % of the two cores' time | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    lines += [f"| {row} | " + " | ".join(f"{100 * shares[k].get(row, 0.0):.1f}" for k in kinds) + " |" for row in rows]
    return "\n".join(lines)


def _mean_shares(results: Sequence["Result"]) -> dict[str, float]:
    total: Counter[str] = Counter()
    number = 0
    for result in results:
        for trainer in range(len(result.account.cpu)):
            number += 1
            total.update(_shares(result, trainer))
    return {row: value / number for row, value in total.items()}


def _shares(result: "Result", trainer: int) -> dict[str, float]:
    """Rows add up to 1."""
    cpu, seconds = result.account.cpu[trainer], result.account.seconds
    per_sample, useful = result.solo.cpu_seconds_per_sample[trainer], result.account.useful_by_trainer[trainer]
    rows = {
        COMPUTE: useful * per_sample,
        WASTED: (cpu["num_samples"] - useful) * per_sample,
        SLOWED: cpu["compute_cpu"] - cpu["num_samples"] * per_sample,
        STEP: cpu["step_cpu"],
        "compute thread, rest": cpu["thread MainThread"] - cpu["compute_cpu"] - cpu["step_cpu"],
    }
    rows |= {key: value for key, value in cpu.items() if key.startswith("child ")}
    rows |= {key: value for key, value in cpu.items() if key.startswith("thread ") and key != "thread MainThread"}
    rows[IDLE] = seconds - sum(rows.values())
    return {row: value / seconds for row, value in rows.items() if abs(value) / seconds >= 0.0005}
