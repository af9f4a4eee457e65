"""What the job prints. Neither a terminal that is gone nor a log on a full disk ends a run; `| head` does."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class Voice:
    """A stream to print to that never fails but for BrokenPipeError; all else is the stream's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with _unheard():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _unheard():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def spoken() -> Iterator[None]:
    """Standard output and error are Voices; at the end, what could not be said is dropped."""
    out, err = sys.stdout, sys.stderr
    with contextlib.redirect_stdout(cast(TextIO, Voice(out))), contextlib.redirect_stderr(cast(TextIO, Voice(err))):
        try:
            yield
        finally:
            for stream in (out, err):
                _drain(stream)


def _drain(stream: TextIO) -> None:
    try:
        stream.flush()
    except OSError:  # Python would try once more as it ends, with a traceback and a status of its own
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        pass
