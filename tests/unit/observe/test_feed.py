"""A feed survives reopening, second writers, damage and a full disk; all on real files."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from calm_ray.errors import CalmRayError
from calm_ray.observe.feed import MAX_EVENTS, MAX_PAYLOAD_BYTES, SCHEMA_VERSION, Feed, FeedReader, FeedRow


def row(key: str, *, kind: str = "epoch", at: float = 1.0) -> FeedRow:
    return FeedRow(kind=kind, key=key, at=at, payload={"epoch": key})


def test_feed_event_comes_back_as_it_was_appended(tmp_path: Path) -> None:
    with Feed(tmp_path / "new" / "feed.sqlite") as feed:
        assert feed.append("epoch", "7", at=12.5, payload={"name": "Zoë", "mlm_mean_loss": 2.25})
        (event,) = feed.events()
    assert (event.seq, event.kind, event.key, event.at) == (1, "epoch", "7", 12.5)
    assert event.payload == {"name": "Zoë", "mlm_mean_loss": 2.25}


def test_feed_row_appended_again_after_reopening_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / "feed.sqlite"
    with Feed(path) as feed:
        assert feed.append_all([row("1"), row("2"), row("1")]) == 2
    with Feed(path) as feed:
        assert feed.append_all([row("1", at=99.0), row("2"), row("3")]) == 1
        assert not feed.append("epoch", "3", at=5.0, payload={})
        assert [(e.seq, e.key, e.at) for e in feed.events()] == [(1, "1", 1.0), (2, "2", 1.0), (3, "3", 1.0)]


def test_feed_rows_of_two_kinds_share_one_sequence_but_not_their_keys(tmp_path: Path) -> None:
    with Feed(tmp_path / "feed.sqlite") as feed:
        assert feed.append_all([row("1"), row("1", kind="peer-epoch")]) == 2
        assert [event.kind for event in feed.events()] == ["epoch", "peer-epoch"]


def test_feed_events_after_a_number_are_a_page_of_the_newer_ones(tmp_path: Path) -> None:
    with Feed(tmp_path / "feed.sqlite") as feed:
        feed.append_all([row(str(i)) for i in range(1, MAX_EVENTS + 11)])
        assert [e.seq for e in feed.events(after=3, limit=2)] == [4, 5]
        assert len(feed.events(limit=10**9)) == MAX_EVENTS
        assert feed.events(after=10**9) == []
        assert feed.events(limit=-1) == []


def test_feed_reader_sees_what_a_writer_appends_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "feed.sqlite"
    with Feed(path) as feed, FeedReader(path) as reader:
        feed.append_all([row("1")])
        assert len(reader.events()) == 1
        feed.append_all([row("2")])
        assert [e.key for e in reader.events(after=1)] == ["2"]


def test_feed_reader_of_a_feed_that_nobody_writes_now_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a folder with % and ?" / "feed.sqlite"
    with Feed(path) as feed:
        feed.append_all([row("1")])
    with FeedReader(path) as reader:
        assert len(reader.events()) == 1


def test_feed_reader_cannot_write(tmp_path: Path) -> None:
    path = tmp_path / "feed.sqlite"
    Feed(path).close()
    with FeedReader(path) as reader, pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader._db.execute("DELETE FROM events")


def test_feed_with_a_second_writer_refuses_it(tmp_path: Path) -> None:
    path = tmp_path / "feed.sqlite"
    with Feed(path), pytest.raises(CalmRayError, match=r"feed\.sqlite: another process writes this feed"):
        Feed(path)
    Feed(path).close()


def test_feed_whose_writer_was_killed_keeps_every_returned_append(tmp_path: Path) -> None:
    path = tmp_path / "feed.sqlite"
    script = (
        "import os, sys; from pathlib import Path; from calm_ray.observe.feed import Feed\n"
        "feed = Feed(Path(sys.argv[1]))\n"
        "[feed.append('epoch', str(i), at=0.0, payload={}) for i in range(5)]\n"
        "feed._db.execute('BEGIN IMMEDIATE')\n"
        "feed._db.execute(\"INSERT INTO events (kind, key, at, payload) VALUES ('epoch', 'half', 0, '{}')\")\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False, timeout=60).returncode == -9
    with Feed(path) as feed:
        assert [event.key for event in feed.events()] == ["0", "1", "2", "3", "4"]
        assert feed.append_all([row("5")]) == 1


def test_feed_rows_beyond_retention_are_dropped_and_their_numbers_not_used_again(tmp_path: Path) -> None:
    with Feed(tmp_path / "feed.sqlite", retained_events={"peer-epoch": 100}) as feed:
        feed.append_all([row("1"), *(row(str(i), kind="peer-epoch") for i in range(1000))])
        feed.append_all([row("2")])
        events = feed.events()
    assert [events[0].key, events[-1].key] == ["1", "2"], "a kind without a limit stays"
    assert [event.seq for event in events[1:]] == list(range(902, 1003))


def test_feed_under_churn_does_not_grow_beyond_its_retention(tmp_path: Path) -> None:
    path = tmp_path / "feed.sqlite"
    sizes = []
    for start in range(0, 10_000, 2000):
        with Feed(path, retained_events={"peer-epoch": 500}) as feed:
            for i in range(start, start + 2000, 500):
                feed.append_all([row(f"{k:06d}", kind="peer-epoch") for k in range(i, i + 500)])
        sizes.append(path.stat().st_size)
    assert sizes[-1] <= 1.2 * sizes[0]


def test_feed_rows_brought_again_and_again_use_up_no_numbers(tmp_path: Path) -> None:
    with Feed(tmp_path / "feed.sqlite") as feed:
        for _ in range(50):
            feed.append_all([row("1"), row("2")])
        feed.append_all([row("3")])
        assert [event.seq for event in feed.events()] == [1, 2, 3]


@pytest.mark.parametrize(
    "content", [b"this is not a database at all, not at all" * 40, b"SQLite format 3\x00" + b"\xff" * 5000]
)
def test_feed_file_that_is_damaged_says_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "feed.sqlite"
    path.write_bytes(content)
    for opened in (Feed, FeedReader):
        with pytest.raises(CalmRayError, match=r"feed\.sqlite: .*damaged: move it away"):
            opened(path)
    assert path.read_bytes() == content


def test_feed_damaged_in_the_middle_says_so_when_read(tmp_path: Path) -> None:
    path = tmp_path / "feed.sqlite"
    with Feed(path) as feed:
        feed.append_all([row(str(i)) for i in range(500)])
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    with FeedReader(path) as reader, pytest.raises(CalmRayError, match="damaged"):
        reader.events()


def test_feed_on_a_full_disk_keeps_what_it_had_and_goes_on_when_there_is_space(tmp_path: Path) -> None:
    with Feed(tmp_path / "feed.sqlite") as feed:
        feed.append_all([row("1")])
        feed._db.execute("PRAGMA max_page_count = 10")
        many = [FeedRow(kind="epoch", key=str(i), at=0.0, payload={"x": "y" * 1000}) for i in range(2, 100)]
        with pytest.raises(CalmRayError, match="disk is full: free some space"):
            feed.append_all(many)
        assert [event.key for event in feed.events()] == ["1"]
        feed._db.execute("PRAGMA max_page_count = 1000000")
        assert feed.append_all(many) == 98


def test_feed_where_no_file_can_be_made_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CalmRayError, match="file"):
        Feed(tmp_path / "file" / "feed.sqlite")
    (tmp_path / "feed.sqlite").mkdir()
    with pytest.raises(CalmRayError, match=r"feed\.sqlite: unable to open"):
        Feed(tmp_path / "feed.sqlite")


def test_feed_reader_without_a_feed_says_so(tmp_path: Path) -> None:
    with pytest.raises(CalmRayError, match="no feed there"):
        FeedReader(tmp_path / "feed.sqlite")
    sqlite3.connect(tmp_path / "other.sqlite").close()
    (tmp_path / "other.sqlite").touch()
    with pytest.raises(CalmRayError, match="not a calm-ray feed"):
        FeedReader(tmp_path / "other.sqlite")


def test_feed_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "feed.sqlite"
    with Feed(path) as feed:
        feed._db.execute("PRAGMA user_version = 99")
    for opened in (Feed, FeedReader):
        with pytest.raises(CalmRayError, match="newer calm-ray"):
            opened(path)


def test_feed_of_version_1_is_taken_over_with_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "feed.sqlite"
    with Feed(path) as feed:
        feed.append("epoch", "7", at=1.0, payload={"rounds": {"averaged": 3, "partial": 0, "alone": 0, "failed": 1}})
        feed._db.execute("PRAGMA user_version = 1")
    with FeedReader(path) as reader:
        assert reader.events()[0].payload["rounds"]["failed"] == 1
    with Feed(path) as feed:
        assert feed._db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION == 2
        assert not feed.append("epoch", "7", at=2.0, payload={})
        assert feed.append_all([row("8")]) == 1


def test_feed_of_this_version_is_refused_by_an_older_calm_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep rows of kind `round` for ever."""
    path = tmp_path / "feed.sqlite"
    Feed(path).close()
    monkeypatch.setattr("calm_ray.observe.feed.SCHEMA_VERSION", 1)
    with pytest.raises(CalmRayError, match=r"written by a newer calm-ray \(feed schema 2, ours is 1\); update"):
        Feed(path)


def test_feed_payload_that_is_too_large_or_not_finite_is_our_own_mistake(tmp_path: Path) -> None:
    with Feed(tmp_path / "feed.sqlite") as feed:
        with pytest.raises(ValueError, match="payload"):
            feed.append("epoch", "1", at=0.0, payload={"x": "y" * MAX_PAYLOAD_BYTES})
        with pytest.raises(ValueError, match="JSON compliant"):
            feed.append("epoch", "1", at=0.0, payload={"x": float("nan")})
        assert feed.events() == []
