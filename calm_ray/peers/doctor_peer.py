"""The doctor's judgement of what a peer would have here: its folder, its port, its device, its network. Pure."""

import signal
from dataclasses import dataclass
from typing import Literal

from calm_ray.peers.doctor_checks import GB, REINSTALL, Check, crashed, size
from calm_ray.tables import Table

LITTLE_GPU_BYTES = GB


@dataclass(frozen=True, kw_only=True)
class FolderFacts:
    """Who has the peer's folder."""

    holder: str = ""
    """Process id of the peer that runs in it; "unknown" if it did not say; empty if none does."""
    state: str = ""
    """What that peer says it is doing."""
    has_identity: bool = False
    problem: str = ""
    """Lock or identity cannot be read."""


class DeviceFacts(Table):
    """What `[peer]` would train on."""

    kind: Literal["cpu", "cuda", "mps"] = "cpu"
    title: str = ""
    """The GPU's own name."""
    total_bytes: int = 0
    free_bytes: int = 0
    precision: str = ""
    num_threads: int = 0
    has_nvidia_driver: bool = False
    problem: str = ""
    """It cannot be used, as [peer] wants it or at all."""


def judge_identity(facts: FolderFacts, *, damage: str) -> Check:
    """`damage` is what loading the identity said, if there is one."""
    if facts.holder:
        who = f"process {facts.holder}, {facts.state}" if facts.state else f"process {facts.holder}"
        return Check(
            name="identity", verdict="fail", found=f"a peer already runs in this folder ({who})",
            remedy="nothing to do if it is yours: you have joined; for a second peer, choose another --folder",
        )  # fmt: skip
    if problem := facts.problem or damage:
        found, _, told = problem.partition("; ")
        remedy = told or "make the folder and what is in it yours (chown), or choose another --folder"
        return Check(name="identity", verdict="fail", found=found, remedy=remedy)
    found = "there is one, and no peer uses it now" if facts.has_identity else "none yet; joining makes one"
    return Check(name="identity", verdict="ok", found=found)


def judge_port(listen: str) -> Check:
    """`listen` is free."""
    _, _, host, _, port, *_ = [*listen.split("/"), "", "", "", ""]
    found = f"{port} is free" if port != "0" else "any free one"
    where = {"0.0.0.0": "every IPv4 address of this machine", "127.0.0.1": "this machine alone"}
    return Check(name="port", verdict="ok", found=f"{found}, at {where.get(host, host)}")


def judge_device(facts: DeviceFacts, *, wanted: str) -> Check:
    """`wanted` is `[peer] device`."""
    if facts.problem:
        found, _, told = facts.problem.partition("; ")
        remedy = told or 'check the driver (nvidia-smi), or set device = "cpu" in a [peer] table'
        return Check(name="device", verdict="fail", found=found, remedy=remedy)
    if facts.kind == "mps":
        return Check(name="device", verdict="ok", found=f"the Apple chip's GPU, {facts.precision}")
    if facts.kind == "cuda":
        found = f"{facts.title}, {size(facts.free_bytes)} free of {size(facts.total_bytes)}, {facts.precision}"
        if facts.free_bytes < LITTLE_GPU_BYTES:
            remedy = "close what else uses the GPU; nvidia-smi lists it"
            return Check(name="device", verdict="warn", found=found, remedy=remedy)
        return Check(name="device", verdict="ok", found=found)
    found = f"the CPU, {facts.num_threads} {'thread' if facts.num_threads == 1 else 'threads'}"
    if wanted == "cpu":
        return Check(name="device", verdict="ok", found=f"{found}, as [peer] device says")
    if facts.has_nvidia_driver:
        remedy = "there is an NVIDIA driver, but this torch does not use it: install a build of torch with CUDA"
    else:
        remedy = "nothing to mend; if you have a machine with a GPU, it will do more"
    return Check(name="device", verdict="warn", found=f"no GPU, only {found}: slow, but counts", remedy=remedy)


def judge_networking(problem: str, *, start_seconds: float) -> Check:
    """Whether libp2p's daemon runs here at all."""
    if not problem:
        return Check(name="networking", verdict="ok", found=f"libp2p starts, in {start_seconds:.1f} s")
    found, _, told = problem.partition("; ")
    return Check(name="networking", verdict="fail", found=found, remedy=told or REINSTALL)


def ended_by(exit_code: int) -> str:
    """How a process ended that should have said more."""
    if exit_code < 0:
        try:
            name = signal.Signals(-exit_code).name
        except ValueError:
            name = str(-exit_code)
        hint = {"SIGKILL": ", perhaps for want of memory", "SIGILL": ": this build is for a newer processor"}
        return f"loading torch and hivemind was ended by {name}{hint.get(name, '')}"
    return f"loading torch and hivemind ended with code {exit_code}"


def nothing_said(name: str, why: str) -> Check:
    """A check of the helper process that never came."""
    return crashed(name, why).model_copy(update={"remedy": f"{REINSTALL}; if that changes nothing, tell the organiser"})
