"""Look at every peer of a swarm twice a second and remember: what each was doing, what it computed, which rounds came.

One thread. What it looks at is a rig's: `look()` gives a sighting of each peer, of ours by its control socket, of bare
hivemind's by its journal.
"""

import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.fault_account import TRAINING, Round, Span, spans_of

LOOK_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class RoundSeen:
    """One peer says that this round gave it an average."""

    key: str
    """The same for all who hold the same average."""
    epoch: int
    samples: Mapping[str, float]
    """By trainer, as far as this peer knows."""


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """One look at one peer."""

    name: str
    phase: str
    is_at_work: bool
    boot: str = ""
    """Of its process; another one after a restart."""
    epoch: int = -1
    computed: Mapping[int, int] = field(default_factory=dict)
    """Epoch -> samples that this boot says it has computed for it, so far."""
    round: RoundSeen | None = None
    norm: float | None = None
    last_success: float = 0.0
    words: str = ""


class Watch:
    """`start()` and `stop()`; everything else may be read from any thread."""

    def __init__(
        self, look: Callable[[], Sequence[Sighting]], *, is_true: Callable[[int], bool],
        look_seconds: float = LOOK_SECONDS,
    ) -> None:  # fmt: skip
        """`is_true`: whether so many witnesses make a round true."""
        self._look, self._is_true, self._look_seconds = look, is_true, look_seconds
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._now: dict[str, Sighting] = {}
        self._changes: dict[str, list[tuple[float, str]]] = {}
        self._computed: dict[tuple[str, str, int], int] = {}
        self._rounds: dict[str, tuple[float, int, dict[str, float], set[str]]] = {}
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30.0)

    def _run(self) -> None:
        while not self._stop.wait(self._look_seconds):
            try:
                seen, at = self._look(), time.monotonic()
            except Exception:  # noqa: BLE001  a peer that is dying may answer anything
                traceback.print_exc()  # into the benchmark's output: one look is lost, not the run
                continue
            with self._lock:
                for sighting in seen:
                    self._note(sighting, at)

    def _note(self, sighting: Sighting, at: float) -> None:
        name = sighting.name
        self._now[name] = sighting
        told = self._changes.setdefault(name, [])
        if not told or told[-1][1] != sighting.phase:
            told.append((at, sighting.phase))
        for epoch, number in sighting.computed.items():
            place = (name, sighting.boot, epoch)
            self._computed[place] = max(number, self._computed.get(place, 0))
        if (seen := sighting.round) is not None:
            _, _, samples, members = self._rounds.setdefault(seen.key, (at, seen.epoch, {}, set()))
            samples.update(seen.samples)
            members.add(name)

    def now(self, name: str) -> Sighting | None:
        with self._lock:
            return self._now.get(name)

    def everyone(self) -> dict[str, Sighting]:
        with self._lock:
            return dict(self._now)

    def rounds(self) -> list[Round]:
        """The true ones, in the order in which they came."""
        with self._lock:
            found = [
                Round(at=at, epoch=epoch, samples=dict(samples), members=frozenset(members))
                for at, epoch, samples, members in self._rounds.values()
                if self._is_true(len(members))
            ]
        return sorted(found, key=lambda r: r.at)

    def spans(self, names: Sequence[str], *, end: float) -> list[Span]:
        with self._lock:
            return spans_of({name: tuple(self._changes.get(name, ())) for name in names}, end=end)

    def computed(self, names: Sequence[str], *, first: int, last: int) -> float:
        """Samples that these said they computed for the epochs from `first` to `last`, in whatever boot."""
        with self._lock:
            known = [(name, epoch, number) for (name, _, epoch), number in self._computed.items()]
        return float(sum(number for name, epoch, number in known if name in names and first <= epoch <= last))

    def epoch(self) -> int:
        """Of whoever is furthest."""
        return max((s.epoch for s in self.everyone().values()), default=-1)

    def at_work(self, names: Sequence[str]) -> bool:
        seen = self.everyone()
        return all(name in seen and seen[name].is_at_work for name in names)


def words_of(seen: Mapping[str, Sighting]) -> str:
    """Who is not at work, in one line."""
    return ", ".join(f"{name} {s.phase}" for name, s in sorted(seen.items()) if not s.is_at_work) or f"all {TRAINING}"
