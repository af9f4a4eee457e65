"""A watchdog that cannot be started is told at once, in words, and with what it means for the next try."""

import errno
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from calm_ray.errors import CalmRayError, ConfigError, DiskTrouble
from calm_ray.peers import handle
from calm_ray.peers.endings import remember
from calm_ray.peers.handle import PeerHandle
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus


def handle_in(folder: Path) -> PeerHandle:
    return PeerHandle(PeerSpec(role="trainer", folder=folder, invite="calm1-x"))


@pytest.fixture(autouse=True)
def sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, DiskTrouble), (errno.EROFS, DiskTrouble), (errno.EACCES, ConfigError)]
)
def test_folder_that_takes_no_file_is_told_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[CalmRayError]
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", Mock(side_effect=OSError(number, os.strerror(number))))
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=AssertionError("nothing may be started")))
    with pytest.raises(kind, match=str(tmp_path / "peer")):
        handle_in(tmp_path / "peer").start()


def test_file_in_the_folders_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "peer").write_text("")
    with pytest.raises(ConfigError, match=r"peer: File exists .*; choose another --folder"):
        handle_in(tmp_path / "peer").start()


def test_machine_without_memory_for_a_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))))
    with pytest.raises(CalmRayError, match="did not start: this machine gives no new process: Cannot allocate memory"):
        handle_in(tmp_path / "peer").start()


def test_output_that_cannot_be_opened_is_told_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "peer" / "watchdog.log").mkdir(parents=True)
    with pytest.raises(CalmRayError, match=r"did not start: \S+watchdog.log: Is a directory$"):
        handle_in(tmp_path / "peer").start()


def test_watchdog_that_died_and_was_not_reaped_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose first process does not collect its children."""
    with subprocess.Popen([sys.executable, "-c", ""]) as zombie:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        monkeypatch.setattr(PeerHandle, "_launch", lambda self: zombie.pid)
        started = time.monotonic()
        with pytest.raises(CalmRayError, match="did not start: it printed nothing"):
            handle_in(tmp_path / "peer").start()
        assert time.monotonic() - started < 5


def test_what_the_watchdog_said_counts_and_what_an_earlier_one_said_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, pid = tmp_path / "peer", 99999999
    folder.mkdir()
    monkeypatch.setattr(handle.PeerHandle, "_launch", lambda self: pid)
    told = PeerStatus(role="trainer", state="left", error="/tmp: the disk is full", exit_code=7, pid=pid)
    remember(folder, told)
    with pytest.raises(CalmRayError, match="did not start: /tmp: the disk is full") as caught:
        handle_in(folder).start()
    assert caught.value.exit_code == DiskTrouble.exit_code
    remember(folder, told.model_copy(update={"pid": pid - 1}))
    (folder / "watchdog.log").write_text("calm-ray: parked: boom")
    with pytest.raises(CalmRayError, match="did not start: calm-ray: parked: boom"):
        handle_in(folder).start()
