"""The swarm to compare with: three bare `hivemind.Optimizer` trainers, each in the `while true` loop of its user.

The first one is the bootstrap peer, on a port and with an identity that it keeps; there are no auxiliary peers, no
monitor, no watchdog and no Ray. A fault that hits what is not there does not happen.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import psutil

from benchmarks.fault_account import GONE, STARTING, TRAINING
from benchmarks.fault_inject import Tree, tree_of
from benchmarks.fault_kinds import TRAINERS
from benchmarks.fault_watch import RoundSeen, Sighting, Watch
from benchmarks.swarm_spec import JournalReader
from tests.shards import ROOT

LOOP = 'while true; do "$@"; echo "ended with $?, again in 1 s"; sleep 1; done'
START_SECONDS = 180.0
MIN_WITNESSES = 2


class BareRig:
    """`start()`, then `watch` knows all; `end()` leaves nothing."""

    names = TRAINERS

    def __init__(
        self, bundle: Path, *, folder: Path, target_batch_size: int, micro_batch_size: int, duty_cycle: float
    ) -> None:
        self._folder, self._bundle = folder, bundle
        self._training = {
            "target_batch_size": target_batch_size, "micro_batch_size": micro_batch_size, "duty_cycle": duty_cycle
        }  # fmt: skip
        self.watch = Watch(self._look, is_true=lambda num_members: num_members >= MIN_WITNESSES)
        self._readers: dict[str, JournalReader] = {}
        self._loops: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Blocks until all three train."""
        listen = f"/ip4/127.0.0.1/tcp/{_free_port()}"
        addresses: list[str] = []
        for index, name in enumerate(TRAINERS):
            self._start_loop(name, index=index, listen=listen if not index else "/ip4/127.0.0.1/tcp/0", peers=addresses)
            if not index:
                addresses = self._first_addresses(name)
        self.watch.start()
        deadline = time.monotonic() + START_SECONDS
        while not self.watch.at_work(TRAINERS):
            if time.monotonic() > deadline:
                raise RuntimeError(f"bare trainers did not come up, see {self._folder}/*/log")
            time.sleep(0.2)

    def _start_loop(self, name: str, *, index: int, listen: str, peers: list[str]) -> None:
        folder = self._folder / name
        folder.mkdir(parents=True)
        spec = {
            "name": name, "folder": str(folder), "bundle": str(self._bundle), "initial_peers": peers, "listen": listen,
            "identity": str(folder / "identity.key") if not index else "", "seed": index, **self._training,
        }  # fmt: skip
        (folder / "spec.json").write_text(json.dumps(spec))
        argv = [sys.executable, "-W", "ignore", "-m", "benchmarks.fault_bare", str(folder / "spec.json")]
        with (folder / "log").open("wb") as log:
            self._loops[name] = subprocess.Popen(
                ["bash", "-c", LOOP, "loop", *argv], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )  # fmt: skip
        self._readers[name] = JournalReader(folder / "journal.jsonl")

    def _first_addresses(self, name: str) -> list[str]:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            for event in self._readers[name].read():
                if event["event"] == "ready":
                    return list(event["addresses"])
            time.sleep(0.1)
        raise RuntimeError(f"{name} did not come up, see {self._folder}/{name}/log")

    def end(self) -> list[str]:
        """SIGKILL: bare trainers know no polite way that ends within ten seconds."""
        self.watch.stop()
        trees = [tree for name in TRAINERS if (tree := self.tree(name)) is not None]
        for loop in self._loops.values():
            loop.kill()  # first, or it would start the next one
            loop.wait()
        everyone = [process for tree in trees for process in tree.everyone]
        for process in everyone:
            with contextlib.suppress(psutil.Error):
                process.kill()
        _, alive = psutil.wait_procs(everyone, timeout=10)
        return [f"process {p.pid}" for p in alive]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.end()

    # --- for the injector --------------------------------------------------------------------------------------------

    def tree(self, name: str) -> Tree | None:
        """Without its loop: what a watchdog's death is to ours is the death of the trainer here."""
        with contextlib.suppress(KeyError, psutil.Error):
            children = psutil.Process(self._loops[name].pid).children()
            child = next((p for p in children if "benchmarks.fault_bare" in p.cmdline()), None)
            return tree_of(child, child) if child is not None else None
        return None

    def worker_pid(self, name: str) -> int | None:
        """There is no Ray; what it costs ours is a trainer that starts again, so that is what it is here."""
        tree = self.tree(name)
        return tree.child.pid if tree is not None and tree.child is not None else None

    def kill_node(self) -> bool:
        """A node with one trainer on it."""
        tree = self.tree(TRAINERS[2])
        if tree is None:
            return False
        for process in tree.everyone:
            with contextlib.suppress(psutil.Error):
                process.kill()
        return True

    def mend_node(self) -> None:
        """Its user's loop has started it already."""

    def _look(self) -> list[Sighting]:
        return [self._sighting(name) for name in TRAINERS]

    def _sighting(self, name: str) -> Sighting:
        events = self._readers[name].read()
        life = next((e for e in reversed(events) if e["event"] == "life"), None)
        if life is None or not psutil.pid_exists(life["pid"]):
            return Sighting(name=name, phase=GONE, is_at_work=False)
        mine = [e for e in reversed(events[-50:]) if e.get("boot") == life["boot"]]
        count = next((e for e in mine if e["event"] == "count"), None)
        told = next((e for e in mine if e["event"] == "bare_round" and "group" in e), None)
        seen = None
        if told is not None and told["received"] >= 1.0 and not told["num_banned"] and told["weight"]:
            seen = RoundSeen(key=told["group"], epoch=told["epoch"], samples={name: told["weight"]})
        return Sighting(
            name=name, phase=TRAINING if count is not None else STARTING, is_at_work=count is not None,
            boot=life["boot"], epoch=count["epoch"] if count is not None else -1, round=seen,
            computed={int(e): n for e, n in count["computed"].items()} if count is not None else {},
            norm=count["norm"] if count is not None else None,
        )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
