"""End a Ray worker whose raylet is dead, always.

Ray's own check asks whether the raylet's process id exists, and a raylet that nobody has reaped does: in a container
whose first process does not collect its children, such as `sleep infinity`, its workers would hold their actors, and
those their peers' leases, while the head starts the same actors elsewhere (Ray 2.60).
"""

import logging
import os
import threading
import time

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


def end_with_parent() -> None:
    """Watch from a thread; this process ends within LOOK_SECONDS of its parent, without goodbye."""
    threading.Thread(target=_watch, args=(os.getppid(),), name="parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    logger.error("parent=%d action=exit: the raylet is gone", parent)
    os._exit(1)
