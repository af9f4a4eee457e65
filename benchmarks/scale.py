"""What a round costs each peer as the swarm grows: `python -m benchmarks.scale [--quick] [--sizes 4 8 16 32]`

Light peers (a model of 31,212 parameters, epochs of some seconds) in processes of their own, on this machine. Counted
are the messages and bytes that a peer exchanges with others, not the time: 32 peers on two cores are no swarm to be
timed. The target batch grows with the swarm, so epochs keep their length, as they would if a run grew.

Each measure is fitted over the sizes measured by the law that its code implies, and put down for 1,000 peers: level
(the mean: a timer or a bandwidth bounds it, whatever N is), a + b log2 N (a walk through the DHT), or a + b N. What
grows like N per peer grows like N squared over the swarm: the records of progress, of reports and of the roster, which
everyone reads whole. The time between two readings grows with N to bound that (`calm_ray.swarm.progress`), so beyond
some hundred peers the bytes per second level off; per round they go on growing with the length of an epoch. The
leader's message with all members is the other such term: 70 bytes for each of N to each of N.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.swarm_counts import DHT_MEASURES, KINDS
from benchmarks.swarm_lab import Lab, PeerProcess
from benchmarks.swarm_spec import ProcessSpec
from benchmarks.swarm_tasks import NUM_PARAMETERS
from calm_ray.tables import AveragingTable

SIZES, QUICK_SIZES = (4, 8, 16, 32), (4, 6)
NUM_EPOCHS, NUM_QUICK_EPOCHS = 12, 5
FIRST_EPOCH = 2
"""Joining is not what is measured."""
MICRO_BATCH_SIZE = 4
PAUSE_SECONDS = 0.5
SAMPLES_PER_PEER = 40
"""Of each epoch, so that epochs last about five seconds at any size."""
START_SECONDS, EPOCH_SECONDS = 180.0, 60.0
PAPER_SIZE = 1000


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one peer and one round, mean over peers and rounds."""

    num_peers: int
    epoch_seconds: float
    group_share: float
    """Group size over the number of peers, mean."""
    values: Mapping[str, float]


def measure(size: int, folder: Path, *, num_epochs: int) -> Cost:
    """One auxiliary peer and `size - 1` trainers."""
    with Lab() as lab:
        peers = _start(lab, folder, size=size, num_epochs=num_epochs)
        for peer in peers[1:]:
            peer.wait_for("end", timeout_seconds=START_SECONDS + EPOCH_SECONDS * num_epochs)
        journals = [peer.events() for peer in peers]
    return _cost(journals, num_epochs=num_epochs)


def _start(lab: Lab, folder: Path, *, size: int, num_epochs: int) -> list[PeerProcess]:
    def spec(name: str, **values: Any) -> ProcessSpec:
        return ProcessSpec(
            name=name, folder=folder / name, run_id=f"scale-{size}", num_epochs=num_epochs,
            averaging=AveragingTable(network="lan"), target_batch_size=SAMPLES_PER_PEER * (size - 1),
            micro_batch_size=MICRO_BATCH_SIZE, pause_seconds=PAUSE_SECONDS, should_count=True, **values,
        )  # fmt: skip

    auxiliary = lab.fork(spec("aux", role="auxiliary"))
    addresses = tuple(auxiliary.wait_for("ready", timeout_seconds=START_SECONDS)["addresses"])
    peers = [auxiliary]
    for index in range(size - 1):
        peer = lab.fork(spec(f"t{index}", seed=index, initial_peers=addresses, gate=folder / "gate"))
        peers.append(peer)
        peer.wait_for("ready", timeout_seconds=START_SECONDS)
    (folder / "gate").touch()
    return peers


def _cost(journals: Sequence[Sequence[Mapping[str, Any]]], *, num_epochs: int) -> Cost:
    rows: list[dict[str, float]] = []
    seconds: list[float] = []
    for events in journals:
        marks = [e for e in events if e["event"] == "boundary" and FIRST_EPOCH <= e["epoch"] <= num_epochs]
        first, last = marks[0], marks[-1]
        number = last["epoch"] - first["epoch"]
        row = {slot: (last["counts"][slot] - first["counts"][slot]) / number for slot in last["counts"]}
        seconds.append((last["clock"] - first["clock"]) / number)
        rounds = [e for e in events if e["event"] == "round" and first["epoch"] <= e["epoch"] < last["epoch"]]
        row["exchange_bytes"] = sum(e["bytes_sent"] for e in rounds) / number
        rows.append(row)
    values = {slot: statistics.mean(row[slot] for row in rows) for slot in rows[0]}
    groups = [e["group_size"] for events in journals for e in events if e["event"] == "round" and e["is_true"]]
    return Cost(
        num_peers=len(journals), epoch_seconds=statistics.mean(seconds),
        group_share=statistics.mean(groups) / len(journals), values=values | _sums(values),
    )  # fmt: skip


DHT_CALLS = ("find", "store", "ping")


def _sums(values: Mapping[str, float]) -> dict[str, float]:
    return {
        "DHT messages": sum(values[f"{kind}_messages"] for kind in DHT_CALLS),
        "DHT bytes": sum(values[f"{kind}_bytes"] for kind in DHT_CALLS),
    }


Law = Literal["level", "log", "linear"]

ROWS: Mapping[str, tuple[str, Law]] = {
    "reads": ("DHT reads", "level"),
    "records_read": ("records in them", "linear"),
    "writes": ("DHT writes", "level"),
    "DHT messages": ("DHT messages (find, store, ping and their answers)", "log"),
    "DHT bytes": ("DHT bytes", "linear"),
    "join_round_messages": ("matchmaking messages", "level"),
    "join_round_bytes": ("matchmaking bytes", "linear"),
    "exchange_calls": ("all-reduce streams", "level"),
    "exchange_bytes": (f"all-reduce bytes sent ({NUM_PARAMETERS:,} parameters, fp16)", "level"),
    "parts_calls": ("repairs and late reads", "level"),
    "other_calls": ("other calls", "level"),
}


def fit(sizes: Sequence[int], values: Sequence[float], *, law: Law) -> tuple[str, float]:
    """The fitted law in words, and what it says for PAPER_SIZE."""
    if law == "level" or len(sizes) == 1:
        mean = statistics.mean(values)
        return f"{_short(mean)}", mean
    scale = np.log2 if law == "log" else np.asarray
    slope, offset = np.polyfit(scale(np.array(sizes, dtype=float)), values, 1)
    unit = "log2 N" if law == "log" else "N"
    return f"{_short(offset)} {slope:+.3g} {unit}", float(offset + slope * scale(np.array(float(PAPER_SIZE))))


def table(costs: Sequence[Cost]) -> str:
    """Per round and peer, by size; the fit; and what it says for PAPER_SIZE."""
    assert set(ROWS) <= {f"{k}_{m}" for k in KINDS for m in ("calls", "messages", "bytes")} | set(DHT_MEASURES) | {
        "DHT messages", "DHT bytes",
    }  # fmt: skip
    sizes = [cost.num_peers for cost in costs]
    head = " | ".join(f"N={size}" for size in sizes)
    lines = [
        f"| per round and peer | {head} | fit | N={PAPER_SIZE} on paper |", "|---" * (len(sizes) + 3) + "|"
    ]  # fmt: skip
    for slot, (title, law) in ROWS.items():
        found = [cost.values[slot] for cost in costs]
        words, paper = fit(sizes, found, law=law)
        cells = " | ".join(_short(value) for value in found)
        lines.append(f"| {title} | {cells} | {words} | {_short(max(0.0, paper))} |")
    lines.append(f"| seconds per epoch | {' | '.join(f'{c.epoch_seconds:.1f}' for c in costs)} | | |")
    lines.append(f"| group size / N | {' | '.join(f'{c.group_share:.2f}' for c in costs)} | | |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small swarms: to see that it runs")
    parser.add_argument("--sizes", type=int, nargs="+", help=f"numbers of peers; {SIZES} unless told")
    arguments = parser.parse_args()
    sizes = arguments.sizes or (QUICK_SIZES if arguments.quick else SIZES)
    costs = []
    with tempfile.TemporaryDirectory(prefix="calm-scale-") as root:
        for size in sizes:
            cost = measure(size, Path(root) / str(size), num_epochs=NUM_QUICK_EPOCHS if arguments.quick else NUM_EPOCHS)
            costs.append(cost)
            print(f"peers={size} epoch_seconds={cost.epoch_seconds:.1f} group_share={cost.group_share:.2f}",
                  file=sys.stderr, flush=True)  # fmt: skip
    print(table(costs))


if __name__ == "__main__":
    main()
