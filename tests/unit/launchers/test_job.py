"""The job's command: exit status and one line for each bad day, and nothing lost by a full disk."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calm_ray.errors import CalmRayError, CheckpointRejected, ConfigError, DiskTrouble, VersionMismatch
from launchers import job, verdict
from launchers.job import BEGIN_FILE, main
from tests.integration.runs import write_config

BEFORE = {"mean_mlm_loss": 6.0, "mean_sop_loss": 1.0, "sop_accuracy": 0.5}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "run.toml", run_id="run")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The job puts handlers of its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("option", [(), ("--down",)])
def test_cluster_that_is_gone_is_a_line_and_no_traceback(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    option: tuple[str, ...],
) -> None:  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert main([str(config), "--out", str(tmp_path / "out"), *option]) == 1
    out, err = capsys.readouterr()
    assert f"no Ray cluster answers at RAY_ADDRESS={address}" in (out if option else err)
    assert ("Nothing is left on this machine. On others" in out) == bool(option)
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("code", "error", "status", "told"),
    [
        (2, "edit it", 2, "edit it"),
        (5, "install it", 5, "install it"),
        (6, "out/checkpoints: none verifies", 6, "none verifies"),
        (7, "the disk is full", 7, "the disk is full"),
        (1, "Traceback\n  x\nKeyError: 'x'", 1, "KeyError: 'x'"),
        (-9, "a warning", 137, "launchers.prepare: killed by SIGKILL"),
        (3, "", 3, "launchers.prepare: ended with code 3"),
    ],
)
def test_exit_status_of_the_preparation_is_kept(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int,
    error: str, status: int, told: str,
) -> None:  # fmt: skip
    done = subprocess.CompletedProcess([], code, stdout="", stderr=error)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(job, "install_line", lambda _: "")
    assert main([str(config), "--out", str(tmp_path / "out")]) == status
    assert capsys.readouterr().err.strip().endswith(told)


def test_codes_of_the_preparation_are_those_of_our_errors() -> None:
    errors: tuple[type[CalmRayError], ...] = (ConfigError, VersionMismatch, CheckpointRejected, DiskTrouble)
    assert [error.exit_code for error in errors] == [2, 5, 6, 7]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_disk_that_takes_nothing_is_a_line(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def set_aside(out: Path) -> None:
        raise OSError(number, os.strerror(number), str(out))

    monkeypatch.setattr(job, "set_aside", set_aside)
    assert main([str(config), "--out", str(tmp_path / "out")]) == (2 if number == errno.EACCES else 7)
    told = capsys.readouterr().err
    assert told.startswith(f"job: {tmp_path / 'out'}: ") and "choose another --out" in told
    assert len(told.splitlines()) == 1


def test_error_that_is_no_disk_is_not_hidden(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def set_aside(out: Path) -> None:
        raise OSError(errno.EBADF, "ours")

    monkeypatch.setattr(job, "set_aside", set_aside)
    with pytest.raises(OSError, match="ours"):
        main([str(config), "--out", str(tmp_path / "out")])


def test_hangup_that_is_ignored_stays_so(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_train_and_judge", lambda *_, **__: 0)
    for before in (signal.SIG_IGN, signal.SIG_DFL):
        signal.signal(signal.SIGHUP, before)
        assert main([str(config), "--out", str(tmp_path / "out")]) == 0
        assert (signal.getsignal(signal.SIGHUP) is signal.SIG_IGN) == (before is signal.SIG_IGN)
        assert callable(signal.getsignal(signal.SIGTERM))


def test_second_hangup_does_not_interrupt_the_goodbyes(tmp_path: Path) -> None:
    class Crew:
        def end(self) -> list[str]:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), number)
            return ["trainer-0: no answer"]

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, job._as_interrupt)
    crew: Any = Crew()
    job._end(crew, tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    asked: list[Path] = []

    def evaluate(checkpoint: Path, bundle: Path) -> dict[str, Any]:
        asked.append(checkpoint)
        if checkpoint.name.endswith("7"):
            raise CalmRayError("evaluation failed")
        return BEFORE

    monkeypatch.setattr(verdict, "evaluate", evaluate)
    return asked


def test_first_evaluation_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = evaluations(monkeypatch)
    checkpoint = tmp_path / "checkpoints" / "epoch-00000000"
    assert job._first_evaluation(tmp_path, begin=checkpoint) == BEFORE
    assert job._first_evaluation(tmp_path, begin=None) == BEFORE
    assert asked == [checkpoint], "the second driver reads it"

    (tmp_path / BEGIN_FILE).write_text(json.dumps(BEFORE)[:10])  # of a disk that was full
    checkpoint.mkdir(parents=True)
    assert job._first_evaluation(tmp_path, begin=None) == BEFORE
    (tmp_path / BEGIN_FILE).unlink()
    (tmp_path / BEGIN_FILE).mkdir()  # nothing can be written there
    assert job._first_evaluation(tmp_path, begin=checkpoint) == BEFORE


def test_run_that_is_up_is_followed_without_its_first_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluations(monkeypatch)
    assert job._first_evaluation(tmp_path, begin=None) is None
    (tmp_path / "checkpoints" / "epoch-00000007").mkdir(parents=True)
    assert job._first_evaluation(tmp_path, begin=None) is None
    assert "evaluation failed" in capsys.readouterr().out
    after = {**BEFORE, "unigram_loss": 5.0, "ln_vocab_size": 7.0, "num_sequences": 1, "num_masked_tokens": 2}
    verdict.print_verdict(before=None, after=after, checkpoint=tmp_path)
    assert "MLM has gone 50 %" in capsys.readouterr().out


def test_job_whose_output_is_on_a_full_disk_ends_with_its_own_status(config: Path, tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("/dev/full is Linux's")
    argv = [sys.executable, "-m", "launchers.job", str(config), "--out", str(tmp_path / "out"), "--down"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
