"""Do a fault to a swarm: SIGKILL or SIGSTOP to processes that are named by what they are, never by a pattern."""

import contextlib
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import psutil

from benchmarks.fault_kinds import Fault
from calm_ray.peers.vitals import members


@dataclass(frozen=True, kw_only=True)
class Tree:
    """One peer's processes, as far as they live."""

    top: psutil.Process
    """Our watchdog, or the shell with a bare user's `while true`."""
    child: psutil.Process | None = None
    """Who does the work."""
    dht: psutil.Process | None = None
    p2pd: psutil.Process | None = None
    everyone: tuple[psutil.Process, ...] = ()
    """All of them, `top` first."""


class Rig(Protocol):
    """A swarm that can be hurt."""

    def tree(self, name: str) -> Tree | None:
        """None if nobody is there."""

    def worker_pid(self, name: str) -> int | None:
        """The Ray worker that holds the peer's actor."""

    def kill_node(self) -> bool:
        """SIGKILL to the worker node's raylet; False if it is dead already."""

    def mend_node(self) -> None:
        """A new worker node."""


def tree_of(top: psutil.Process, child: psutil.Process | None) -> Tree:
    """Sort out who is who below `child`: p2pd by its name, and hivemind's DHT process is its parent."""
    everyone = [top, *_below(top)]
    p2pd = next((p for p in _below(child) if _name(p) == "p2pd"), None) if child is not None else None
    dht = None
    with contextlib.suppress(psutil.Error):
        dht = p2pd.parent() if p2pd is not None else None
    return Tree(top=top, child=child, p2pd=p2pd, dht=dht, everyone=tuple(everyone))


def _below(process: psutil.Process | None) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True) if process is not None else []
    return []


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return process.name()
    return ""


@dataclass
class Injector:
    """`hurt()` does a fault now, or says that its target is not there yet. `mend()` takes back what was only held."""

    rig: Rig
    stopped: dict[str, list[psutil.Process]] = field(default_factory=dict)

    def hurt(self, fault: Fault) -> bool:
        """False: the target, or that part of it, is not running at this moment; try again."""
        how, name = fault.kind.how, fault.target
        if how == "raylet":
            return self.rig.kill_node()
        if how == "worker":
            pid = self.rig.worker_pid(name)
            return pid is not None and _kill(pid)
        tree = self.rig.tree(name)
        if tree is None or name in self.stopped:
            return False
        if how == "whole":
            return _signal_all(tree.everyone, signal.SIGKILL)
        if how == "watchdog":
            return _signal(tree.top, signal.SIGKILL)
        if how == "stop":
            return tree.child is not None and tree.p2pd is not None and self._stop(name, tree.child)
        target = {"child": tree.child, "p2pd": tree.p2pd, "dht": tree.dht}[how]
        return target is not None and tree.p2pd is not None and _signal(target, signal.SIGKILL)

    def mend(self, fault: Fault) -> None:
        """After `held_seconds`."""
        if fault.kind.how == "raylet":
            self.rig.mend_node()
        for process in self.stopped.pop(fault.target, []):
            _signal(process, signal.SIGCONT)

    def mend_all(self) -> None:
        for processes in self.stopped.values():
            for process in processes:
                _signal(process, signal.SIGCONT)
        self.stopped.clear()

    def _stop(self, name: str, child: psutil.Process) -> bool:
        """The child and all that it forked; a watchdog goes on, as it would beside a process that hangs."""
        session = [p for p in members(os.getsid(child.pid)) if p.pid == child.pid or child in _parents(p)]
        self.stopped[name] = session
        return _signal_all(session, signal.SIGSTOP)


def _parents(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.parents()
    return []


def _signal(process: psutil.Process, number: signal.Signals) -> bool:
    try:
        process.send_signal(number)  # psutil looks whether the id is still that process
    except psutil.Error:
        return False
    return True


def _signal_all(processes: Iterable[psutil.Process], number: signal.Signals) -> bool:
    """To each of them, whatever became of those before; True if any was there."""
    return any([_signal(process, number) for process in processes])  # noqa: C419  a generator would stop at the first


def _kill(pid: int) -> bool:
    try:
        return _signal(psutil.Process(pid), signal.SIGKILL)
    except psutil.Error:
        return False
