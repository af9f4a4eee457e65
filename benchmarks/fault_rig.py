"""The swarm that is hurt: three trainers, two auxiliary peers and a monitor, kept by the job's supervisor on Ray.

Everything is the product's: `python -m launchers.job` on a cluster of two raylets. This file starts it, looks at the
peers by their control sockets, and ends it again.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import psutil
from pydantic import ValidationError

from benchmarks.fault_account import BACK_OFF, DOWNLOAD, GONE, JOINING, STARTING, TRAINING, WAITING
from benchmarks.fault_cluster import CLUSTER, STATUS
from benchmarks.fault_inject import Tree, tree_of
from benchmarks.fault_kinds import EVERYONE
from benchmarks.fault_watch import RoundSeen, Sighting, Watch
from calm_ray.actors.desired import Member, SupervisorStatus
from calm_ray.errors import CalmRayError
from calm_ray.observe.feed import FeedReader
from calm_ray.peers.control import socket_path
from calm_ray.peers.status import PeerStatus
from launchers.output import PEERS, live_peers
from tests.integration.raylets import SETTINGS
from tests.shards import ROOT

RUN_ID = "chaos"
POLL_SECONDS = 0.2
CLUSTER_SECONDS, START_SECONDS, END_SECONDS = 90.0, 240.0, 120.0
AT_WORK = {"trainer": TRAINING, "auxiliary": "assisting", "monitor": "watching"}
MIN_WITNESSES = 2


class OurRig:
    """`start()`, then `watch` knows all; `end()` leaves nothing, and says what is left nevertheless."""

    names = EVERYONE

    def __init__(self, config: Path, *, folder: Path) -> None:
        self.config, self.folder, self.out = config, folder, folder / "out"
        self.watch = Watch(self._look, is_true=lambda num_members: num_members >= MIN_WITNESSES)
        self._peer_names: dict[str, str] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._cluster: subprocess.Popen[bytes] | None = None
        self._num_nodes = 1
        self._job: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Blocks until all six are at work."""
        self._cluster = self._popen("cluster", "benchmarks.fault_cluster", RUN_ID, self.folder, has_input=True)
        self._wait(lambda: self._facts().get("address"), CLUSTER_SECONDS, "no cluster")
        self._job = self.job()
        self.watch.start()
        self._wait(lambda: self.watch.at_work(EVERYONE), START_SECONDS, "not all peers came up")

    def job(self, *options: str) -> subprocess.Popen[bytes]:
        environment = {**SETTINGS, "RAY_ADDRESS": self._facts()["address"]}
        return self._popen("job", "launchers.job", self.config, "--out", self.out, *options, env=environment)

    def end(self) -> list[str]:
        """The driver goes, `--down` ends the rest; a line for everything that is still there."""
        self.watch.stop()
        problems = []
        if self._job is not None:
            self._job.send_signal(signal.SIGTERM)  # SIGINT is ignored where we run in the background of a script
            self._job.wait(60)
            code = self.job("--down").wait(END_SECONDS)
            problems += [f"--down ended with {code}, see {self.folder}/job.log"] if code else []
        if self._cluster is not None and self._cluster.stdin is not None:
            self._cluster.stdin.close()
            self._cluster.wait(60)
        deadline = time.monotonic() + 10
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return problems + left

    def left(self) -> list[str]:
        """Processes that name our folder, and control sockets of our peers."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mine = process.pid == os.getpid() or process.pid in [p.pid for p in self._processes]
                if not mine and any(str(self.out) in part for part in process.cmdline()):
                    found.append(f"process {process.pid}: {' '.join(process.cmdline())[:120]}")
        sockets = [socket_path(self.out / PEERS / name) for name in EVERYONE]
        return found + [f"socket {path}" for path in sockets if path.exists()]

    def close(self) -> None:
        """After a failure: whatever we started."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for name in EVERYONE:
            if (tree := self.tree(name)) is not None:
                for process in tree.everyone:
                    with contextlib.suppress(psutil.Error):
                        process.terminate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.close()

    # --- for the injector --------------------------------------------------------------------------------------------

    def tree(self, name: str) -> Tree | None:
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            top = psutil.Process(int((self.out / PEERS / name / "lock").read_text()))
            if "calm_ray" in " ".join(top.cmdline()):
                children = top.children()
                return tree_of(top, next((p for p in children if "calm_ray.peers.child" in p.cmdline()), None))
        return None

    def watchdogs(self) -> list[int]:
        """Their process ids, as they wrote them; some may be dead."""
        found = []
        for name in EVERYONE:
            with contextlib.suppress(OSError, ValueError):
                found.append(int((self.out / PEERS / name / "lock").read_text()))
        return found

    def worker_pid(self, name: str) -> int | None:
        member = self._member(name)
        return member.report.worker_pid if member is not None and member.is_there and member.report else None

    def supervisor_pid(self) -> int | None:
        status = self._status()
        return status.worker_pid if status is not None else None

    def daemons(self) -> list[psutil.Process]:
        """Ray's own, and idle workers; not those that hold an actor of ours."""
        with contextlib.suppress(psutil.Error):
            assert self._cluster is not None
            found = psutil.Process(self._cluster.pid).children(recursive=True)
            return [p for p in found if p.name() not in ("ray::PeerActor", "ray::Supervisor")]
        return []

    def kill_node(self) -> bool:
        facts = self._facts()
        if facts["num_nodes"] < self._num_nodes:  # the new one is being made
            return False
        with contextlib.suppress(psutil.Error):
            psutil.Process(facts["worker"]).kill()
            return True
        return False

    def mend_node(self) -> None:
        assert self._cluster is not None and self._cluster.stdin is not None
        self._num_nodes += 1
        self._cluster.stdin.write(b"add\n")
        self._cluster.stdin.flush()

    def residents(self) -> list[str]:
        """Whose actors are on the worker node."""
        worker, status = self._facts()["worker_id"], self._status()
        return [m.name for m in status.members if m.node_id == worker and m.is_there] if status is not None else []

    def _member(self, name: str) -> Member | None:
        status = self._status()
        return next((m for m in status.members if m.name == name), None) if status is not None else None

    def _status(self) -> SupervisorStatus | None:
        with contextlib.suppress(OSError, ValidationError):
            return SupervisorStatus.model_validate_json((self.folder / STATUS).read_bytes())
        return None

    def _facts(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self.folder / CLUSTER).read_bytes())
            return found
        return {}

    # --- looking -----------------------------------------------------------------------------------------------------

    def _look(self) -> list[Sighting]:
        live = live_peers(self.out)
        self._peer_names |= {status.peer_id[-10:]: name for name, status in live.items() if status.peer_id}
        gone = [Sighting(name=name, phase=GONE, is_at_work=False) for name in EVERYONE if name not in live]
        seen = [sighting_of(name, status, self._peer_names) for name, status in live.items()]
        return [*gone, *(self._restarted(s) if s.phase == BACK_OFF else s for s in seen)]

    def _restarted(self, sighting: Sighting) -> Sighting:
        """A watchdog says "restarting" until the new child has said something, which is seconds after its start."""
        tree = self.tree(sighting.name)
        return replace(sighting, phase=STARTING) if tree is not None and tree.child is not None else sighting

    def feed_epochs(self) -> list[int]:
        """Of the monitor's feed, in the order of its rows."""
        epochs, after = [], 0
        with contextlib.suppress(CalmRayError), FeedReader(self.out / PEERS / "monitor-0" / "feed.sqlite") as feed:
            while events := feed.events(after=after):
                after = events[-1].seq
                epochs += [int(event.key) for event in events if event.kind == "epoch"]
        return epochs

    # --- processes ---------------------------------------------------------------------------------------------------

    def _popen(
        self, log: str, module: str, *arguments: object, env: Mapping[str, str] | None = None, has_input: bool = False
    ) -> subprocess.Popen[bytes]:
        with (self.folder / f"{log}.log").open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *(str(a) for a in arguments)], cwd=ROOT, stdout=out,
                stdin=subprocess.PIPE if has_input else subprocess.DEVNULL, stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})}, start_new_session=True,
            )  # fmt: skip
        self._processes.append(process)
        return process

    def _wait(self, holds: Callable[[], object], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            ended = [p.args for p in self._processes if p.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise RuntimeError(f"{what}: {ended or 'timed out'}; see {self.folder}/*.log")
            time.sleep(POLL_SECONDS)


def sighting_of(name: str, status: PeerStatus, peer_names: Mapping[str, str]) -> Sighting:
    """What a peer's status says, in the benchmark's words."""
    report, is_at_work = status.report, status.state == AT_WORK[status.role] and status.report is not None
    computed: dict[int, int] = {}
    seen = None
    if report is not None and report.last_epoch is not None:
        computed[report.last_epoch.epoch] = report.last_epoch.num_samples
    if report is not None and report.samples_accumulated:
        computed[report.epoch] = report.samples_accumulated
    if report is not None and (last := report.last_round) is not None and last.outcome == "averaged":
        samples = {peer_names.get(suffix, suffix): weight for suffix, weight in last.weights.items()}
        seen = RoundSeen(key=f"{last.epoch}/{last.digest}", epoch=last.epoch, samples=samples)
    return Sighting(
        name=name, phase=TRAINING if is_at_work else _phase(status), is_at_work=is_at_work,
        boot=report.boot_id if report is not None else "", epoch=report.epoch if report is not None else -1,
        computed=computed, round=seen, norm=report.parameter_norm if report is not None else None,
        last_success=status.last_success_at or 0.0, words=status.doing or status.detail,
    )  # fmt: skip


def _phase(status: PeerStatus) -> str:
    if status.state == "restarting":
        return BACK_OFF
    if status.state == "joining":
        return DOWNLOAD if "state" in status.detail else JOINING
    if status.state == "waiting":
        return WAITING
    return STARTING if status.state in ("starting", "training") else GONE
