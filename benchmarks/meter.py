"""How fast this machine computes, all the while: rented cores change their speed by a third within minutes, and what
was measured alone before a run says little about the run.

`python -m benchmarks.meter` computes what a trainer computes, two micro-batches each few seconds, and writes down the
processor time of the second one (the first finds the caches cold). A trainer that computes a share of its time is as
fast as these allow, so their ratio scales its solo rate: see `Meter.slowdown`.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.shards import ROOT

INTERVAL_SECONDS = 2.0
"""0.1 s of one core each time: 5 %."""


class Meter:
    """Runs from `with` to its end."""

    def __init__(self, bundle: Path, *, micro_batch_size: int, log: Path) -> None:
        self._bundle, self._micro_batch_size, self._log = bundle, micro_batch_size, log

    def __enter__(self) -> Self:
        argv = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "benchmarks.meter",
            str(self._bundle),
            str(self._micro_batch_size),
        ]
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(
                argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def cost(self, *, since: float, until: float) -> float:
        """Mean processor seconds of a micro-batch between two monotonic times; ValueError if there was none."""
        return mean_cost(self._log.read_text().splitlines(), since=since, until=until)


def mean_cost(lines: list[str], *, since: float, until: float) -> float:
    """Of lines of a monotonic time and a cost. A mean, not a median: a trainer pays for the slow ones, too."""
    pairs = [tuple(map(float, line.split())) for line in lines if len(line.split()) == 2]
    return statistics.fmean(cost for at, cost in pairs if since <= at <= until)


def main(bundle: Path, micro_batch_size: int) -> None:
    from benchmarks.chaos_solo import computing

    with computing(bundle, micro_batch_size=micro_batch_size, seed=99) as compute:
        while True:
            compute()
            began = time.thread_time()
            compute()
            print(time.monotonic(), time.thread_time() - began, flush=True)
            time.sleep(INTERVAL_SECONDS)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
