"""A feed on a disk that is full, read-only or damaged: rows wait, nothing is deleted, and the words say so."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from calm_ray.observe import keeper
from calm_ray.observe.feed import Feed, FeedReader, FeedRow
from calm_ray.observe.keeper import FeedKeeper


def rows(*numbers: int) -> list[FeedRow]:
    return [FeedRow(kind="k", key=str(number), at=float(number)) for number in numbers]


def keys(path: Path) -> list[str]:
    with FeedReader(path) as feed:
        return [event.key for event in feed.events()]


class Words(list[str]):
    """What was said, newest last."""

    def __call__(self, text: str) -> None:
        self.append(text)


@pytest.fixture
def words() -> Words:
    return Words()


def test_rows_of_a_healthy_feed_are_there_at_once(tmp_path: Path, words: Words) -> None:
    with FeedKeeper(tmp_path / "feed.sqlite", warn=words) as kept:
        kept.append_all(rows(1, 2))
        kept.append_all(rows(2, 3))
        assert keys(tmp_path / "feed.sqlite") == ["1", "2", "3"]
    assert set(words) == {""}


@pytest.mark.parametrize("damage", [b"this is no database at all", b"SQLite format 3\0" + bytes(3000)])
def test_damaged_feed_is_put_aside_and_a_new_one_begins(tmp_path: Path, words: Words, damage: bytes) -> None:
    path = tmp_path / "feed.sqlite"
    path.write_bytes(damage)
    with FeedKeeper(path, warn=words) as kept:
        kept.append_all(rows(1))
        kept.append_all(rows(2))
    assert keys(path) == ["1", "2"]
    (aside,) = tmp_path.glob("feed.sqlite.damaged-*[0-9]")
    assert aside.read_bytes() == damage
    assert words[-1] == f"the feed was damaged and lies in {aside}; a new one has begun"


def test_damaged_feed_that_cannot_be_put_aside_is_told_and_rows_wait(
    tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "feed.sqlite"
    path.write_bytes(b"this is no database at all")

    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    kept = FeedKeeper(path, warn=words)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        kept.append_all(rows(1))
    told = f"1 rows wait for the feed: {path}: damaged, and cannot be put aside: Read-only file system"
    assert words[-1] == told
    kept.append_all(rows(2))
    kept.__exit__()
    assert keys(path) == ["1", "2"]
    assert len([*tmp_path.glob("feed.sqlite.damaged-*")]) == 1


def test_rows_wait_while_the_feed_takes_none_and_come_in_order(tmp_path: Path, words: Words) -> None:
    path = tmp_path / "folder" / "feed.sqlite"
    path.parent.write_text("a file in the folder's place")
    with FeedKeeper(path, warn=words) as kept:
        kept.append_all(rows(1))
        kept.append_all(rows(2))
        assert words[-1].startswith(f"2 rows wait for the feed: {path}")
        path.parent.unlink()
        kept.append_all(rows(3))
        assert words[-1] == ""
    assert keys(path) == ["1", "2", "3"]


def test_rows_that_wait_are_bounded_and_the_newest_stay(
    tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "MAX_PENDING", 5)
    path = tmp_path / "feed.sqlite"
    with Feed(path), FeedKeeper(path, warn=words) as kept:  # somebody else holds it
        kept.append_all(rows(*range(20)))
        assert words[-1].startswith("5 rows wait for the feed")
    with FeedKeeper(path, warn=words) as kept:
        kept.append_all(())
    assert keys(path) == []
    with Feed(path) as other:
        kept = FeedKeeper(path, warn=words)
        kept.append_all(rows(*range(20)))
        other.close()
        kept.append_all(())
        kept.__exit__()
    assert keys(path) == ["15", "16", "17", "18", "19"]


FULL = """
import resource, signal, sys
from pathlib import Path
from calm_ray.observe.feed import FeedRow
from calm_ray.observe.keeper import FeedKeeper

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path, words = Path(sys.argv[1]), []
big = [FeedRow(kind="k", key=str(n), at=0.0, payload={"x": "y" * 8000}) for n in range(40)]
with FeedKeeper(path, warn=words.append) as kept:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    kept.append_all(big)
    assert words[-1].startswith("40 rows wait for the feed"), words[-1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    kept.append_all(())
    assert words[-1] == "", words
"""


def test_rows_wait_for_room_on_the_disk(tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk; a real one is in the slow tests."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "feed.sqlite")], env={**os.environ}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(keys(tmp_path / "feed.sqlite")) == 40
