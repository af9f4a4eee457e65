"""Where the swarm is, as its peers' progress records say: hivemind's tracker, made frugal, and safe without full peers.

The records are hivemind's own (`{run_id}_progress`), so that any node of the DHT can read a run's progress.

Only full peers can hand their state to newcomers, so stock takes the epoch from them alone. While every trainer is a
client, stock lets each keep an epoch of its own and average gradients of unequal models, without a word. Here an epoch
ends only if some full peer holds the state (a trainer or an auxiliary peer), and clients' epochs count while no full
peer trains: a newcomer then learns that nobody can give it the state, rather than start another model.

Cost: each of N peers writes one record and reads all N of them some times per epoch. A record has about 1.2 kB with key
and signature, and three nodes answer a read with all of them: 3.6 kB N per read, N^2 for the swarm. With reports and
rosters that is 0.1, 0.3 and 0.6 MB of DHT traffic per peer and 5-second epoch at N = 4, 8 and 16 (`benchmarks.scale`).
The time between two reads grows with N to bound the rate: 0.03 N seconds make 120 kB/s for each peer from N = 17 on,
up to N = 667, whence 20 s keep it at 0.18 kB/s N (1.4 Mbit/s at 1,000). The three to five nodes nearest to the key
carry all of it: 1.2 kB N to each of N readers per pause is 40 kB/s N, a line of 100 Mbit/s at N = 300. More peers than
that need records on several keys.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from hivemind.optim.progress_tracker import GlobalTrainingProgress, LocalTrainingProgress
from hivemind.optim.progress_tracker import ProgressTracker as _ProgressTracker
from hivemind.p2p import PeerID
from hivemind.utils import get_dht_time

from calm_ray.swarm.node import NARROW_READ, NARROW_WRITE
from calm_ray.swarm.records import owner_of
from calm_ray.swarm.skew import Skews

MIN_REPORT_SECONDS, MAX_REPORT_SECONDS = 0.5, 5.0
REPORTS_PER_EPOCH = 8
"""Readers extrapolate by each peer's rate between reports. Stock writes one for each micro-batch, which costs more CPU
than averaging does: each is signed, stored on several nodes, and checked there."""
MIN_REPORTED_SHARE = 0.5
MIN_READ_SECONDS = 0.3
MAX_RECORDS = 4096
PAUSE_SECONDS_PER_PEER, MAX_PAUSE_SECONDS = 0.03, 20.0
"""Bound on the N^2 term: with N records, wait at least N times this long between two reads, and between two writes, but
renew a record before others forget it."""
LIVE_SECONDS = 15.0
"""A trainer whose last record is older than this, and than three pauses, is not waited for. Records come with
micro-batches."""


def _by_peer(entries: Mapping[Any, Any]) -> dict[str, LocalTrainingProgress]:
    """Records by the peer they speak of. One that this peer signed itself wins; a bare peer signs with another key."""
    found: dict[str, LocalTrainingProgress] = {}
    own: set[str] = set()
    for subkey, entry in entries.items():
        if entry.value is None:
            continue
        record = LocalTrainingProgress.parse_obj(entry.value)
        peer_id = PeerID(record.peer_id).to_base58()
        with contextlib.suppress(ValueError):
            if owner_of(subkey) == peer_id:
                own.add(peer_id)
                found[peer_id] = record
        if peer_id not in own:
            found[peer_id] = record
    return found


class _NarrowReads:
    """A DHT for hivemind's tracker, which would ask twenty nodes for all records, again and again."""

    def __init__(self, dht: Any) -> None:
        self._dht = dht

    def get(self, key: str, **kwargs: Any) -> Any:
        return self._dht.get(key, **NARROW_READ, **kwargs)

    def store(self, key: str, **kwargs: Any) -> Any:
        return self._dht.store(key=key, **NARROW_WRITE, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dht, name)


class ProgressTracker(_ProgressTracker):
    """`records`: peer id -> its last progress record, ourselves included. `began_at`: DHT time of our last step."""

    local_progress: LocalTrainingProgress
    global_progress: GlobalTrainingProgress

    def __init__(self, dht: Any, *args: Any, has_holders: Callable[[], bool] = lambda: False, **kwargs: Any) -> None:
        self._has_holders = has_holders
        self._last_write, self.began_at = 0.0, get_dht_time()
        self._report_seconds = MIN_REPORT_SECONDS
        self._disbelieved, self._disbelieved_until = 0, 0.0
        self._skews, self._parsed_at = Skews(), time.monotonic()
        self.records: Mapping[str, LocalTrainingProgress] = {}
        super().__init__(_NarrowReads(dht), *args, **kwargs)

    @property
    def pause_seconds(self) -> float:
        """The least time between two reads or writes in a swarm of this size."""
        return min(PAUSE_SECONDS_PER_PEER * len(self.records), MAX_PAUSE_SECONDS)

    @property
    def live_seconds(self) -> float:
        """How old the last record of a live trainer can be."""
        return max(LIVE_SECONDS, 3 * self.pause_seconds)

    @property
    def awaits_full_peer(self) -> bool:
        """Whether we are a client, and nobody holds the state that clients step with."""
        return (
            self.client_mode
            and self.global_progress.num_clients >= self.global_progress.num_peers
            and not self._has_holders()
        )

    @property
    def is_epoch_full(self) -> bool:
        """Whether the swarm has, by its records and rates, the samples of an epoch.

        Rates alone do not fill one: trainers that have just left would otherwise go on in our extrapolation.
        """
        is_foreseen = get_dht_time() >= self.global_progress.eta_next_epoch and self.share_done >= MIN_REPORTED_SHARE
        return (self.share_done >= 1 or is_foreseen) and not self.awaits_full_peer

    def is_nearly_full(self, seconds: float) -> bool:
        """Whether, at the present rates, the epoch will be full in less than `seconds`."""
        return seconds > 0 and float(self.global_progress.eta_next_epoch) - get_dht_time() < seconds

    @property
    def share_done(self) -> float:
        """How much of the epoch's samples the swarm has, by its records alone: 0 to 1 and more."""
        return float(self.global_progress.samples_accumulated / self.target_batch_size)

    def note_samples(self, number: int) -> None:
        """Count towards our rate. For the computing thread, after each micro-batch."""
        if number > 0:
            self.performance_ema.update(number)

    def report(self, *, epoch: int, samples_accumulated: int) -> None:
        """Say where we are; written to the DHT at once if the epoch is new, else seldom."""
        extra = samples_accumulated - self.local_progress.samples_accumulated
        is_new_epoch = epoch != self.local_progress.epoch
        if not is_new_epoch and epoch == self.global_progress.epoch:
            self.global_progress.samples_accumulated += extra
        self.local_progress = self._get_local_progress(epoch, samples_accumulated)
        now = time.monotonic()
        if is_new_epoch or now >= self._last_write + max(self._report_seconds, self.pause_seconds):
            self._last_write = now
            self.should_report_progress.set()

    def renew(self) -> None:
        """We are alive, in a round: say so, with what we said last."""
        self.local_progress = self.local_progress.copy(update={"time": get_dht_time()})
        self.should_report_progress.set()

    def begin_epoch(self, epoch: int, *, samples_accumulated: int = 0) -> None:
        """We have stepped, or loaded a state: count towards `epoch` from now on."""
        now = get_dht_time()
        last_seconds, self.began_at = max(0.0, now - self.began_at), now
        self._report_seconds = min(max(last_seconds / REPORTS_PER_EPOCH, MIN_REPORT_SECONDS), MAX_REPORT_SECONDS)
        self.min_refresh_period = min(max(last_seconds / REPORTS_PER_EPOCH, MIN_READ_SECONDS), self.max_refresh_period)
        with self.lock_global_progress:
            if epoch > self.global_progress.epoch:
                self.global_progress.epoch = epoch
                self.global_progress.samples_accumulated = 0
                self.global_progress.eta_next_epoch = float("inf")
                self.global_progress.next_fetch_time = get_dht_time() + self.min_refresh_period
            self.report(epoch=epoch, samples_accumulated=samples_accumulated)
            self.fetched_global_progress_this_epoch.clear()

    def disbelieve(self, epoch: int, *, seconds: float) -> None:
        """Read nothing of `epoch` and later for so long, because nobody could show it.

        Samples count for the newest epoch only, so one false record would keep everybody's epoch from its end.
        """
        self._disbelieved, self._disbelieved_until = epoch, get_dht_time() + seconds
        self.global_progress = replace(
            self.global_progress, epoch=self.local_progress.epoch, eta_next_epoch=float("inf"),
            samples_accumulated=self.local_progress.samples_accumulated, next_fetch_time=get_dht_time(),
        )  # fmt: skip
        self.global_state_updated.set()  # read anew, now

    def _on_our_clock(self, subkey: Any, entry: Any, *, read_seconds: float) -> Any:
        if entry.value is None:
            return entry
        written_at = self._skews.on_our_clock(
            str(subkey), entry.value["time"], now=get_dht_time(), read_seconds=read_seconds
        )
        return replace(entry, value={**entry.value, "time": written_at})

    def _parse_swarm_progress_data(self, metadata: Any) -> GlobalTrainingProgress:
        entries = dict(list(metadata.items())[:MAX_RECORDS]) if isinstance(metadata, Mapping) else {}
        now = time.monotonic()
        read_seconds, self._parsed_at = now - self._parsed_at, now
        entries = {key: self._on_our_clock(key, entry, read_seconds=read_seconds) for key, entry in entries.items()}
        present = [entry.value for entry in entries.values() if entry.value is not None]
        self.records = _by_peer(entries)
        if get_dht_time() < self._disbelieved_until:  # whoever wrote it is there all the same
            entries = {k: e for k, e in entries.items() if not e.value or e.value["epoch"] < self._disbelieved}
            present = [entry.value for entry in entries.values() if entry.value is not None]
        if not present or not all(value["client_mode"] for value in present):
            progress = super()._parse_swarm_progress_data(entries)
        else:
            as_full = {
                subkey: replace(entry, value=entry.value and {**entry.value, "client_mode": False})
                for subkey, entry in entries.items()
            }
            progress = replace(super()._parse_swarm_progress_data(as_full), num_clients=len(present))
        next_read = max(progress.next_fetch_time, get_dht_time() + self.pause_seconds)
        return replace(progress, next_fetch_time=next_read)
