"""How a process ended, in words, and what its folder keeps."""

import errno
import os
from pathlib import Path

import pytest

from calm_ray.errors import ConfigError, StateUnavailable, SwarmUnreachable
from calm_ray.peers.endings import (
    NUM_LAST_LINES,
    PARKED_LOG,
    Ending,
    cause_of,
    disk_error,
    disk_words,
    ending_of,
    forget,
    keep_last_lines,
    last_status,
    remember,
)
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus


@pytest.mark.parametrize(
    ("code", "error", "expected"),
    [
        (0, "", Ending(exit_code=0, cause=None)),
        (1, "RuntimeError: x", Ending(exit_code=1, cause="crashed", why="RuntimeError: x")),
        (1, "", Ending(exit_code=1, cause="crashed", why="ended with code 1")),
        (ConfigError.exit_code, "edit it", Ending(exit_code=2, cause="mistake", why="edit it")),
        (SwarmUnreachable.exit_code, "nobody", Ending(exit_code=3, cause="unreachable", why="nobody")),
        (StateUnavailable.exit_code, "none", Ending(exit_code=4, cause="no-state", why="none")),
        (-11, "", Ending(exit_code=139, cause="killed", why="killed by SIGSEGV")),
        (-9, "said before", Ending(exit_code=137, cause="killed", why="killed by SIGKILL")),
        (-60, "", Ending(exit_code=188, cause="killed", why="killed by signal 60")),
    ],
)
def test_ending_has_a_cause_and_words(code: int, error: str, expected: Ending) -> None:
    assert ending_of(code, error=error, verdict=None, num_oom_kills=0) == expected


def test_memory_that_ran_out_is_told_with_its_remedy() -> None:
    ending = ending_of(-9, error="", verdict=None, num_oom_kills=1)
    assert ending.cause == "killed"
    assert "ran out of memory (close other programs, or lower [peer] micro_batch_size)" in ending.why
    assert "memory" not in ending_of(-11, error="", verdict=None, num_oom_kills=1).why


def test_verdict_of_the_watchdog_is_the_cause_however_the_child_went() -> None:
    for code in (0, -9, 1):
        ending = ending_of(code, error="x", verdict=("stalled", "no progress"), num_oom_kills=0)
        assert ending == Ending(exit_code=1, cause="stalled", why="no progress")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full; delete what you no longer need, or choose another --folder"),
        (errno.EROFS, "the disk is read-only; mount it writable, or choose another --folder"),
        (errno.EACCES, r"Permission denied (/x); choose another --folder, which you own"),
    ],
)
def test_disk_errors_are_told_with_what_to_do(number: int, words: str) -> None:
    assert words in disk_words(OSError(number, os.strerror(number), "/x"))


def test_disk_that_can_be_mended_is_waited_out_and_a_wrong_folder_is_a_mistake() -> None:
    errors = [
        disk_error(OSError(n, os.strerror(n)), where=Path("/x")) for n in (errno.EDQUOT, errno.EROFS, errno.EPERM)
    ]
    assert [cause_of(error.exit_code) for error in errors] == ["disk", "disk", "mistake"]
    assert str(errors[0]).startswith("/x: your quota is used up; ")
    assert cause_of(1) == "crashed"


def test_last_status_is_there_until_the_next_peer_begins(tmp_path: Path) -> None:
    assert last_status(tmp_path) is None
    status = PeerStatus(role="trainer", state="parked", error="why", exit_code=1, pid=5)
    remember(tmp_path, status)
    assert last_status(tmp_path) == status
    forget(tmp_path)
    assert last_status(tmp_path) is None
    (tmp_path / "status.json").write_text("{")
    assert last_status(tmp_path) is None


def test_last_lines_of_the_log_are_kept_across_its_rotation(tmp_path: Path) -> None:
    spec = PeerSpec(role="trainer", folder=tmp_path, invite="calm1-x")
    (tmp_path / "peer.log.1").write_text("".join(f"line {n}\n" for n in range(100)))
    spec.log_path.write_text("line 100\nline 101\n")
    keep_last_lines(spec)
    lines = (tmp_path / PARKED_LOG).read_text().splitlines()
    assert lines == [f"line {n}" for n in range(102 - NUM_LAST_LINES, 102)]
