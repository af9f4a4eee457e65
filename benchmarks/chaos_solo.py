"""How fast trainers are alone: `python -m benchmarks.chaos_solo` computes what one of them computes, in no swarm.

`solo_rates` starts three at once, for three is what the machine has to carry in a swarm as well.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from calm_ray.config import PeerTable
from tests.shards import ROOT

START_SECONDS = 120.0
COMPUTE_NICENESS = 10
"""As `calm_ray.peers.trainer` sets it."""


def solo_rates(
    bundle: Path, *, num_trainers: int, seconds: float, micro_batch_size: int, duty_cycle: float
) -> list[float]:
    """Samples per second of each, all of them computing at once."""
    started = []
    for seed in range(num_trainers):
        argv = [sys.executable, "-W", "ignore", "-m", "benchmarks.chaos_solo", str(bundle)]
        options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        started.append(
            subprocess.Popen(
                [*argv, *map(str, (micro_batch_size, duty_cycle, seed))],
                cwd=ROOT,
                text=True,
                env=environment,
                **options,
            )
        )
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", f"{process.args!r} did not come up"
        for process in started:
            assert process.stdin is not None
            process.stdin.write(f"{seconds}\n")
            process.stdin.flush()
        found = []
        for process in started:
            assert process.stdout is not None
            found.append(float(json.loads(process.stdout.readline())))
        return found
    finally:
        for process in started:
            process.kill()
            process.communicate()


def main(bundle: Path, *, micro_batch_size: int, duty_cycle: float, seed: int) -> None:
    import torch

    from calm_ray.bundle import open_bundle
    from calm_ray.peers.learner import make_learner
    from calm_ray.training.compute import choose_compute, describe_device
    from calm_ray.training.loop import GradientSource
    from calm_ray.training.pace import Pace, busy_clock
    from calm_ray.training.prepare import load_bundle_tokenizer
    from calm_ray.training.stream import TrainingBatches

    torch.set_num_threads(1)
    _, run = open_bundle(bundle)
    peer = PeerTable(device="cpu", num_threads=1, micro_batch_size=micro_batch_size)
    compute = choose_compute(describe_device("cpu"), peer=peer, sequence_length=run.data.sequence_length)
    model = make_learner(run, bundle, device="cpu").model
    tokenizer, special_ids = load_bundle_tokenizer(bundle)
    os.nice(COMPUTE_NICENESS)
    with TrainingBatches(
        run, bundle_dir=bundle, data_root=Path(), tokenizer=tokenizer, special_ids=special_ids,
        batch_size=compute.micro_batch_size, seed=seed,
    ) as batches:  # fmt: skip
        source = GradientSource(model, batches=batches, compute=compute)
        source.step(epoch=0)
        pace, busy_seconds = Pace(duty_cycle), busy_clock("cpu")
        print("ready", flush=True)
        seconds = float(sys.stdin.readline())
        started, number = time.monotonic(), 0
        while (began := time.monotonic()) < started + seconds:
            busy = busy_seconds()
            number += source.step(epoch=0).num_samples
            pace.note(busy_seconds() - busy)
            for parameter in model.parameters():
                parameter.grad = None
            time.sleep(pace.rest_after(time.monotonic() - began))
        print(json.dumps(number / (time.monotonic() - started)), flush=True)
        sys.stdin.readline()  # until everybody has done: the others are to be measured with us beside them


if __name__ == "__main__":
    main(Path(sys.argv[1]), micro_batch_size=int(sys.argv[2]), duty_cycle=float(sys.argv[3]), seed=int(sys.argv[4]))
