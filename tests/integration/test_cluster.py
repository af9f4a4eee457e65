"""The job on a Ray cluster of two nodes, and SIGKILL at each level above a peer: worker processes, driver, raylets."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from calm_ray.actors.desired import ActorReport, Member, SupervisorStatus
from calm_ray.peers.budget import Failure, Ledger, LedgerFile
from calm_ray.peers.status import PeerStatus
from tests.eventually import Child, Children, eventually
from tests.integration.raylets import SETTINGS
from tests.integration.runs import write_config
from tests.integration.test_job import ours

RUN_ID = "raylets"
ORGANISER = """
[organiser.job]
num_trainers = 2
num_auxiliary = {num_auxiliary}
adoption_seconds = 120

[organiser.checkpoint]
every_epochs = 1000
keep_last = 2
"""
WATCH = """
import ray, sys, time
ray.init(address=sys.argv[1], namespace="calm-ray", log_to_driver=False, logging_level="ERROR")
while True:
    try:
        actor = ray.get_actor(sys.argv[2] + "/supervisor")
        print(ray.get(actor.status.remote(), timeout=5), flush=True)
    except (ValueError, ray.exceptions.RayError) as exc:
        print("no:", repr(exc).replace(chr(10), " "), flush=True)
    time.sleep(0.25)  # sleep: between two looks of a program of its own
"""


class Organiser:
    """One config, run by drivers on a cluster, and a second driver that asks the supervisor what it sees."""

    def __init__(self, children: Children, folder: Path, *, num_auxiliary: int) -> None:
        self._children = children
        self.config = write_config(
            folder / "run.toml", run_id=RUN_ID, target_batch_size=4000,
            more=ORGANISER.format(num_auxiliary=num_auxiliary),
        )  # fmt: skip
        self.out = folder / "out"

    def start_cluster(self) -> None:
        self.cluster = self._children.start([sys.executable, "-m", "tests.integration.raylets"])
        eventually(lambda: "worker_id" in self.cluster.output(), 60, self.cluster.tail)
        line = next(line for line in self.cluster.output().splitlines() if line.startswith("{"))
        self.facts: dict[str, Any] = json.loads(line)
        self.watcher = self._children.start([sys.executable, "-c", WATCH, self.facts["address"], RUN_ID], env=SETTINGS)

    def kill_cluster(self) -> None:
        """SIGKILL to the head's raylet and to what knows all about the cluster; the rest has to find out."""
        for name in ("head", "gcs"):
            os.kill(self.facts[name], signal.SIGKILL)

    def job(self, *options: str) -> Child:
        return self._children.start(
            [sys.executable, "-m", "launchers.job", self.config, "--out", self.out, *options],
            env={**SETTINGS, "RAY_ADDRESS": self.facts["address"]},
        )  # fmt: skip

    def status(self) -> SupervisorStatus | None:
        lines = self.watcher.output().split("\n")[:-1]
        assert self.watcher.is_running(), self.watcher.tail(5)
        newest = lines[-1] if lines else ""
        return SupervisorStatus.model_validate_json(newest) if newest.startswith("{") else None

    def member(self, name: str) -> Member | None:
        status = self.status()
        return next((m for m in status.members if m.name == name), None) if status is not None else None

    def wait(self, name: str, holds: Callable[[Any, Any], object], timeout: float) -> tuple[Any, float]:
        """Until `holds(report, peer)` for that slot's; its report, and the seconds that it took."""
        started = time.monotonic()

        def is_so() -> Any:
            member = self.member(name)
            assert member is not None and member.report is not None and member.is_there, f"{name}: {member}"
            assert holds(member.report, member.report.peer), f"{name}: {member.report}"
            return member.report

        found = eventually(is_so, timeout, self.words, interval=0.2)
        return found, time.monotonic() - started

    def wait_for_training(self, timeout: float = 120) -> dict[str, int]:
        """Until every peer is at work; name -> the watchdog's process."""
        pids = {}
        names = [path.parent.name for path in (self.out / "peers").glob("*/lock")]
        status = self.status()
        assert status is not None
        for slot in status.desired.slots:
            state = {"auxiliary": "assisting", "monitor": "watching", "trainer": "training"}[slot.role]
            report, _ = self.wait(slot.name, partial(_is_in, state), timeout)
            pids[slot.name] = report.peer.pid
        assert sorted(pids) == sorted({*names, *pids})
        return pids

    def epoch(self) -> int:
        member = self.member("auxiliary-0")
        peer = member.peer if member is not None else None
        return peer.report.epoch if peer is not None and peer.report is not None else -1

    def words(self) -> str:
        log = self.out / "supervisor.log"
        return f"{self.watcher.tail(1)[:3000]}\n{log.read_text()[-4000:] if log.exists() else 'no log'}"

    def end(self) -> None:
        down = self.job("--down")
        assert down.wait(90) == 0, down.tail()
        assert "Nothing is left." in down.output()
        eventually(lambda: not ours(self.out), 10, lambda: f"left: {ours(self.out)}")


@pytest.fixture
def start(children: Children, tmp_path: Path) -> Callable[..., Organiser]:
    def start(num_auxiliary: int = 1) -> Organiser:
        organiser = Organiser(children, tmp_path, num_auxiliary=num_auxiliary)
        organiser.start_cluster()
        return organiser

    return start


def _is_in(state: str, _report: ActorReport, peer: PeerStatus) -> bool:
    return peer.state == state


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.timeout(400)
def test_killed_workers_and_driver_cost_no_peer_but_a_trainer_and_down_leaves_nothing(
    start: Callable[..., Organiser],
) -> None:
    organiser = start()
    job = organiser.job()
    job.says("calm-ray join calm1-", timeout=120)
    job.says("trainers=2", timeout=120)
    pids = organiser.wait_for_training()
    seconds: dict[str, float] = {}

    trainer, _ = organiser.wait("trainer-0", lambda r, p: True, 5)
    os.kill(trainer.worker_pid, signal.SIGKILL)
    killed_at = time.monotonic()
    eventually(lambda: not _is_alive(pids["trainer-0"]), 10, organiser.words)
    seconds["trainer without lease gone"] = time.monotonic() - killed_at
    again, _ = organiser.wait(
        "trainer-0", lambda r, p: r.worker_pid != trainer.worker_pid and p.state == "training", 90
    )
    seconds["trainer back"] = time.monotonic() - killed_at
    assert again.peer.pid != pids["trainer-0"]
    pids["trainer-0"] = again.peer.pid
    job.says("trainer-0: its Ray worker died")
    job.says("trainer-0: back, training")

    auxiliary, _ = organiser.wait("auxiliary-0", lambda r, p: True, 5)
    os.kill(auxiliary.worker_pid, signal.SIGKILL)
    adopted, seconds["auxiliary peer adopted"] = organiser.wait(
        "auxiliary-0", lambda r, p: r.worker_pid != auxiliary.worker_pid and r.is_adopted, 60
    )
    assert adopted.peer.pid == pids["auxiliary-0"]

    before = organiser.status()
    assert before is not None
    os.kill(before.worker_pid, signal.SIGKILL)
    started = time.monotonic()
    eventually(lambda: (s := organiser.status()) is not None and s.worker_pid != before.worker_pid, 60, organiser.words)
    seconds["supervisor back"] = time.monotonic() - started
    assert organiser.wait_for_training() == pids

    job.signal_group(signal.SIGKILL)
    assert job.wait(10) == -signal.SIGKILL
    epoch = organiser.epoch()
    eventually(lambda: organiser.epoch() > epoch, 60, organiser.words)
    parked, _ = organiser.wait("trainer-1", lambda r, p: True, 5)
    _park(organiser.out / "peers" / "trainer-1")
    os.kill(parked.worker_pid, signal.SIGKILL)
    organiser.wait("trainer-1", lambda r, p: p.state == "parked" and p.error == "by the test", 60)
    follower = organiser.job()
    follower.says("The run is up: following it.", timeout=60)
    asked_at = time.monotonic()
    organiser.wait("trainer-1", lambda r, p: p.state == "training", 60)
    seconds["parked trainer back"] = time.monotonic() - asked_at
    pids["trainer-1"] = organiser.wait_for_training()["trainer-1"]
    follower.says("epoch=", timeout=60)
    follower.process.send_signal(signal.SIGINT)
    assert follower.wait(30) == 130
    assert "The swarm trains on; run the same command to follow it again; --down ends it." in follower.output()

    text = organiser.config.read_text()
    organiser.config.write_text(text.replace("target_batch_size = 4000", "target_batch_size = 5000"))
    refused = organiser.job()
    assert refused.wait(60) == 2
    assert "is up, and [run] has changed: target_batch_size was 4000, is 5000" in refused.tail(1)
    organiser.config.write_text(text)
    assert organiser.wait_for_training() == pids

    trainer, _ = organiser.wait("trainer-0", lambda r, p: True, 5)
    os.kill(trainer.worker_pid, signal.SIGKILL)
    eventually(lambda: (m := organiser.member("trainer-0")) is not None and m.is_unheard, 60, organiser.words)
    started = time.monotonic()
    organiser.end()  # while that one is being created
    seconds["down"] = time.monotonic() - started
    print({what: round(value, 1) for what, value in seconds.items()})


def _park(folder: Path) -> None:
    """As if it had given up a moment ago: whoever starts it next finds that."""
    now = time.time()
    failure = Failure(at=now, cause="mistake", why="by the test", has_worked=False)
    LedgerFile(folder).keep(Ledger(failures=(failure,)).parked("by the test", now=now))


@pytest.mark.slow(shard=2)
@pytest.mark.timeout(600)
def test_killed_raylets_cost_at_most_one_epoch(start: Callable[..., Organiser]) -> None:
    organiser = start(num_auxiliary=2)
    job = organiser.job()
    job.says("trainers=2", timeout=180)
    pids = organiser.wait_for_training()
    seconds: dict[str, float] = {}

    status = organiser.status()
    assert status is not None
    there = [m.name for m in status.members if m.node_id == organiser.facts["worker_id"]]
    assert "auxiliary-1" in there and any(name.startswith("trainer") for name in there)
    os.kill(organiser.facts["worker"], signal.SIGKILL)
    killed_at = time.monotonic()
    for name in there:
        report, _ = organiser.wait(
            name, lambda r, p: r.node_id == organiser.facts["head_id"] and p.state in ("assisting", "training"), 120
        )
        seconds[f"{name} on the other node"] = time.monotonic() - killed_at
        assert (report.peer.pid == pids[name]) == (name == "auxiliary-1"), "on one machine, an orphan is adopted"
    pids = organiser.wait_for_training()
    epoch = organiser.epoch()
    eventually(lambda: organiser.epoch() > epoch, 60, organiser.words)

    epoch = organiser.epoch()
    organiser.kill_cluster()
    killed_at = time.monotonic()
    trainers = [pid for name, pid in pids.items() if name.startswith("trainer")]
    eventually(lambda: not any(_is_alive(pid) for pid in trainers), 60)
    seconds["trainers gone with the cluster"] = time.monotonic() - killed_at
    job.wait(90)
    print(job.tail(5))
    organiser.cluster.signal_group(signal.SIGKILL)

    organiser.start_cluster()
    again = organiser.job()
    again.says("Adopting what an earlier job has left running", timeout=90)
    again.says("trainers=2", timeout=120)
    seconds["new cluster trains"] = time.monotonic() - killed_at
    now = organiser.wait_for_training()
    for name in ("auxiliary-0", "auxiliary-1", "monitor-0"):
        assert now[name] == pids[name]
    assert organiser.epoch() >= epoch - 1
    organiser.end()
    print({what: round(value, 1) for what, value in seconds.items()})
