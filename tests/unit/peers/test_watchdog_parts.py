"""The small parts of a peer's processes: lines out of chunks, a bounded log, one peer to a folder, sums of an epoch."""

import errno
import os
import re
import selectors
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest

from calm_ray.errors import CalmRayError, ConfigError, DiskTrouble
from calm_ray.peers.control import MAX_LINE_BYTES, LineBuffer, socket_path
from calm_ray.peers.control_server import ControlServer
from calm_ray.peers.lock import exclusive, holder
from calm_ray.peers.log import RotatingLog
from calm_ray.peers.monitor import due_epoch
from calm_ray.peers.trainer import EpochTally
from calm_ray.peers.vitals import memory_limit
from calm_ray.training.loop import MicroStep

# --- lines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
def test_lines_come_whole_however_they_were_cut(chunk_size: int) -> None:
    data = b'{"state": "training"}\n\n{"state": "gr\xc3\xbc\xc3\x9fe"}\nrest'
    buffer = LineBuffer()
    lines = [
        line for start in range(0, len(data), chunk_size) for line in buffer.feed(data[start : start + chunk_size])
    ]
    assert lines == [b'{"state": "training"}', '{"state": "grüße"}'.encode()]
    assert buffer.feed(b" of it\n") == [b"rest of it"]


def test_line_that_never_ends_is_dropped_and_the_next_ones_come() -> None:
    buffer = LineBuffer()
    for _ in range(40):
        assert buffer.feed(bytes(MAX_LINE_BYTES // 8).replace(b"\0", b"x")) == []
        assert len(buffer._rest) <= MAX_LINE_BYTES
    assert buffer.feed(b"\nnext\n")[-1] == b"next"


# --- the log ---------------------------------------------------------------------------------------------------------


def test_log_is_appended_to_by_the_next_watchdog(tmp_path: Path) -> None:
    path = tmp_path / "peer.log"
    for text in (b"first\n", b"second\n"):
        with RotatingLog(path) as log:
            log.write(text)
    assert path.read_bytes() == b"first\nsecond\n"


def test_log_keeps_the_newest_and_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "peer.log"
    with RotatingLog(path, max_bytes=100) as log:
        for number in range(1000):
            log.write(b"line %04d\n" % number)
            assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 200
    kept = (tmp_path / "peer.log.1").read_bytes() + path.read_bytes()
    numbers = [int(line.split()[1]) for line in kept.splitlines()]
    assert numbers[-1] == 999
    assert len(numbers) > 10
    assert all(b == a + 1 for a, b in pairwise(numbers)), "nothing between the oldest kept and the newest is lost"


def test_log_counts_what_was_there_before(tmp_path: Path) -> None:
    path = tmp_path / "peer.log"
    path.write_bytes(bytes(95))
    with RotatingLog(path, max_bytes=100) as log:
        log.write(b"ten bytes\n")
    assert path.read_bytes() == b"ten bytes\n"
    assert (tmp_path / "peer.log.1").stat().st_size == 95


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_loses_lines_and_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "peer.log").symlink_to("/dev/full")
    with RotatingLog(tmp_path / "peer.log") as log:
        for _ in range(100):
            log.write(b"x" * 1000)


def test_log_whose_folder_is_gone_stops_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "peer"
    folder.mkdir()
    with RotatingLog(folder / "peer.log", max_bytes=100) as log:
        (folder / "peer.log").unlink()
        folder.rmdir()
        for _ in range(100):
            log.write(b"ten bytes\n")


# --- the folder ------------------------------------------------------------------------------------------------------


def test_folder_has_one_peer_and_its_pid_is_told(tmp_path: Path) -> None:
    message = rf"another peer runs here \(process {os.getpid()}\); stop it, or choose another --folder"
    assert not holder(tmp_path)
    with exclusive(tmp_path):
        assert holder(tmp_path) == holder(tmp_path) == str(os.getpid())
        with pytest.raises(ConfigError, match=message), exclusive(tmp_path):
            pass
    assert not holder(tmp_path)
    with exclusive(tmp_path):
        pass


def test_lock_that_a_dead_peer_left_is_free(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("99999999")
    with exclusive(tmp_path):
        assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_disk_without_locks_is_no_other_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network disks are."""
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))))
    with pytest.raises(OSError, match="No locks available"), exclusive(tmp_path):
        pass
    assert not holder(tmp_path)


def test_each_folder_has_a_socket_of_its_own_in_a_private_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    first, second = socket_path(tmp_path / "first"), socket_path(tmp_path / "second")
    assert first != second
    assert first == socket_path(tmp_path / "second" / ".." / "first")
    assert first.parent.stat().st_mode & 0o777 == 0o700
    first.parent.chmod(0o755)
    with pytest.raises(CalmRayError, match="is not private to you; remove it or set TMPDIR"):
        socket_path(tmp_path / "first")


def test_temporary_folder_too_deep_for_a_socket_is_told_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 80)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    with pytest.raises(CalmRayError, match="too long a path for a socket; set TMPDIR"):
        socket_path(tmp_path)


def test_place_of_sockets_is_found_without_writing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that is full now, `calm-ray status` has to look where the peer listens since yesterday."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    path = socket_path(tmp_path / "first")
    monkeypatch.setattr("os.open", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    assert socket_path(tmp_path / "first") == path
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    assert socket_path(tmp_path / "first").is_relative_to("/tmp")


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (
            errno.ENOSPC,
            DiskTrouble,
            "the disk is full; delete what you no longer need, or set TMPDIR to another folder",
        ),
        (errno.EROFS, DiskTrouble, "the disk is read-only; mount it writable, or set TMPDIR to another folder"),
        (errno.EACCES, ConfigError, "Permission denied; set TMPDIR to another folder, which you own"),
    ],
)
def test_place_of_sockets_that_takes_none_is_told_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[CalmRayError], words: str
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(Path, "mkdir", Mock(side_effect=OSError(number, os.strerror(number))))
    with selectors.DefaultSelector() as selector:
        server = ControlServer(selector, answer=bytes, on_stop=lambda: None)
        with pytest.raises(kind, match=f"^{re.escape(f'{tmp_path}: {words}')}$"), server.listening(tmp_path / "peer"):
            pass


def test_memory_limit_is_that_of_the_smallest_group_around_us(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) == psutil.virtual_memory().total
    group = tmp_path / "sys/fs/cgroup/user.slice/box"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/user.slice/box\n")
    for folder, limit in ((group, "2000000"), (group.parent, "1000000")):
        for name, text in (("max", limit), ("current", "7"), ("stat", "inactive_file 0\n")):
            (folder / f"memory.{name}").write_text(text)
    assert memory_limit(tmp_path) == 1_000_000


# --- epochs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "last_epoch", "expected"),
    [
        (0, 0, None),
        (9, 0, None),
        (10, 0, 10),
        (19, 0, 10),
        (29, 0, 20),
        (29, 20, None),
        (29, 25, None),  # a later one than asked for was written
        (30, 25, 30),
        (34, 30, None),
        (35, 30, 35),  # the last epoch is always due
        (36, 30, 35),
        (35, 35, None),
        (40, 36, None),
    ],
)
def test_checkpoint_is_due_every_tenth_epoch_and_at_the_end(epoch: int, last_epoch: int, expected: int | None) -> None:
    assert due_epoch(epoch=epoch, last_epoch=last_epoch, every_epochs=10, num_epochs=35) == expected


def test_tally_adds_up_what_a_report_says_of_an_epoch() -> None:
    tally = EpochTally(7)
    assert tally.record() is None, "an epoch without a micro-batch has no mean loss"
    for num_samples, mlm, sop in ((8, 5.0, 0.5), (4, 3.0, 0.7)):
        step = MicroStep(
            num_samples=num_samples, mean_mlm_loss=mlm, mean_sop_loss=sop, grad_norm=1.0, is_finite=True,
        )  # fmt: skip
        tally.add(step)
    record = tally.record()
    assert record is not None
    assert (record.epoch, record.mini_steps, record.num_samples) == (7, 2, 12)
    assert (record.mlm_mean_loss, record.sop_mean_loss) == pytest.approx((4.0, 0.6))
