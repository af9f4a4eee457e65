"""Forks peers: reads the path of a spec per line, answers with the new process's id. Ends with its input.

Its own process imports torch and hivemind and does nothing with them, so a fork of it is as good as a fresh process.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import traceback
from pathlib import Path

import numpy as np
from hivemind.utils.asyncio import _AsyncContextWrapper
from hivemind.utils.mpfuture import MPFuture

from benchmarks import swarm_ours, swarm_process  # noqa: F401  the slow imports, once for all


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    for line in sys.stdin:
        path = Path(line.rstrip("\n"))
        pid = os.fork()
        if pid == 0:
            _live(path)
        print(pid, flush=True)


def _live(path: Path) -> None:
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(path.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        _be_nobodys_sibling()
        swarm_process.main(path)
        code = 0
    except BaseException:  # noqa: BLE001  a fork must never return into the nursery's loop
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def _be_nobodys_sibling() -> None:
    """Share nothing with other forks: hivemind makes locks between processes, and random numbers, as it is imported."""
    MPFuture.reset_backend()  # one peer killed while it holds the lock would stop all others
    _AsyncContextWrapper.EXECUTOR_LOCK = multiprocessing.Lock()
    random.seed()  # DHT ids are drawn from it
    np.random.seed()


if __name__ == "__main__":
    main()
