"""What the command line does with trouble that is not the command's: a disk, a terminal that is gone, a bug."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from calm_ray.cli import main as module
from calm_ray.cli.main import main
from calm_ray.errors import DiskTrouble
from tests.shards import ROOT

CONFIG = [sys.executable, "-W", "ignore", "-m", "calm_ray", "config", str(ROOT / "runs" / "demo.toml")]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_disk_trouble_is_one_line_wherever_it_is_met(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def fail(_: object) -> int:
        raise OSError(number, os.strerror(number), "/x/y")

    monkeypatch.setattr(module, "_status", fail)
    assert main(["status"]) == DiskTrouble.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("calm-ray: /x/y: ")
    assert "or write elsewhere" in line


def test_error_of_the_system_that_is_our_bug_stays_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(module, "_status", fail)
    with pytest.raises(OSError, match="Bad file descriptor"):
        main(["status"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_output_on_a_full_disk_is_told_in_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(CONFIG, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    assert "calm-ray: output: the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode == DiskTrouble.exit_code


def test_reader_that_has_seen_enough_is_no_trouble() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(CONFIG, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    os.close(write_end)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
