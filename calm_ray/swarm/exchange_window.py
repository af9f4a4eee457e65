"""How much of what we send may be on its way: enough to fill the line, and not so much that everything waits. Pure.

A libp2p stream takes 256 kB and more before it makes the sender wait, and TCP's own buffer takes megabytes. What waits
there delays what comes after it on the same connection, also the permission for the other side to go on sending: when a
line is full in one direction the other starves, and the round takes a quarter longer. So the receiver confirms every
part, and the sender keeps a short queue, as LEDBAT does (RFC 6817, section 2.4.2). Like LEDBAT it looks at the way
there only: seen by the round trip, a full line in one direction would slow down the other.
"""

import math
from collections import deque

TARGET_SECONDS = 0.06
"""Of waiting on the way, beyond what the quickest part met. LEDBAT's upper bound is 0.1; see `benchmarks.averaging`."""
MIN_PARTS, MAX_PARTS = 2, 64
"""Bounds of a stream's window: one part being read while the next is on its way; 4 MiB."""


class Window:
    """Of one direction of one stream. Parts are confirmed in the order in which they were sent."""

    def __init__(self) -> None:
        self._sent_at: deque[float] = deque()
        self._limit = float(MIN_PARTS)
        self._quickest = float("inf")

    @property
    def has_room(self) -> bool:
        return len(self._sent_at) < int(self._limit)

    def on_sent(self, now: float) -> None:
        self._sent_at.append(now)

    def on_confirmed(self, arrived_at: float) -> bool:
        """A part is there, since `arrived_at` by the receiver's clock, which may be set to anything.

        False if nothing was on its way, or that is no time: then the peer makes things up.
        """
        if not self._sent_at or not math.isfinite(arrived_at):
            return False
        seconds = arrived_at - self._sent_at.popleft()
        self._quickest = min(self._quickest, seconds)
        waited = seconds - self._quickest
        # One part more for each window that came through at once, one less for each that waited twice the target.
        self._limit += max(-1.0, (TARGET_SECONDS - waited) / TARGET_SECONDS) / self._limit
        self._limit = min(max(self._limit, MIN_PARTS), MAX_PARTS)
        return True
