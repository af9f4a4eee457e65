"""One trainer of a bare swarm: `python -m benchmarks.fault_bare SPEC.json`, in its user's `while true` loop.

The run's own model, text and optimizer, computed by the run's own loop; the swarm is `hivemind.Optimizer` alone, set up
as in its ALBERT example and as `efficiency_bare` measures it. Beside what its users have, it dies with its loop and
takes what it forked along: what stock leaves behind holds ports, and a bare swarm would not come back from anything.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.swarm_spec import Journal
from calm_ray.swarm.hygiene import bind_children_to_parent

COUNT_SECONDS = 1.0


def main(spec: dict[str, Any]) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    bind_children_to_parent()
    journal = Journal(Path(spec["folder"]) / "journal.jsonl")
    boot = uuid.uuid4().hex
    journal.write("life", boot=boot, pid=os.getpid())

    import torch

    from calm_ray.bundle import open_bundle
    from calm_ray.peers.learner import make_learner
    from calm_ray.training.compute import choose_compute, describe_device
    from calm_ray.training.loop import GradientSource
    from calm_ray.training.pace import Pace, busy_clock
    from calm_ray.training.prepare import load_bundle_tokenizer
    from calm_ray.training.stream import TrainingBatches

    torch.set_num_threads(1)
    bundle = Path(spec["bundle"])
    _, run = open_bundle(bundle)
    learner = make_learner(run, bundle, device="cpu")
    compute = choose_compute(
        describe_device("cpu"), peer=_peer_table(spec["micro_batch_size"]), sequence_length=run.data.sequence_length
    )
    tokenizer, special_ids = load_bundle_tokenizer(bundle)
    dht, optimizer = _swarm(spec, learner=learner, micro_batch_size=compute.micro_batch_size)
    journal.write("ready", boot=boot, addresses=[str(a) for a in dht.get_visible_maddrs()])
    threading.Thread(target=_tell_rounds, args=(optimizer.grad_averager, journal, boot), daemon=True).start()
    with TrainingBatches(
        run, bundle_dir=bundle, data_root=Path(), tokenizer=tokenizer, special_ids=special_ids,
        batch_size=compute.micro_batch_size, seed=spec["seed"],
    ) as batches:  # fmt: skip
        source = GradientSource(learner.model, batches=batches, compute=compute)
        pace, busy_seconds = Pace(spec["duty_cycle"]), busy_clock("cpu")
        counts: dict[int, int] = {}
        told_at = 0.0
        while True:
            epoch = optimizer.local_epoch
            optimizer.grad_averager.epoch = epoch
            began, busy = time.monotonic(), busy_seconds()
            result = source.step(epoch=epoch)
            pace.note(busy_seconds() - busy)
            counts[epoch] = counts.get(epoch, 0) + result.num_samples
            optimizer.step(batch_size=result.num_samples)
            optimizer.zero_grad()
            time.sleep(pace.rest_after(time.monotonic() - began))
            if time.monotonic() > told_at + COUNT_SECONDS or epoch != optimizer.local_epoch:
                told_at = time.monotonic()
                counts = {e: n for e, n in counts.items() if e >= epoch - 1}
                norm = _norm(learner.model)
                journal.write("count", boot=boot, epoch=optimizer.local_epoch, computed=counts, norm=norm)


def _swarm(spec: dict[str, Any], *, learner: Any, micro_batch_size: int) -> tuple[Any, Any]:
    import hivemind
    from hivemind.compression import Float16Compression

    from benchmarks import efficiency_bare as stock

    dht = hivemind.DHT(
        initial_peers=spec["initial_peers"] or None, start=True, host_maddrs=[spec["listen"]],
        identity_path=spec["identity"] or None,
    )  # fmt: skip
    optimizer = hivemind.Optimizer(
        dht=dht, run_id="bare", target_batch_size=spec["target_batch_size"], batch_size_per_step=micro_batch_size,
        params=learner.param_groups, optimizer=learner.rules.make_optimizer, scheduler=learner.rules.make_schedule,
        matchmaking_time=stock.MATCHMAKING_SECONDS, averaging_timeout=stock.AVERAGING_TIMEOUT_SECONDS,
        next_chunk_timeout=stock.AVERAGING_TIMEOUT_SECONDS / 4, offload_optimizer=True, delay_grad_averaging=True,
        delay_optimizer_step=True, delay_state_averaging=True, average_state_every=stock.AVERAGE_STATE_EVERY,
        grad_compression=Float16Compression(), state_averaging_compression=Float16Compression(),
        grad_averager_factory=partial(stock.CountingAverager, request_timeout=stock.REQUEST_TIMEOUT_SECONDS),
        averager_opts={"request_timeout": stock.REQUEST_TIMEOUT_SECONDS}, tracker_opts=stock.TRACKER,
    )  # fmt: skip
    return dht, optimizer


def _tell_rounds(averager: Any, journal: Journal, boot: str) -> None:
    """Write down each averaging step once it has ended. A round that failed has nothing to tell."""
    while True:
        if not averager.begun:
            time.sleep(0.2)
            continue
        epoch, _, control = averager.begun.pop(0)
        try:
            told = dict(control.result(60.0).told)
        except Exception as exc:  # noqa: BLE001  whatever ended the round: it did not average
            told = {"failed": repr(exc)[:200]}
        journal.write("bare_round", boot=boot, epoch=epoch, **told)


def _norm(model: Any) -> float:
    return float(sum(float(p.detach().double().square().sum()) for p in model.parameters()) ** 0.5)


def _peer_table(micro_batch_size: int) -> Any:
    from calm_ray.config import PeerTable

    return PeerTable(device="cpu", num_threads=1, micro_batch_size=micro_batch_size)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
