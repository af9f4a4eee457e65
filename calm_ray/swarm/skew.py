"""Other peers' times on our own clock: one of the two may be off by minutes, and the swarm must not come apart over it.

What a record's time is for is its age: who has not written for a while is not waited for. The least lag between a
peer's time and our first sight of it, over its last few records, is the difference of both clocks, and what the DHT
takes. A record from the future has no other explanation; an old one may have been read late. So what the reader could
explain by its own pauses is left alone.
"""

from collections import deque

AHEAD_SECONDS = 2.5
"""hivemind tolerates 3."""
BEHIND_SECONDS = 8.0
"""With the longest time between two records of a live peer, 5 s, still younger than one that is taken for dead."""
NUM_LAGS = 3
"""A clock that is set back is followed after so many records; one that is set forward, at once."""
MAX_PEERS = 4096


class Skews:
    """For one reader of records."""

    def __init__(self) -> None:
        self._lags: dict[str, deque[float]] = {}
        self._last: dict[str, float] = {}

    def on_our_clock(self, peer_id: str, time: float, *, now: float, read_seconds: float = 0.0) -> float:
        """When `peer_id` wrote what it says it wrote at `time`. `now`: our clock as we read it; `read_seconds`: between
        two of our readings."""
        if self._last.get(peer_id) != time:
            if peer_id not in self._lags and len(self._lags) >= MAX_PEERS:
                self._lags.clear()
                self._last.clear()
            self._last[peer_id] = time
            self._lags.setdefault(peer_id, deque(maxlen=NUM_LAGS)).append(now - time)
        lag = min(self._lags[peer_id])
        return time if -AHEAD_SECONDS <= lag <= max(BEHIND_SECONDS, 2 * read_seconds) else time + lag
