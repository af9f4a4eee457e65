"""How much of its members' speed does a swarm keep? `python -m benchmarks.efficiency [--quick] [--only KIND ...]`

Two trainers of an ALBERT (hidden 256, 4 layers, vocabulary 8000: 1.97 M parameters), micro-batches of 8 sequences of
128 tokens, 512 samples per epoch, fp16 on the wire. Each trainer is pinned to one core *with all its threads and child
processes* (DHT, averagers, p2pd), as if each were a machine of one core; so what a swarm costs in CPU it costs in
samples. The solo rates are measured with both trainers computing at once, each on its core, without a swarm. They are
measured before and after every run, and the run is held against their mean: rented cores change their speed by a tenth
from one minute to the next, by what their neighbours do.

Efficiency = useful samples per second / sum of the solo rates. See `efficiency_account` for what is useful, and
`efficiency_data` for why a swarm that averages nothing fails the check of the loss.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.efficiency_account import Account, account, bare_rounds, control_rounds, our_rounds
from benchmarks.efficiency_table import breakdown_table, result_table
from benchmarks.swarm_lab import Lab, PeerProcess
from benchmarks.swarm_spec import Driver, ProcessSpec
from calm_ray.tables import AveragingTable

TARGET_BATCH_SIZE = 512
MICRO_BATCH_SIZE = 8
NUM_TRAINERS = 2
NUM_EPOCHS, NUM_QUICK_EPOCHS = 8, 3
NUM_REPEATS = 3
SOLO_SECONDS, SOLO_QUICK_SECONDS = 15.0, 8.0
START_SECONDS = 90.0
EPOCH_SECONDS = 60.0
"""Given up after this long per epoch; about 9 are needed."""
COMPUTE_NICENESS = 10
"""Ours: as `calm_ray.peers.trainer` sets it. A bare trainer has no such thing."""
KINDS: tuple[Driver, ...] = ("bare-delayed", "bare-synchronous", "ours")
CONTROL: tuple[Driver, ...] = ("control",)
MIN_LOSS_SHARE = 0.95


@dataclass(frozen=True, kw_only=True)
class Solo:
    """What the trainers do alone, both at once."""

    samples_per_second: tuple[float, ...]
    cpu_seconds_per_sample: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run, against the solo rates before and after it."""

    kind: str
    repeat: int
    efficiency: float
    loss_drop: float
    solo: Solo
    account: Account


def measure_solo(folder: Path, *, seconds: float) -> Solo:
    with Lab() as lab:
        trainers = _start(lab, folder, driver="solo", num_epochs=1, seconds=seconds)
        spans = []
        for trainer in trainers:
            end = trainer.wait_for("end", timeout_seconds=START_SECONDS + seconds)
            spans.append((trainer.wait_for("boundary", timeout_seconds=1.0), end))
    return Solo(
        samples_per_second=tuple(b["cpu"]["num_samples"] / (b["clock"] - a["clock"]) for a, b in spans),
        cpu_seconds_per_sample=tuple(b["cpu"]["compute_cpu"] / b["cpu"]["num_samples"] for _, b in spans),
    )


def mean_of(before: Solo, after: Solo) -> Solo:
    def means(ones: Sequence[float], others: Sequence[float]) -> tuple[float, ...]:
        return tuple((a + b) / 2 for a, b in zip(ones, others, strict=True))

    return Solo(
        samples_per_second=means(before.samples_per_second, after.samples_per_second),
        cpu_seconds_per_sample=means(before.cpu_seconds_per_sample, after.cpu_seconds_per_sample),
    )


def measure(kind: Driver, folder: Path, *, num_epochs: int) -> Account:
    with Lab() as lab:
        trainers = _start(lab, folder, driver=kind, num_epochs=num_epochs)
        for trainer in trainers:
            trainer.wait_for("end", timeout_seconds=START_SECONDS + EPOCH_SECONDS * num_epochs)
        journals = [trainer.events() for trainer in trainers]
    if kind == "ours":
        rounds = our_rounds(journals)
    elif kind == "control":
        rounds = control_rounds(journals, target_batch_size=TARGET_BATCH_SIZE)
    else:
        rounds = bare_rounds(journals)
    return account(journals, num_epochs=num_epochs, rounds=rounds)


def _start(
    lab: Lab, folder: Path, *, driver: Driver, num_epochs: int, seconds: float | None = None
) -> list[PeerProcess]:
    """Start the trainers one after the other, and let them begin together."""
    gate = folder / "gate"
    run_id = f"efficiency-{uuid.uuid4().hex[:8]}"
    cores = sorted(os.sched_getaffinity(0))
    trainers: list[PeerProcess] = []
    addresses: tuple[str, ...] = ()
    for index in range(NUM_TRAINERS):
        spec = ProcessSpec(
            name=f"trainer-{index}", folder=folder / f"trainer-{index}", run_id=run_id, driver=driver,
            initial_peers=addresses, averaging=AveragingTable(network="lan"), target_batch_size=TARGET_BATCH_SIZE,
            num_epochs=num_epochs, task="albert", seed=index, micro_batch_size=MICRO_BATCH_SIZE, seconds=seconds,
            gate=gate, core=cores[index % len(cores)], should_log_batches=True,
            niceness=COMPUTE_NICENESS if driver == "ours" else 0,
        )  # fmt: skip
        trainers.append(lab.start(spec))
        addresses = tuple(trainers[0].wait_for("ready", timeout_seconds=START_SECONDS)["addresses"])
    for trainer in trainers:
        trainer.wait_for("ready", timeout_seconds=START_SECONDS)
    gate.touch()
    return trainers


def run(kinds: Sequence[Driver], *, num_repeats: int, num_epochs: int, solo_seconds: float) -> list[Result]:
    """All kinds, interleaved, and once the control."""
    results: list[Result] = []
    initial_loss = _initial_loss()
    with tempfile.TemporaryDirectory(prefix="calm-efficiency-") as root:
        solo = measure_solo(Path(root) / "solo", seconds=solo_seconds)
        for repeat in range(num_repeats):
            turn = [*kinds[repeat % len(kinds) :], *kinds[: repeat % len(kinds)], *(CONTROL if not repeat else ())]
            for kind in turn:
                folder = Path(root) / f"{repeat}-{kind}"
                found = measure(kind, folder, num_epochs=num_epochs)
                before, solo = solo, measure_solo(folder.with_name(f"{folder.name}-solo"), seconds=solo_seconds)
                rates = mean_of(before, solo)
                result = Result(
                    kind=kind, repeat=repeat, solo=rates, account=found, loss_drop=initial_loss - found.loss,
                    efficiency=found.samples_per_second / sum(rates.samples_per_second),
                )  # fmt: skip
                results.append(result)
                _say(
                    f"repeat={repeat} kind={kind} efficiency={result.efficiency:.3f} seconds={found.seconds:.1f} "
                    f"true={found.num_true_rounds}/{found.num_rounds} loss_drop={result.loss_drop:.3f} "
                    f"solo={sum(before.samples_per_second):.2f},{sum(solo.samples_per_second):.2f}"
                )
    return results


def _initial_loss() -> float:
    from benchmarks.efficiency_data import TwoLanguages

    return TwoLanguages(seed=0, batch_size=MICRO_BATCH_SIZE).held_out_loss()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def verdicts(results: Sequence[Result]) -> Mapping[str, bool]:
    """The claims of this benchmark, each true or not."""
    drops = {kind: statistics.median(r.loss_drop for r in results if r.kind == kind) for kind in _kinds(results)}
    if "bare-synchronous" not in drops:
        return {}
    claims = {
        f"{kind}: loss falls by at least {MIN_LOSS_SHARE} of bare synchronous'": (
            drops[kind] >= MIN_LOSS_SHARE * drops["bare-synchronous"]
        )
        for kind in drops
        if kind not in ("control", "bare-synchronous")
    }
    if "control" in drops:
        claims["control that averages nothing: fails that check"] = (
            drops["control"] < MIN_LOSS_SHARE * drops["bare-synchronous"]
        )
    ours = {r.repeat: r.efficiency for r in results if r.kind == "ours"}
    others = [r for r in results if r.kind.startswith("bare") and r.repeat in ours]
    if ours and others:
        claims["ours: at least 0.92 (median)"] = statistics.median(ours.values()) >= 0.92
        claims["ours: ahead of both in every repeat"] = all(ours[r.repeat] > r.efficiency for r in others)
    return claims


def _kinds(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(r.kind for r in results))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.efficiency", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repeat of 3 epochs: to see that it runs")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="measure these kinds only")
    parser.add_argument("--repeats", type=int, default=NUM_REPEATS)
    parser.add_argument("--json", type=Path, help="write all results there")
    arguments = parser.parse_args()
    results = run(
        tuple(arguments.only), num_repeats=1 if arguments.quick else arguments.repeats,
        num_epochs=NUM_QUICK_EPOCHS if arguments.quick else NUM_EPOCHS,
        solo_seconds=SOLO_QUICK_SECONDS if arguments.quick else SOLO_SECONDS,
    )  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in results], indent=1))
    print(result_table(results), breakdown_table(results), sep="\n\n")
    for claim, holds in verdicts(results).items():
        print(f"- {'yes' if holds else 'NO '} {claim}")


if __name__ == "__main__":
    main()
