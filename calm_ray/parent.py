"""End this process when its parent is dead, always, whatever its other threads do.

The kernel's own word (PDEATHSIG) is Linux's, and Python hears a signal only between two calls: a micro-batch on a slow
machine is one call of many seconds. A Ray worker gets no such word at all, and Ray's own check asks whether the
raylet's process id exists, which it does until somebody reaps it: in a container whose first process does not collect
its children, such as `sleep infinity`, workers would hold their actors, and those their peers' leases, while the head
starts the same actors elsewhere (Ray 2.60).
"""

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


def end_with_parent(*, on_death: Callable[[], None] = lambda: None) -> None:
    """Watch from a thread; this process ends within LOOK_SECONDS of its parent, without goodbye.

    `on_death` is called first, in that thread, to say goodbye after all; it has to end by itself.
    """
    threading.Thread(target=_watch, args=(os.getppid(), on_death), name="parent", daemon=True).start()


def _watch(parent: int, on_death: Callable[[], None]) -> None:
    pause = threading.Event()  # not `time.sleep`: under libfaketime it fails now and then
    while os.getppid() == parent:
        pause.wait(LOOK_SECONDS)
    logger.error("parent=%d action=exit: it is gone", parent)
    on_death()
    os._exit(1)


def death_signal() -> Callable[[], object]:
    """What a new process calls to get SIGTERM when the thread that forked it ends: on Linux; elsewhere, nothing.

    Made ready before the fork, for between fork and exec nothing may be imported or locked.
    """
    if not sys.platform.startswith("linux"):
        return lambda: None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
