"""One peer of a measured or tested swarm, in a process of its own: `python -m benchmarks.swarm_process SPEC.json`.

It computes the task's gradients and steps with the driver that the spec names. SIGTERM: it leaves politely.
"""

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from benchmarks.swarm_cpu import CpuMeter
from benchmarks.swarm_spec import Journal, ProcessSpec
from benchmarks.swarm_tasks import Task, digest_of, make_task, parameters_of
from calm_ray.swarm.hygiene import bind_children_to_parent

if TYPE_CHECKING:
    from benchmarks.swarm_counts import WireCounter

GATE_POLL_SECONDS = 0.02
LOG_LEVEL = "CALM_RAY_LAB_LOG"
"""Environment variable, for a closer look: INFO or DEBUG."""
_PR_SET_PDEATHSIG = 1


class Stepper(Protocol):
    """Who takes the global step."""

    addresses: list[str]
    peer_id: str

    @property
    def epoch(self) -> int:
        """The epoch of the parameters that the model has now."""

    def begin(self) -> None:
        """Called once, before anything else: catch up with the swarm, take part."""

    def step(self, num_samples: int) -> None:
        """After each micro-batch; `.grad` is cleared by the callee."""

    def settle(self) -> None:
        """Let every round that has begun end, and the model have its result."""

    def assist(self) -> None:
        """An auxiliary peer's turn."""

    def close(self) -> None: ...


class Peer:
    """The loop that every driver is measured in."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec, self.stop = spec, threading.Event()
        logging.basicConfig(level=os.environ.get(LOG_LEVEL, "WARNING"))
        signal.signal(signal.SIGTERM, lambda *_: self.stop.set())
        if spec.core is not None:
            os.sched_setaffinity(0, {spec.core})
        torch.set_num_threads(1)
        self.journal = Journal(spec.journal)
        self.counter = _make_counter() if spec.should_count else None
        self.task = make_task(spec)
        self.stepper = _make_stepper(spec, self.task, self.journal)
        self.cpu = CpuMeter()

    def run(self) -> None:
        spec, stepper = self.spec, self.stepper
        self.journal.write("ready", pid=os.getpid(), peer_id=stepper.peer_id, addresses=stepper.addresses)
        if spec.niceness:
            os.nice(spec.niceness)
        while spec.gate is not None and not spec.gate.exists() and not self.stop.is_set():
            time.sleep(GATE_POLL_SECONDS)
        stepper.begin()
        if spec.role == "auxiliary":
            self._assist()
        else:
            self._train()
        self.journal.write("leaving", epoch=stepper.epoch)
        stepper.close()
        self.journal.write("left")

    def _assist(self) -> None:
        seen = -1
        while not self.stop.is_set():
            self.stepper.assist()
            if self.stepper.epoch != seen:
                seen = self._on_boundary()
            self.stop.wait(GATE_POLL_SECONDS)

    def _train(self) -> None:
        spec, stepper, task = self.spec, self.stepper, self.task
        deadline = time.monotonic() + spec.seconds if spec.seconds is not None else float("inf")
        seen = self._on_boundary()
        while not self.stop.is_set() and stepper.epoch < spec.num_epochs and time.monotonic() < deadline:
            epoch = stepper.epoch
            with self.cpu.span("compute"):
                computed = task.compute()
            if spec.pause_seconds:
                self.stop.wait(spec.pause_seconds)
            with self.cpu.span("step"):
                stepper.step(computed.num_samples)
            if spec.should_log_batches:
                self.journal.write("micro", epoch=epoch, batch=computed.batch, num_samples=computed.num_samples)
            self.cpu.num_samples += computed.num_samples
            if stepper.epoch != seen:
                seen = self._on_boundary()
        if not self.stop.is_set():
            self._on_end()
            self.stop.wait()

    def _on_boundary(self) -> int:
        epoch = self.stepper.epoch
        counts = self.counter.read() if self.counter is not None else {}
        self.journal.write("boundary", epoch=epoch, cpu=self.cpu.read(), counts=counts)
        return epoch

    def _on_end(self) -> None:
        """The measured part is over: say how well the model does, and go on serving the others."""
        if self.spec.driver == "solo":
            self.journal.write("end", cpu=self.cpu.read())
            return
        self.journal.write("settling", epoch=self.stepper.epoch)
        self.stepper.settle()
        parameters = parameters_of(self.task)
        torch.save(torch.cat([p.detach().flatten() for p in parameters]), self.spec.folder / "parameters.pt")
        digest = digest_of(parameters)
        self.journal.write("end", epoch=self.stepper.epoch, loss=self.task.held_out_loss(), digest=digest)


def _make_counter() -> "WireCounter":
    from benchmarks.swarm_counts import WireCounter

    counter = WireCounter()
    counter.install()
    return counter


def _make_stepper(spec: ProcessSpec, task: Task, journal: Journal) -> Stepper:
    if spec.driver == "ours":
        from benchmarks.swarm_ours import OurStepper

        return OurStepper(spec, task, journal)
    if spec.driver.startswith("bare"):
        from benchmarks.efficiency_bare import BareStepper

        return BareStepper(spec, task, journal)
    from benchmarks.swarm_alone import LoneStepper

    return LoneStepper(spec, task)


def main(path: Path) -> None:
    # Whoever started us is gone: so are we, and what hivemind forks. A killed benchmark must leave nothing behind.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    bind_children_to_parent()
    faulthandler.register(signal.SIGUSR1)  # where do you hang? Every thread's stack, into the log
    peer = Peer(ProcessSpec.model_validate_json(path.read_bytes()))
    try:
        peer.run()
    except BaseException as exc:
        peer.journal.write("failed", error=repr(exc))
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
