"""Leave nothing behind: processes that hivemind forks must die with the process that forked them.

hivemind forks a DHT process and one per averager; p2pd hangs below the DHT's. After SIGKILL or `os._exit` of their
owner stock hivemind leaves them running, holding ports and pipes (`tests/integration/test_hygiene.py` shows it).
"""

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1
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
    libc = ctypes.CDLL(None, use_errno=True)  # resolved before the fork: no imports or locks in the child

    def in_child() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's own handler would swallow it
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == 1:  # the parent died between fork and prctl
            os._exit(0)

    os.register_at_fork(after_in_child=in_child)
    _installed = True
