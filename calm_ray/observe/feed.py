"""An append-only feed of events in one SQLite file: what a monitor saw, served later as `/events?after=N`.

One process writes a file (a lock beside it says so), any number read it meanwhile (WAL). Rows are idempotent: a
(kind, key) is written once, and again is nothing, so a monitor may ingest what it sees as often as it likes and may be
killed anywhere. Rejected: JSON lines, which have no unique key and end in half a line after a kill; a table for each
kind, as `after=N` needs one sequence.

Size, measured, index included: about 530 bytes for each peer and epoch (kind `peer-epoch`), 700 to 2200 more with 4 to
64 weights (kind `round`), 1000 for each epoch (kind `epoch`). A hundred peers would write 26 GB in 100,000 epochs, so
old rows of the first two kinds are dropped: by default the file stays below 1.6 GB, plus 100 MB for every 100,000
epochs. A dropped row does not come back: reports older than two minutes are not believed.
"""

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from calm_ray.errors import CalmRayError

SCHEMA_VERSION = 2
"""2: kind `round`, which a writer of version 1 would never prune. The tables are the same, so a feed of version 1 is
taken over as it is; its epochs' rows count fewer outcomes of rounds."""
MAX_EVENTS = 1000
"""Of one call to `events`: bounds the memory that a reader can make us use."""
MAX_PAYLOAD_BYTES = 8192
RETAINED_EVENTS: Mapping[str, int] = {"peer-epoch": 2_000_000, "round": 200_000}
"""Kind -> a row is dropped when so many newer events, of any kind, follow. Kinds not named here are kept for ever."""
_PRUNE_EVERY_ROWS = 1000
_BUSY_SECONDS = 5.0

_SCHEMA = """
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL, key TEXT NOT NULL, at REAL NOT NULL, payload TEXT NOT NULL,
    UNIQUE (kind, key)
)
"""


@dataclass(frozen=True, kw_only=True)
class FeedRow:
    """Something to append. `key` is unique within its `kind`; `at` in Unix seconds."""

    kind: str
    key: str
    at: float
    payload: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Event(FeedRow):
    """A row as it was appended; `seq` grows with each and is never used twice."""

    seq: int


class FeedDamaged(CalmRayError):
    """The file is no feed any more: put it aside and begin a new one."""


class _Connection:
    """What reader and writer share: open, read, close, and SQLite's errors as ours. For one thread."""

    def __init__(self, path: Path, *, uri: str) -> None:
        self._path = path
        with _translated(path):
            self._db = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            with _translated(path):
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def events(self, *, after: int = 0, limit: int = MAX_EVENTS) -> list[Event]:
        """Rows with `seq` greater than `after`, oldest first, at most `limit` (and at most MAX_EVENTS)."""
        query = "SELECT seq, kind, key, at, payload FROM events WHERE seq > ? ORDER BY seq LIMIT ?"
        with _translated(self._path):
            rows = self._db.execute(query, (after, max(0, min(limit, MAX_EVENTS)))).fetchall()
        return [
            Event(seq=seq, kind=kind, key=key, at=at, payload=json.loads(payload))
            for seq, kind, key, at, payload in rows
        ]

    def _prepare(self) -> None:
        self._check_version()

    def _check_version(self) -> int:
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA_VERSION:
            raise CalmRayError(
                f"{self._path}: written by a newer calm-ray (feed schema {version}, ours is {SCHEMA_VERSION}); "
                "update calm-ray"
            )
        return version


class FeedReader(_Connection):
    """Reads a feed that somebody else writes."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise CalmRayError(f"{path}: no feed there; a monitor writes one when it starts")
        super().__init__(path, uri=f"{path.absolute().as_uri()}?mode=ro")

    def _prepare(self) -> None:
        if self._check_version() == 0:
            raise CalmRayError(f"{self._path}: a database, but not a calm-ray feed")


class Feed(_Connection):
    """The one writer of a feed. Creates the file; CalmRayError if another process writes it."""

    def __init__(self, path: Path, *, retained_events: Mapping[str, int] = RETAINED_EVENTS) -> None:
        self._retained_events = dict(retained_events)
        self._num_unpruned = _PRUNE_EVERY_ROWS  # at the first append: we may be restarted often
        with _translated(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path.with_name(f"{path.name}.lock"))
        try:
            super().__init__(path, uri=f"{path.absolute().as_uri()}?mode=rwc")
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        super().close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def append(self, kind: str, key: str, *, at: float, payload: Mapping[str, Any]) -> bool:
        """Append one row; False if this (kind, key) is there already. On disk when this returns."""
        return self.append_all([FeedRow(kind=kind, key=key, at=at, payload=payload)]) == 1

    def append_all(self, rows: Iterable[FeedRow]) -> int:
        """Append what is new, all or nothing, and return how many rows that was. On disk when this returns."""
        # Not `ON CONFLICT DO NOTHING`: it uses up a seq for each row that is there already, and a monitor brings every
        # row many times. We alone write, so looking first is safe.
        wanted: dict[tuple[str, str], FeedRow] = {}
        for row in rows:
            wanted.setdefault((row.kind, row.key), row)
        exists = "SELECT 1 FROM events WHERE kind = ? AND key = ?"
        with _translated(self._path):
            new = [row for place, row in wanted.items() if self._db.execute(exists, place).fetchone() is None]
        if not new:
            return 0
        if self._num_unpruned >= _PRUNE_EVERY_ROWS:
            self.prune()
        insert = "INSERT INTO events (kind, key, at, payload) VALUES (?, ?, ?, ?)"
        values = [(row.kind, row.key, row.at, _payload(row)) for row in new]
        with _translated(self._path), self._transaction():
            self._db.executemany(insert, values)
        self._num_unpruned += len(new)
        return len(new)

    def prune(self) -> None:
        """Drop what `retained_events` no longer covers. Runs by itself, every thousand new rows."""
        self._num_unpruned = 0
        with _translated(self._path), self._transaction():
            newest = self._db.execute("SELECT max(seq) FROM events").fetchone()[0] or 0
            for kind, num_retained in self._retained_events.items():
                # `+kind` keeps SQLite off the index: the few old rows are found by seq, not all rows of the kind.
                self._db.execute("DELETE FROM events WHERE seq <= ? AND +kind = ?", (newest - num_retained, kind))

    def _prepare(self) -> None:
        # FULL: an appended row survives a power cut. A monitor commits once per reporting period, so it costs nothing.
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "journal_size_limit = 4194304"):
            self._db.execute(f"PRAGMA {pragma}")
        version = self._check_version()
        if version == SCHEMA_VERSION:
            return
        with self._transaction():
            if version == 0:
                self._db.execute(_SCHEMA)
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk makes SQLite roll back by itself
                self._db.execute("ROLLBACK")
            raise


def _payload(row: FeedRow) -> str:
    text = json.dumps(row.payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    if len(text.encode()) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"{row.kind} {row.key}: a payload of more than {MAX_PAYLOAD_BYTES} bytes")
    return text


def _lock(path: Path) -> int:
    """Hold a lock until the descriptor is closed, by us or by the kernel when we die."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise CalmRayError(f"{path.with_suffix('')}: another process writes this feed; one writer per file") from None
    return lock


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """SQLite's and the system's errors as one of ours, with what to do."""
    try:
        yield
    except sqlite3.DatabaseError as exc:
        code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or "no such table" in str(exc):
            remedy = "the feed is damaged: move it away, a new one is filled from the other monitor's"
            raise FeedDamaged(f"{path}: {exc}; {remedy}") from exc
        if code == sqlite3.SQLITE_FULL:
            remedy = "the disk is full: free some space; nothing of the last append was kept"
        elif code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            remedy = "not writable, or not readable: check the folder's owner and whether the disk is mounted read-only"
        elif code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            remedy = f"another process held it for more than {_BUSY_SECONDS:.0f} s: try again"
        else:
            remedy = "check the disk, then try again"
        raise CalmRayError(f"{path}: {exc}; {remedy}") from exc
    except OSError as exc:
        raise CalmRayError(f"{path}: {exc.strerror or exc}; check that the folder is there and writable") from exc
