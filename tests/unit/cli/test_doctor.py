"""What the doctor makes of a machine: facts in, a verdict with its remedy out. Real machines are in test_doctor.py of
tests/integration.
"""

import errno
import fcntl
import os
import re
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest

from calm_ray.cli.doctor import render
from calm_ray.peers import doctor, doctor_look
from calm_ray.peers.doctor import Examination, Subject
from calm_ray.peers.doctor_checks import GB, Check, from_error, overall, printable, size, summary, worst
from calm_ray.peers.doctor_helper import Findings, Task
from calm_ray.peers.doctor_look import look_at_folder, look_at_memory, look_at_space
from calm_ray.peers.doctor_machine import (
    PACKAGES,
    PYTHONS,
    MemoryFacts,
    SpaceFacts,
    SystemFacts,
    judge_memory,
    judge_open_files,
    judge_packages,
    judge_python,
    judge_space,
    judge_system,
)
from calm_ray.peers.doctor_peer import DeviceFacts, FolderFacts, ended_by, judge_device, judge_identity, judge_port
from tests.shards import ROOT


def check(verdict: Any = "ok", **values: str) -> Check:
    return Check(**{"name": "disk", "verdict": verdict, "found": "found", **values})


# --- the limits are the project's ------------------------------------------------------------------------------------


def test_what_is_wanted_is_what_the_project_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    first, last = PYTHONS
    assert project["requires-python"] == f">={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}"
    for name, (lowest, too_new) in PACKAGES.items():
        (wanted,) = (line for line in project["dependencies"] if re.match(rf"{name}\b", line))
        upper = f",<{'.'.join(map(str, too_new))}" if too_new != (99,) else ""
        assert wanted == f"{name}>={'.'.join(map(str, lowest))}{upper}"


# --- the machine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "machine", "kernel", "verdict", "words"),
    [
        ("linux", "x86_64", "6.8.0-45-generic", "ok", "Linux on x86_64"),
        ("linux", "aarch64", "6.8.0", "ok", "Linux on aarch64"),
        ("linux", "x86_64", "5.15.153.1-microsoft-standard-WSL2", "ok", "in WSL 2"),
        ("linux", "x86_64", "4.4.0-19041-Microsoft", "fail", "wsl --set-version NAME 2"),
        ("linux", "armv7l", "6.1", "fail", "no build"),
        ("darwin", "arm64", "24.1.0", "ok", "macOS on arm64"),
        ("darwin", "x86_64", "24.1.0", "fail", "arm64 build of Python"),
        ("win32", "AMD64", "10", "fail", "use WSL 2: run `wsl --install` in PowerShell"),
        ("freebsd14", "amd64", "14", "fail", "no build"),
    ],
)
def test_system_is_one_that_hivemind_runs_on(
    platform: str, machine: str, kernel: str, verdict: str, words: str
) -> None:
    judged = judge_system(SystemFacts(platform=platform, machine=machine, kernel=kernel))
    assert judged.verdict == verdict
    assert words in f"{judged.found} {judged.remedy}"


@pytest.mark.parametrize(
    ("version", "verdict"),
    [((3, 10, 14), "fail"), ((3, 11, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "fail"), ((4, 0, 0), "fail")],
)
def test_python_is_one_that_we_support(version: tuple[int, int, int], verdict: str) -> None:
    assert judge_python(version).verdict == verdict


@pytest.mark.parametrize(
    ("torch", "hivemind", "verdict"),
    [
        ("2.13.0+cpu", "1.1.12", "ok"),
        ("2.5", "1.1.13", "ok"),
        ("2.4.1", "1.1.12", "fail"),
        ("2.13.0", "1.1.11", "fail"),
        ("2.13.0", "1.2.0", "fail"),
        (None, "1.1.12", "fail"),
        ("2.13.0.dev20260101", "1.1.12", "ok"),
    ],
)
def test_packages_are_there_and_fit(torch: str | None, hivemind: str, verdict: str) -> None:
    judged = judge_packages({"torch": torch, "hivemind": hivemind}, own="0.1.0")
    assert judged.verdict == verdict
    assert judged.found.startswith("calm-ray 0.1.0, torch ")
    assert ("pip line" in judged.remedy) is (verdict == "fail")


@pytest.mark.parametrize(("free_gb", "verdict"), [(0.9, "fail"), (2.0, "warn"), (8.0, "ok")])
@pytest.mark.parametrize("is_container", [False, True])
def test_memory_below_the_floor_fails(free_gb: float, verdict: str, is_container: bool) -> None:
    facts = MemoryFacts(total_bytes=16 * GB, available_bytes=int(free_gb * GB), is_container=is_container)
    judged = judge_memory(facts)
    assert judged.verdict == verdict
    assert f"{size(free_gb * GB)} free of " in judged.found
    assert ("docker run --memory" in judged.remedy) is (is_container and verdict != "ok")


@pytest.mark.parametrize(
    ("code", "words", "cure"),
    [
        (errno.ENOSPC, "the disk is full", "delete what you no longer need or choose another --folder"),
        (errno.EDQUOT, "your quota is used up", "delete what you no longer need or choose another --folder"),
        (errno.EROFS, "the disk is read-only", "mount it writable or choose another --folder"),
        (errno.EACCES, "you may not write there", "make it yours (chown) or choose another --folder"),
        (errno.EIO, "Input/output error", "choose another --folder"),
    ],
)
def test_folder_that_cannot_be_written_says_why_and_what_to_do(code: int, words: str, cure: str) -> None:
    facts = SpaceFacts(path="/data", error_code=code, problem=os.strerror(code))
    judged = judge_space(facts, name="folder", elsewhere="choose another --folder")
    assert (judged.verdict, judged.found, judged.remedy) == ("fail", f"/data: {words}", cure)


@pytest.mark.parametrize(("free_gb", "verdict"), [(0.1, "fail"), (1.0, "warn"), (50.0, "ok")])
def test_disk_that_is_nearly_full_is_told(free_gb: float, verdict: str) -> None:
    facts = SpaceFacts(path="/data", free_bytes=int(free_gb * GB))
    assert judge_space(facts, name="folder", elsewhere="choose another --folder").verdict == verdict


@pytest.mark.parametrize(
    ("limit", "verdict"), [(None, "ok"), (1048576, "ok"), (16384, "ok"), (4096, "warn"), (1000, "fail")]
)
def test_open_files_are_judged_by_the_hard_limit(limit: int | None, verdict: str) -> None:
    judged = judge_open_files(limit)
    assert judged.verdict == verdict
    assert ("ulimit -n 16384" in judged.remedy) is (verdict != "ok")


# --- what a peer would have ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "wanted", "verdict", "words"),
    [
        (DeviceFacts(num_threads=2), "auto", "warn", "no GPU, only the CPU, 2 threads: slow, but counts"),
        (DeviceFacts(num_threads=1), "cpu", "ok", "the CPU, 1 thread, as [peer] device says"),
        (DeviceFacts(has_nvidia_driver=True), "auto", "warn", "install a build of torch with CUDA"),
        (DeviceFacts(kind="mps", precision="fp32"), "auto", "ok", "the Apple chip's GPU, fp32"),
        (
            DeviceFacts(
                kind="cuda", title="NVIDIA RTX 3060", total_bytes=12 * GB, free_bytes=11 * GB, precision="bf16"
            ),
            "auto", "ok", "NVIDIA RTX 3060, 11.0 GB free of 12.0 GB, bf16",
        ),
        (DeviceFacts(kind="cuda", title="T4", total_bytes=15 * GB, free_bytes=GB // 2), "auto", "warn", "nvidia-smi"),
        (DeviceFacts(problem="peer.device: is not there; check the driver"), "cuda", "fail", "check the driver"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_device_is_named_with_what_it_can_do(facts: DeviceFacts, wanted: str, verdict: str, words: str) -> None:
    judged = judge_device(facts, wanted=wanted)
    assert judged.verdict == verdict
    assert words in f"{judged.found} {judged.remedy}"


@pytest.mark.parametrize(
    ("facts", "damage", "verdict", "words"),
    [
        (FolderFacts(), "", "ok", "none yet"),
        (FolderFacts(has_identity=True), "", "ok", "no peer uses it now"),
        (FolderFacts(holder="12", state="training"), "", "fail", "already runs in this folder (process 12, training)"),
        (FolderFacts(holder="unknown"), "", "fail", "(process unknown)"),
        (FolderFacts(has_identity=True), "id: damaged; delete it, and a new one is made", "fail", "delete it"),
        (FolderFacts(problem="/x/identity.key: Permission denied"), "", "fail", "chown"),
    ],
)
def test_identity_is_free_and_readable(facts: FolderFacts, damage: str, verdict: str, words: str) -> None:
    judged = judge_identity(facts, damage=damage)
    assert judged.verdict == verdict
    assert words in f"{judged.found} {judged.remedy}"


def test_port_is_told_with_where() -> None:
    assert judge_port("/ip4/0.0.0.0/tcp/4001").found == "4001 is free, at every IPv4 address of this machine"
    assert judge_port("/ip4/10.0.0.2/tcp/0").found == "any free one, at 10.0.0.2"


def test_signal_that_ended_the_helper_is_explained() -> None:
    assert "SIGILL: this build is for a newer processor" in ended_by(-4)
    assert "SIGKILL, perhaps for want of memory" in ended_by(-9)
    assert ended_by(1).endswith("code 1")
    assert ended_by(-99).endswith("99")


# --- looking ---------------------------------------------------------------------------------------------------------


def test_memory_of_a_container_is_its_limit_less_what_it_uses(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/user.slice/box"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/user.slice/box\n")
    (group / "memory.max").write_text("max\n")  # the limit is on the group above
    for name, text in {"max": "1000000", "current": "900000", "stat": "anon 1\ninactive_file 300000\n"}.items():
        (group.parent / f"memory.{name}").write_text(text)
    assert look_at_memory(tmp_path) == MemoryFacts(total_bytes=1000000, available_bytes=400000, is_container=True)


def test_memory_of_a_container_of_the_older_kind_is_read_where_it_is_mounted(tmp_path: Path) -> None:
    """Docker with version 1: the path in /proc is the host's, and the limit lies at the top."""
    top = tmp_path / "sys/fs/cgroup/memory"
    top.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("12:cpu:/docker/ab\n5:memory:/docker/ab\n")
    (top / "memory.limit_in_bytes").write_text("2000000\n")
    (top / "memory.usage_in_bytes").write_text("500000\n")
    (top / "memory.stat").write_text("total_inactive_file 100000\n")
    assert look_at_memory(tmp_path).available_bytes == 1600000


def test_memory_without_a_limit_is_the_machines(tmp_path: Path) -> None:
    facts = look_at_memory(tmp_path)
    assert not facts.is_container
    assert facts.total_bytes > facts.available_bytes > 0


def test_trial_of_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    facts = look_at_space(tmp_path / "a" / "b")
    assert facts.problem == ""
    assert facts.free_bytes > 0
    assert list(tmp_path.iterdir()) == []


def test_trial_below_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert look_at_space(tmp_path / "file" / "below").problem == "Not a directory"


def test_lock_is_looked_at_and_left_to_its_holder(tmp_path: Path) -> None:
    assert look_at_folder(tmp_path) == FolderFacts()
    (tmp_path / "identity.key").write_bytes(b"key")
    with (tmp_path / "lock").open("w") as lock:
        lock.write("4711")
        lock.flush()
        assert look_at_folder(tmp_path) == FolderFacts(has_identity=True), "a lock file alone is nobody's"
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert look_at_folder(tmp_path) == FolderFacts(holder="4711", has_identity=True)


@pytest.mark.parametrize("trouble", ["hangs", "crashes"])
def test_look_that_hangs_or_crashes_is_one_failed_check_and_the_others_are_made(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def look_at_memory() -> MemoryFacts:
        if trouble == "crashes":
            raise RuntimeError("psutil: \x1b[2J?")
        over.wait(60)
        return MemoryFacts(total_bytes=1, available_bytes=1)

    def run_helper(task: Task, *, on_doing: Any) -> Findings:
        return Findings(ended="it took over 47 s")

    monkeypatch.setattr(doctor_look, "look_at_memory", look_at_memory)
    monkeypatch.setattr(doctor, "run_helper", run_helper)
    monkeypatch.setattr(doctor, "LOOK_SECONDS", 0.5)
    told: list[Check] = []
    checks = Examination(Subject(folder=tmp_path), on_check=told.append).run()
    over.set()
    assert list(checks) == told
    by_name = {check.name: check for check in checks}
    words = "it took over 0 s" if trouble == "hangs" else "RuntimeError: psutil"
    assert by_name["memory"].verdict == "fail"
    assert words in by_name["memory"].found
    assert by_name["packages"].verdict == by_name["port"].verdict == "ok"
    assert "could not be checked: it took over 47 s" in by_name["device"].found


def test_windows_is_told_and_nothing_else_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = SystemFacts(platform="win32", machine="AMD64", kernel="10")
    monkeypatch.setattr(doctor_look, "look_at_system", lambda: windows)
    (only,) = Examination(Subject(folder=tmp_path), on_check=lambda check: None).run()
    assert (only.name, only.verdict) == ("system", "fail")


# --- telling ---------------------------------------------------------------------------------------------------------


def test_summary_counts_what_has_to_be_mended() -> None:
    fine, warning, failure = check(), check("warn"), check("fail")
    assert summary([fine], has_invite=True) == "ready to join"
    assert summary([fine, warning], has_invite=True) == "ready to join, with 1 warning"
    assert summary([failure, warning], has_invite=True) == "1 thing to mend first"
    assert summary([failure, failure], has_invite=False) == "2 things to mend first"
    assert summary([warning, warning], has_invite=False) == (
        "this machine is ready, with 2 warnings; next: calm-ray doctor INVITE"
    )
    assert [overall(checks) for checks in ([], [fine], [fine, warning], [failure, warning])] == [
        "ok", "ok", "warn", "fail",
    ]  # fmt: skip
    assert worst([fine, failure, warning]) == failure


def test_line_is_aligned_with_the_remedy_beneath_it() -> None:
    text = render(check("warn", found="a b " * 20, remedy="c d " * 20), width=80).plain
    first, *others = text.splitlines()
    assert first.startswith("warn  disk          a b a b")
    assert [len(line) - len(line.lstrip()) for line in others] == [20, 20, 23]
    assert others[1].strip().startswith("-> c d")
    assert max(map(len, text.splitlines())) <= 80


def test_command_to_copy_is_not_broken() -> None:
    command = "pip install " + "x" * 200
    assert render(check("fail", remedy=f"run: {command}"), width=80).plain.endswith(f"-> run:\n{command}")


def test_stranger_cannot_move_the_cursor() -> None:
    assert printable("a\x1b[2Jb\r\n\u202ec") == "a?[2Jb???c"
    assert "\x1b" not in render(check("fail", found="\x1b[2J"), width=80).plain


def test_error_of_ours_becomes_what_was_found_and_what_to_do() -> None:
    judged = from_error("port", ValueError("port 1: taken; choose another; 0 stands for any"))
    assert (judged.found, judged.remedy) == ("port 1: taken", "choose another; 0 stands for any")
    assert from_error("x", ValueError("bad"), remedy="mend it").remedy == "mend it"
