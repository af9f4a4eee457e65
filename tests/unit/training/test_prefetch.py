"""The background thread: in order, bounded, honest about errors, gone when closed."""

import threading
import time
from collections.abc import Iterator

import pytest

from calm_ray.training.prefetch import Prefetcher
from tests.eventually import eventually


def test_prefetch_keeps_order_and_ends() -> None:
    with Prefetcher(iter(range(20)), depth=3) as items:
        assert list(items) == list(range(20))
        assert list(items) == []


def test_prefetch_passes_an_exception_on_after_what_came_before() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("disk on fire")

    with Prefetcher(broken(), depth=3) as items:
        assert next(items) == 1
        for _ in range(2):
            with pytest.raises(OSError, match="disk on fire"):
                next(items)


def test_prefetch_never_runs_further_ahead_than_its_depth() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for i in range(1000):
            made.append(i)
            yield i

    with Prefetcher(numbers(), depth=3) as items:
        next(items)
        eventually(lambda: len(made) == 5, timeout=5)
        assert len(made) == 5  # one taken, three ready, one in hand


def test_prefetch_starts_no_thread_before_the_first_item() -> None:
    before = threading.active_count()
    items = Prefetcher(iter(range(3)), depth=2)
    assert threading.active_count() == before
    items.close()
    assert list(items) == []


def test_prefetch_when_closed_stops_at_once_and_closes_its_source() -> None:
    is_source_closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            is_source_closed.set()

    items = Prefetcher(endless(), depth=2)
    next(items)
    started_at = time.monotonic()
    items.close()
    items.close()
    assert time.monotonic() - started_at < 2
    assert is_source_closed.is_set()
    with pytest.raises(StopIteration):
        next(items)
