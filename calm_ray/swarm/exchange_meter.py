"""How fast our line takes what we send, measured while averaging: what others have confirmed, second by second. Pure.

The best full second is a lower bound of the line's rate, and near it once a round is long enough to fill the line.
Means over a round are not: a fast peer waits most of the time for slow ones.
"""

from collections import deque

BIN_SECONDS = 1.0
MAX_BINS = 600
NUM_ROUNDS = 10
"""A line that has become slower is believed to be so after this many rounds."""


class RateMeter:
    """Of one peer, all streams together."""

    def __init__(self) -> None:
        self._bins: dict[int, int] = {}
        self._peaks: deque[float] = deque(maxlen=NUM_ROUNDS)

    def note(self, num_bytes: int, *, now: float) -> None:
        """`num_bytes` have arrived at their reader; `now` on any steady clock, in seconds."""
        number = int(now / BIN_SECONDS)
        if number in self._bins or len(self._bins) < MAX_BINS:
            self._bins[number] = self._bins.get(number, 0) + num_bytes

    def end_round(self) -> None:
        """Keep the round's best second. The first and last are not whole ones; too short a round says nothing."""
        whole = sorted(self._bins)[1:-1]
        if whole:
            self._peaks.append(max(self._bins[number] for number in whole) / BIN_SECONDS)
        self._bins.clear()

    @property
    def bytes_per_second(self) -> float | None:
        """The best second of the last rounds; None until one was long enough."""
        return max(self._peaks, default=None)
