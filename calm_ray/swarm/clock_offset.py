"""How far our clock is from the swarm's: hivemind drops records of those who differ by over three seconds.

The desk tells its time by RPC (`Desk.rpc_time`); half the round trip bounds the error, as in Cristian's algorithm, and
the quickest of a few answers counts. Each answer is a stranger's: it is bounded, rubbish is dropped, and the median
of several desks is taken, so that one liar among three moves nothing. NTP was rejected: many networks that volunteers
sit in block it, and what counts is the swarm's clock, right or wrong.

Light: hivemind is imported only when desks are asked.
"""

import asyncio
import logging
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hivemind.p2p import P2P

logger = logging.getLogger(__name__)

MAX_OFFSET_SECONDS = 3.0
"""hivemind's MAX_DHT_TIME_DISCREPANCY_SECONDS: beyond it, others drop our records and we theirs."""
MAX_DESKS = 5
NUM_ASKS = 3
"""Of each desk. The first may have to open the connection, and says little."""
ASK_TIMEOUT_SECONDS = 5.0
AGREEMENT_SECONDS = 1.0
_UNIX_SECONDS = re.compile(r"\d{9,10}(\.\d{1,9})?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class ClockReading:
    """One answer of one desk."""

    offset_seconds: float
    """Our clock minus theirs: positive if ours is ahead."""
    error_seconds: float
    """Half the round trip."""


@dataclass(frozen=True, kw_only=True)
class ClockOffset:
    """What several desks say together."""

    offset_seconds: float
    """Median of our clock minus theirs: positive if ours is ahead."""
    error_seconds: float
    """Of the reading, or of the worse of the two, that the median is made of."""
    num_desks: int
    num_agreeing: int
    """Desks whose reading lies within AGREEMENT_SECONDS, and the errors, of the median."""

    @property
    def is_agreed(self) -> bool:
        """Whether most desks agree. If not, nobody knows whose clock is wrong."""
        return 2 * self.num_agreeing > self.num_desks

    def exceeds(self, seconds: float) -> bool:
        """Whether we differ by more than that for certain, whatever the error."""
        return abs(self.offset_seconds) - self.error_seconds > seconds


async def ask_clocks(p2p: "P2P", desks: Sequence[str], *, run_id: str) -> ClockOffset | None:
    """Ask the desks of these peers (base58) for their time, all at once; None if none of them gives one.

    Takes NUM_ASKS * ASK_TIMEOUT_SECONDS at most. Raises nothing that a desk can cause.
    """
    from google.protobuf.message import DecodeError
    from google.protobuf.wrappers_pb2 import StringValue
    from hivemind.p2p import PeerID
    from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError

    from calm_ray.swarm.desk import Desk

    async def reading(desk: str) -> ClockReading | None:
        async def ask() -> str:
            reply = await stub.rpc_time(StringValue(), timeout=ASK_TIMEOUT_SECONDS)
            return str(reply.value)

        try:
            stub = Desk.get_stub(p2p, PeerID.from_base58(desk), namespace=run_id)
            return await read_clock(ask)
        except (P2PDaemonError, P2PHandlerError, DecodeError, TimeoutError, OSError, ValueError) as exc:
            logger.debug("clock desk=%s problem=%r", desk, exc)
            return None

    readings = await asyncio.gather(*map(reading, list(dict.fromkeys(desks))[:MAX_DESKS]))
    return combine([found for found in readings if found is not None])


async def read_clock(ask: Callable[[], Awaitable[str]]) -> ClockReading:
    """Ask NUM_ASKS times; the answer that took least. Raises what `ask` raises, and ValueError for rubbish."""
    readings = []
    for _ in range(NUM_ASKS):
        ours, started = time.time(), time.monotonic()
        answer = await ask()
        half = (time.monotonic() - started) / 2
        readings.append(ClockReading(offset_seconds=ours + half - parse_time(answer), error_seconds=half))
    return min(readings, key=lambda found: found.error_seconds)


def parse_time(answer: str) -> float:
    """Unix seconds of a stranger's answer. Raises ValueError."""
    if not _UNIX_SECONDS.fullmatch(answer):
        raise ValueError(f"not a time: {answer[:20]!r}")
    return float(answer)


def combine(readings: Sequence[ClockReading]) -> ClockOffset | None:
    """The median of what each desk said, and how many desks are near it; None without readings. Pure."""
    if not readings:
        return None
    in_order = sorted(readings, key=lambda reading: reading.offset_seconds)
    middle = in_order[(len(in_order) - 1) // 2 : len(in_order) // 2 + 1]
    median = statistics.median(reading.offset_seconds for reading in middle)
    error = max(reading.error_seconds for reading in middle)
    near = [r for r in readings if abs(r.offset_seconds - median) <= AGREEMENT_SECONDS + error + r.error_seconds]
    return ClockOffset(
        offset_seconds=median, error_seconds=error, num_desks=len(readings), num_agreeing=len(near)
    )  # fmt: skip


def how_to_sync(*, platform: str, is_wsl: bool) -> str:
    """What a person does about a clock that is off. `platform`: `sys.platform`."""
    if platform == "darwin":
        return 'set it by the network: System Settings, "Date & Time", or run `sudo sntp -sS time.apple.com`'
    if is_wsl:
        return "set it by the computer's clock: run `sudo hwclock -s`, or `wsl --shutdown` in PowerShell and come back"
    return "set it by the network: run `sudo timedatectl set-ntp true`; for a container, on the machine that runs it"
