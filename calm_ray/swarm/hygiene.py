"""Leave nothing behind: what hivemind starts must die with the process that started it, and so must its sockets.

hivemind forks a DHT process and one per averager; p2pd hangs below the DHT's. After SIGKILL or `os._exit` of their
owner stock hivemind leaves them running, holding ports and pipes (`tests/integration/test_hygiene.py` shows it), and
its sockets in /tmp under random names, of which nobody can tell whose they were.

Light: hivemind is imported only where sockets are placed.
"""

import contextlib
import gc
import os
import signal
import sys
import threading
from pathlib import Path

from calm_ray.parent import death_signal

_LONGEST_NAME = "-p2pclient-0123456789a.sock"
MAX_SOCKET_PATH_BYTES = 103
"""macOS's limit; Linux allows four more."""
_installed = False


def bind_children_to_parent() -> None:
    """From now on, every process forked from this one gets SIGTERM when the forking thread ends. Linux only.

    Call it once, before hivemind starts anything, from the main thread: PDEATHSIG follows the thread that forked, so
    forks from a short-lived thread would end with that thread.
    """
    global _installed
    if _installed or not sys.platform.startswith("linux"):
        return
    assert threading.current_thread() is threading.main_thread(), "PDEATHSIG follows the forking thread"
    ask = death_signal()

    def in_child() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's own handler would swallow it
        ask()
        if os.getppid() == 1:  # the parent died between fork and prctl
            os._exit(0)

    os.register_at_fork(after_in_child=in_child)
    _installed = True


def share_memory_with_children() -> None:
    """To be called right before a fork that stays: what is loaded until now is looked at by no garbage collection any
    more. One that looks at everything writes into everything, and both processes get a copy of what they had shared:
    50 MB each, some minutes after the start (https://docs.python.org/3/library/gc.html#gc.freeze)."""
    gc.collect()
    gc.freeze()


def place_sockets(prefix: Path) -> None:
    """Remove what is left of sockets named `prefix`-..., and have hivemind name them so from now on, in this process
    and those it forks. The caller makes sure that nobody alive has that prefix. Too long a path is left to hivemind."""
    from hivemind.p2p import P2P

    if len(os.fsencode(prefix)) + len(_LONGEST_NAME) <= MAX_SOCKET_PATH_BYTES:
        sweep_sockets(prefix)
        P2P._UNIX_SOCKET_PREFIX = f"/unix{prefix.resolve()}-"


def sweep_sockets(prefix: Path) -> None:
    """Remove the sockets that `place_sockets` had placed, once the processes behind them are dead."""
    for path in prefix.parent.glob(f"{prefix.name}-p2p*.sock"):
        with contextlib.suppress(OSError):
            path.unlink()
