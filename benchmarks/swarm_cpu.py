"""Where CPU seconds go: by thread of this process, and by process of its children. Linux only (/proc)."""

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(kw_only=True)
class CpuMeter:
    """`read` gives running totals in CPU seconds since the process began; take differences."""

    num_samples: int = 0
    _spans: Counter[str] = field(default_factory=Counter)

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count wall and CPU seconds of the calling thread under `name`."""
        wall, cpu = time.monotonic(), time.thread_time()
        try:
            yield
        finally:
            self._spans[f"{name}_wall"] += time.monotonic() - wall  # type: ignore[assignment]
            self._spans[f"{name}_cpu"] += time.thread_time() - cpu  # type: ignore[assignment]

    def read(self) -> dict[str, float]:
        """`num_samples`, `<span>_wall`, `<span>_cpu`, `thread <name>` and `child <what it runs>`."""
        totals: Counter[str] = Counter()
        for label, seconds in _threads_of_this_process():
            totals[label] += seconds  # type: ignore[assignment]
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(OSError):  # it may end between the listing and the reading
                totals[f"child {_label(pid)}"] += _seconds(Path(f"/proc/{pid}/stat"))  # type: ignore[assignment]
        return {"num_samples": self.num_samples, **self._spans, **totals}


def _threads_of_this_process() -> Iterator[tuple[str, float]]:
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    for entry in Path("/proc/self/task").iterdir():
        name = names.get(int(entry.name), "native")
        with contextlib.suppress(OSError):
            yield f"thread {name.split('_')[0].split('-')[0]}", _seconds(entry / "stat")


def _seconds(stat: Path) -> float:
    """User and system time of one process or thread (proc(5), fields 14 and 15)."""
    after_name = stat.read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / _TICKS_PER_SECOND


def _label(pid: int) -> str:
    """p2pd by its name. hivemind's processes are forks of ours and have its name: parents are told from p2pd's."""
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    if name == "p2pd":
        return name
    return "dht" if any(Path(f"/proc/{c}/comm").read_text().strip() == "p2pd" for c in _children(pid)) else "averager"


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _descendants(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for child in _children(pid):
            found += [child, *_descendants(child)]
    return found
