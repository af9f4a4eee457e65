"""What the operating system says of a peer's processes, and of what others have left.

A peer's processes are known by two marks that all its descendants inherit: the session that its child leads, and a word
in the environment with the folder's path.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

MARK = "CALM_RAY_PEER_FOLDER"
"""Name of the environment variable. hivemind's DHT process and p2pd inherit it."""
TERM_SECONDS, KILL_SECONDS = 8.0, 2.0
"""For what an earlier watchdog left: a child that was told to leave may be on its way out."""
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


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes of this machine, or of the container that we are in."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in control_groups(root))])


def control_groups(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """(limit, what is left of it) of our control group and those above it, version 2 or 1. Cache counts as left."""
    with contextlib.suppress(OSError, ValueError):
        lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        for _, controllers, path in lines:
            if controllers not in ("", "memory"):
                continue
            top = root / "sys/fs/cgroup" / controllers
            names = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                if controllers
                else ("memory.max", "memory.current", "inactive_file")
            )
            own = top / path.strip("/")  # inside a container this may be the host's path, and not be there
            for folder in (own, *own.parents):
                if folder.is_relative_to(top):
                    with contextlib.suppress(OSError, ValueError):
                        yield _limit_and_left(folder, *names)


def _limit_and_left(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> tuple[int, int]:
    limit = int((folder / limit_name).read_text())  # "max" is no limit: ValueError
    usage = int((folder / usage_name).read_text())
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return limit, max(0, limit - usage + int(stat.get(cache_name, 0)))


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
    # glibc gives each of its many threads an arena of its own, and keeps what each has ever needed: of tens of
    # megabytes an hour that a peer grew by, none was Python's.
    return {"MALLOC_ARENA_MAX": "2", **os.environ, MARK: str(folder.resolve())}
