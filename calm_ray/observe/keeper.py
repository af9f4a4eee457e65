"""A feed that survives its disk: rows wait while it takes none, and a damaged file is put aside, never deleted."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

from calm_ray.errors import CalmRayError
from calm_ray.observe.feed import Feed, FeedDamaged, FeedRow

MAX_PENDING = 20_000
"""Rows that wait: some 20 MB, an hour of a hundred peers. The oldest go first."""
_COMPANIONS = ("-wal", "-shm")
"""SQLite's own files beside a database."""


class FeedKeeper:
    """The one writer of a feed. `warn(text)` says what is wrong with it; an empty text takes that back."""

    def __init__(self, path: Path, *, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        self._pending: dict[tuple[str, str], FeedRow] = {}
        self._feed: Feed | None = None
        self._aside: Path | None = None

    def __enter__(self) -> Self:
        self.append_all(())
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def append_all(self, rows: Iterable[FeedRow]) -> None:
        """Append `rows` and what has waited, now or later. Never raises for the file: what is wrong with it is told."""
        for row in rows:
            self._pending.setdefault((row.kind, row.key), row)
        while len(self._pending) > MAX_PENDING:
            del self._pending[next(iter(self._pending))]
        try:
            self._append()
        except FeedDamaged:
            self._begin_anew()
        except CalmRayError as exc:
            self._wait(exc)
        else:
            self._warn(f"the feed was damaged and lies in {self._aside}; a new one has begun" if self._aside else "")

    def _begin_anew(self) -> None:
        try:
            self._put_aside()
            self._append()
        except CalmRayError as exc:
            self._wait(exc)
        except OSError as exc:
            self._wait(CalmRayError(f"{self._path}: damaged, and cannot be put aside: {exc.strerror or exc}"))

    def _append(self) -> None:
        if self._feed is None:
            self._feed = Feed(self._path)
        self._feed.append_all(self._pending.values())
        self._pending.clear()

    def _wait(self, problem: CalmRayError) -> None:
        self._close()  # a file system that came back may have another file there
        self._warn(f"{len(self._pending)} rows wait for the feed: {problem}")

    def _put_aside(self) -> None:
        """Raises OSError. The database last: what is left beside a new one would damage that, too."""
        self._close()
        aside = self._path.with_name(f"{self._path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        for end in (*_COMPANIONS, ""):
            source = self._path.with_name(self._path.name + end)
            if source.exists():
                source.rename(aside.with_name(aside.name + end))
        self._aside = aside

    def _close(self) -> None:
        if self._feed is not None:
            self._feed.close()
            self._feed = None
