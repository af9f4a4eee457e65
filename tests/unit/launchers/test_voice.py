"""What the job prints costs it nothing, whatever becomes of the reader."""

import errno
import io
import os
import subprocess
import sys
from typing import Any

import pytest

from launchers.voice import Voice


class Stream(io.StringIO):
    """Fails with `error` when it is flushed."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def flush(self) -> None:
        raise self.error


def test_full_disk_and_lost_terminal_are_passed_over() -> None:
    for number in (errno.ENOSPC, errno.EIO):
        stream: Any = Stream(OSError(number, os.strerror(number)))
        print("unheard", file=Voice(stream), flush=True)
    assert Voice(stream).isatty() is False


def test_reader_who_has_seen_enough_is_told() -> None:
    stream: Any = Stream(BrokenPipeError())
    with pytest.raises(BrokenPipeError):
        print("unread", file=Voice(stream), flush=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_process_whose_log_is_on_a_full_disk_ends_as_it_would() -> None:
    script = "from launchers.voice import spoken\nwith spoken():\n    print('x' * 100_000, flush=True)\n    print('y')"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")
