"""The small parts of a peer's processes: lines out of chunks, a bounded log, one peer to a folder, sums of an epoch."""

import os
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest

from calm_ray.errors import CalmRayError, ConfigError
from calm_ray.peers.control import MAX_LINE_BYTES, socket_path
from calm_ray.peers.lines import LineBuffer
from calm_ray.peers.log import RotatingLog
from calm_ray.peers.monitor import due_epoch
from calm_ray.peers.trainer import EpochTally
from calm_ray.peers.watchdog import _exclusive
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
    with _exclusive(tmp_path), pytest.raises(ConfigError, match=message), _exclusive(tmp_path):
        pass
    with _exclusive(tmp_path):
        pass


def test_lock_that_a_dead_peer_left_is_free(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("99999999")
    with _exclusive(tmp_path):
        assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_each_folder_has_a_socket_of_its_own_in_a_private_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
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
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(CalmRayError, match="too long a path for a socket; set TMPDIR"):
        socket_path(tmp_path)


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
