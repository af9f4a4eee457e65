"""What the operating system says of a peer's processes, and of what others have left.

A peer's processes are known by two marks that all its descendants inherit: the session that its child leads, and a word
in the environment with the folder's path.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

import psutil

MARK = "CALM_RAY_PEER_FOLDER"
"""Name of the environment variable. hivemind's DHT process and p2pd inherit it."""
TERM_SECONDS, KILL_SECONDS = 8.0, 2.0
"""For what an earlier watchdog left: a child that was told to leave may be on its way out."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_VMSTAT = Path("/proc/vmstat")


def members(session: int) -> list[psutil.Process]:
    """The living processes of a session, which `Popen(start_new_session=True)` began with that pid."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(pid) == session:
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found


def memory_of(session: int) -> int:
    """Bytes that the session's processes use; what they share by forking counts once, where the system can tell."""
    total = 0
    for process in members(session):
        with contextlib.suppress(psutil.Error, OSError):
            total += process.memory_full_info().pss if sys.platform == "linux" else process.memory_info().rss
    return total


def memory_limit() -> int:
    """Bytes of this machine, or of the container that we are in."""
    total = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(_CGROUP_LIMIT.read_text()))
    return total


def num_oom_kills() -> int:
    """How often the kernel has killed for want of memory since it booted; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in _VMSTAT.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def leftovers(folder: Path) -> list[psutil.Process]:
    """Processes that bear `folder`'s mark and do not descend from this one. The caller holds the folder's lock."""
    mark, own = str(folder.resolve()), {os.getpid()}
    with contextlib.suppress(psutil.Error):
        own |= {process.pid for process in psutil.Process().children(recursive=True)}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid not in own and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def sweep(folder: Path, *, term_seconds: float = TERM_SECONDS) -> list[str]:
    """End what an earlier crash left of this folder's peer, and nothing else; a word for each process."""
    told = []
    left = leftovers(folder)
    for process in left:
        with contextlib.suppress(psutil.Error):
            told.append(f"{process.name()} (pid {process.pid})")
            process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(left, timeout=term_seconds)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=KILL_SECONDS)
    return told


def marked(folder: Path) -> dict[str, str]:
    """The environment of a peer's child."""
    return {**os.environ, MARK: str(folder.resolve())}
