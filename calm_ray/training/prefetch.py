"""Prepare the next batches while the model works on this one: one thread, a bounded queue.

A thread and not worker processes: tokenising runs outside the interpreter lock, peers are forked by hivemind, and a
DataLoader's workers would each need the stream's state.
"""

import queue
import threading
from collections.abc import Iterator
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.1
_JOIN_SECONDS = 5.0


class Prefetcher(Generic[T]):
    """Iterate over `items` in a thread that starts at the first `next` and keeps at most `depth` of them ready.

    An exception of `items` is raised by `next`, after what came before it, and again at every later call. Use from one
    thread. Not started in the constructor: hivemind forks after we are built, and threads do not survive a fork.
    """

    def __init__(self, items: Iterator[T], *, depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._end: BaseException | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._end is not None:
            raise self._end
        if self._is_closed.is_set():
            raise StopIteration
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
            self._thread.start()
        kind, value = self._take()
        if kind == "item":
            return value
        self._end = value
        raise value

    def close(self) -> None:
        """Stop the thread; at most 5 s, should it hang in a read that cannot be interrupted. Call it twice if you like.

        Items not yet taken are lost. The stream is closed by its own thread, when it comes to that.
        """
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put("item", item):
                    break
            else:
                self._put("end", StopIteration())
        except BaseException as exc:  # noqa: BLE001 - the thread's boundary: the consumer must see it
            self._put("end", exc)
        finally:
            close = getattr(self._items, "close", None)
            if close is not None:
                close()

    def _take(self) -> tuple[str, Any]:
        """Wait for the thread, but not beyond `close`, which may come from a signal handler."""
        while not self._is_closed.is_set():
            try:
                return self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
        return "end", StopIteration()

    def _put(self, kind: str, value: Any) -> bool:
        while not self._is_closed.is_set():
            try:
                self._queue.put((kind, value), timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False
