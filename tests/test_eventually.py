"""The helpers that all other tests lean on."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.eventually import Children, eventually


def test_eventually_when_the_predicate_turns_true_returns_its_value() -> None:
    answers = iter([None, 0, "here"])
    assert eventually(lambda: next(answers), 5) == "here"


def test_eventually_when_it_stays_false_says_what_was_awaited_and_seen() -> None:
    with pytest.raises(AssertionError, match=r"not within 0\.05 s: three peers; last seen: \[\]"):
        eventually(list, 0.05, "three peers")


def test_eventually_takes_a_failed_assert_as_not_yet() -> None:
    seen: list[int] = []

    def grown() -> bool:
        seen.append(1)
        assert len(seen) == 3, f"{len(seen)} of 3"
        return True

    assert eventually(grown, 5)
    with pytest.raises(AssertionError, match="last seen: 5 of 3"):
        eventually(grown, 0.01, interval=1)


def test_eventually_when_the_predicate_breaks_does_not_wait() -> None:
    with pytest.raises(ZeroDivisionError):
        eventually(lambda: 1 / 0, 60)


def test_children_leave_no_process_behind_even_a_grandchild_that_ignores_sigterm(tmp_path: Path) -> None:
    grandchild = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    start = f"subprocess.Popen([sys.executable, '-c', {grandchild!r}])"
    parent = f"import subprocess, sys; p = {start}; print(p.pid); p.wait()"
    with Children(tmp_path) as children:
        child = children.start([sys.executable, "-u", "-c", parent])
        child.says("deaf")
        pid = int(child.output().split()[0])
    assert not child.is_running()
    eventually(lambda: not _runs(pid), 10, f"the grandchild {pid} is gone")


def test_a_child_that_ends_without_the_awaited_words_fails_at_once_with_its_output(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        child = children.start([sys.executable, "-c", "print('no luck'); raise SystemExit(3)"])
        with pytest.raises(RuntimeError, match=r"(?s)exit code 3 .*no luck"):
            child.says("ready", timeout=60)
        assert child.wait() == 3
        assert children.stop(child) == 3


def test_a_child_that_stays_is_an_error_that_shows_its_output(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        child = children.start([sys.executable, "-uc", "print('busy'); import time; time.sleep(600)"])
        child.says("busy")
        with pytest.raises(AssertionError, match=r"(?s)still runs after 0\.1 s.*busy"):
            child.wait(0.1)
        assert children.stop(child) == -signal.SIGTERM


def _runs(pid: int) -> bool:
    """Whether `pid` is alive; a zombie that init has yet to reap is not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")
