"""The doctor's judgement of this machine. Pure: facts in, a check out. `doctor_look.py` gathers the facts.

The limits are where joining fails or a peer dies soon, not what would be nice: a volunteer who is refused without need
does not come back.
"""

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from calm_ray.peers.doctor_checks import GB, REINSTALL, Check, size
from calm_ray.peers.endings import DISK_TROUBLE
from calm_ray.peers.spec import NUM_FILES

PYTHONS = ((3, 11), (3, 13))
"""First and last version that pyproject.toml allows."""
PACKAGES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "torch": ((2, 5), (99,)),
    "hivemind": ((1, 1, 12), (1, 2)),
}
"""Package -> (lowest version, first version that is too new), as in pyproject.toml."""
MACHINES = {"linux": ("x86_64", "amd64", "aarch64", "arm64"), "darwin": ("arm64",)}
"""What hivemind has builds for."""
LEAST_NUM_FILES = 1024
LEAST_MEMORY_BYTES, LITTLE_MEMORY_BYTES = int(1.5 * GB), 4 * GB
"""torch, hivemind and a tiny model fit into the first; a run's model into the second."""
LEAST_DISK_BYTES, LITTLE_DISK_BYTES = GB // 4, 2 * GB
"""Identity, log and a small run bundle; a large bundle, and text that is streamed from the Hub."""
LEAST_TEMPORARY_BYTES = GB // 64
"""Sockets, and little else."""

WSL = "use WSL 2: run `wsl --install` in PowerShell as administrator, open Ubuntu, and install calm-ray there"


@dataclass(frozen=True, kw_only=True)
class SystemFacts:
    platform: str
    """`sys.platform`"""
    machine: str
    kernel: str
    """Its release, by which WSL is told."""

    @property
    def is_wsl(self) -> bool:
        return "microsoft" in self.kernel.lower()


@dataclass(frozen=True, kw_only=True)
class MemoryFacts:
    total_bytes: int
    available_bytes: int
    is_container: bool = False
    """The numbers are those of a control group, which has less than the machine."""


@dataclass(frozen=True, kw_only=True)
class SpaceFacts:
    """Of a folder that a peer writes to."""

    path: str
    free_bytes: int = 0
    error_code: int = 0
    """`errno` of a write that failed; 0 if it went well."""
    problem: str = ""


def judge_system(facts: SystemFacts) -> Check:
    found = f"{facts.platform} on {facts.machine}"
    if facts.platform in ("win32", "cygwin", "msys"):
        return Check(name="system", verdict="fail", found="Windows, for which hivemind has no build", remedy=WSL)
    if facts.is_wsl and "Microsoft" in facts.kernel:  # WSL 2 writes it small
        remedy = "in PowerShell, find this one's name by `wsl -l -v`, then run `wsl --set-version NAME 2`"
        return Check(name="system", verdict="fail", found="WSL 1, whose network is not Linux's", remedy=remedy)
    if facts.machine.lower() not in MACHINES.get(facts.platform, ()):
        remedy = "use Linux (x86-64 or arm64), WSL 2, or a Mac with an Apple chip and an arm64 build of Python"
        return Check(name="system", verdict="fail", found=f"{found}, for which hivemind has no build", remedy=remedy)
    title = "macOS" if facts.platform == "darwin" else "Linux"
    return Check(name="system", verdict="ok", found=f"{title} on {facts.machine}{', in WSL 2' if facts.is_wsl else ''}")


def judge_python(version: tuple[int, int, int]) -> Check:
    first, last = PYTHONS
    found = ".".join(map(str, version))
    if first <= version[:2] <= last:
        return Check(name="python", verdict="ok", found=found)
    span = f"{first[0]}.{first[1]} to {last[0]}.{last[1]}"
    remedy = f"install Python {span}, make a new environment with it, and run the organiser's pip line there"
    return Check(name="python", verdict="fail", found=f"{found}, and calm-ray needs {span}", remedy=remedy)


def judge_packages(versions: Mapping[str, str | None], *, own: str) -> Check:
    """`versions` of what PACKAGES names; None is not installed."""
    found = ", ".join([f"calm-ray {own}", *(f"{name} {versions[name] or 'missing'}" for name in PACKAGES)])
    for name, (lowest, too_new) in PACKAGES.items():
        version = versions[name]
        if version is None or not lowest <= _numbers(version) < too_new:
            wanted = ".".join(map(str, lowest))
            return Check(
                name="packages", verdict="fail", found=f"{found}; {name} {wanted} or a little newer is needed",
                remedy=REINSTALL,
            )  # fmt: skip
    return Check(name="packages", verdict="ok", found=found)


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0)"""
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def judge_memory(facts: MemoryFacts) -> Check:
    owner = "the container's " if facts.is_container else ""
    found = f"{size(facts.available_bytes)} free of {owner}{size(facts.total_bytes)}"
    more = "give the container more (docker run --memory 8g)" if facts.is_container else "close other programs"
    if facts.available_bytes < LEAST_MEMORY_BYTES:
        return Check(
            name="memory", verdict="fail", found=f"{found}; a peer needs {size(LEAST_MEMORY_BYTES)} to start",
            remedy=f"{more}, or use a machine with more memory",
        )  # fmt: skip
    if facts.available_bytes < LITTLE_MEMORY_BYTES:
        return Check(
            name="memory", verdict="warn", found=f"{found}, which a large model may not fit into",
            remedy=f"{more}; if the peer is killed while it trains, set micro_batch_size = 1 in a [peer] table",
        )  # fmt: skip
    return Check(name="memory", verdict="ok", found=found)


def judge_space(
    facts: SpaceFacts, *, name: str, elsewhere: str, least_bytes: int = LEAST_DISK_BYTES,
    little_bytes: int = LITTLE_DISK_BYTES,
) -> Check:  # fmt: skip
    """`elsewhere` tells how to use another folder, such as "choose another --folder"."""
    cures = {
        **DISK_TROUBLE,
        errno.EACCES: ("you may not write there", "make it yours (chown)"),
        errno.EPERM: ("you may not write there", "make it yours (chown)"),
    }
    if facts.problem:
        what, cure = cures.get(facts.error_code, (facts.problem, ""))
        remedy = " or ".join(part for part in (cure, elsewhere) if part)
        return Check(name=name, verdict="fail", found=f"{facts.path}: {what}", remedy=remedy)
    found = f"{facts.path}: writable, {size(facts.free_bytes)} free"
    cure = f"delete what you no longer need or {elsewhere}"
    if facts.free_bytes < least_bytes:
        return Check(name=name, verdict="fail", found=f"{found}, and {size(least_bytes)} are needed", remedy=cure)
    if facts.free_bytes < little_bytes:
        return Check(name=name, verdict="warn", found=f"{found}, which a large run may fill", remedy=cure)
    return Check(name=name, verdict="ok", found=found)


def judge_open_files(hard_limit: int | None) -> Check:
    """`hard_limit` None is unlimited."""
    if hard_limit is None or hard_limit >= NUM_FILES:
        return Check(name="open files", verdict="ok", found=f"a peer may open {NUM_FILES}")
    verdict: Literal["warn", "fail"] = "fail" if hard_limit < LEAST_NUM_FILES else "warn"
    return Check(
        name="open files", verdict=verdict,
        found=f"a peer may open {hard_limit}, and in a large swarm it needs up to {NUM_FILES}",
        remedy=f"as root, run `ulimit -n {NUM_FILES}` before you join (Docker: --ulimit nofile={NUM_FILES})",
    )  # fmt: skip
