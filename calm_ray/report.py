"""What one peer tells the swarm about itself, as bytes. Pure: no I/O, no clock.

A report is a claim by a stranger. The DHT proves *who* made it, never that it is true. Here its shape is checked, every
field within bounds; what can be believed of all reports together is in `summary.py`.
"""

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

MAX_REPORT_BYTES = 2816
"""Of the encoded report. A call to hivemind's DHT process goes through a pipe, pickled, with 1.2 kB of keys around the
report. Above PIPE_BUF (4096 bytes) the reader can find half a message, and what follows is rubbish to it: measured with
4500 bytes, after 5000 messages of one writer, after 10 of three processes."""
MAX_REPORTS = 4096
"""Peers of a swarm, as far as reports go. Bounds the work that strangers can cause."""
MAX_LISTED = 64
"""Members whose weights a report lists."""

Role = Literal["trainer", "auxiliary", "monitor"]
State = Literal["starting", "joining", "training", "averaging", "assisting", "watching", "waiting", "leaving"]
Reason = Literal[
    "over-limit", "oversized", "malformed", "non-finite", "stale", "from-the-future", "wrong-config", "wrong-owner",
    "duplicate-peer", "epoch-out-of-reach", "impossible-rate", "zero-mini-steps", "absurd-loss",
]  # fmt: skip
Outcome = Literal["averaged", "partial", "alone", "only_clients", "timeout", "non_finite", "zero_weight", "failed"]
"""How a round ended, as `swarm/verdict.py` says it. Only `averaged` is a true round of several peers."""
ROLES: tuple[Role, ...] = get_args(Role)
IN_STEP_STATES: frozenset[State] = frozenset({"training", "averaging", "assisting"})
"""States in which a peer holds the swarm's state, so its epoch says where the swarm is."""

MAX_COUNT = 1_000_000_000
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PeerSuffix = Annotated[str, Field(pattern=r"^[1-9A-HJ-NP-Za-km-z]{1,10}$")]
"""The last 10 characters of a peer id: all peer ids begin alike."""
Samples = Annotated[float, Field(ge=0, le=1_000_000), AfterValidator(lambda samples: round(samples, 1))]
"""A weight. Rounded, as 64 floats of 17 digits are too long for a report."""
_REASON_OF_FIELD: Mapping[str, Reason] = {
    "epoch": "epoch-out-of-reach",
    "samples_per_second": "impossible-rate",
    "mini_steps": "zero-mini-steps",
    "mlm_loss_sum": "absurd-loss",
    "sop_loss_sum": "absurd-loss",
}


class ReportRejected(ValueError):
    """These bytes are no report. `reason` is counted, `str()` has one short line of detail."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}"[:200])
        self.reason: Reason = reason


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class EpochRecord(_Record):
    """A peer's share of the last epoch that it completed."""

    epoch: Count
    """The local_epoch in which the samples were accumulated, so less than the report's `epoch`."""
    mini_steps: int = Field(ge=1, le=10_000_000)
    num_samples: Count
    mlm_loss_sum: float = Field(ge=0, le=1e9)
    """Sum over mini_steps of the mean masked-LM loss."""
    sop_loss_sum: float = Field(ge=0, le=1e9)
    """Sum over mini_steps of the mean sentence-order loss."""

    @property
    def mlm_mean_loss(self) -> float:
        return self.mlm_loss_sum / self.mini_steps

    @property
    def sop_mean_loss(self) -> float:
        return self.sop_loss_sum / self.mini_steps


class RoundCounts(_Record):
    """Gradient rounds by how they ended, as one peer saw them."""

    averaged: Count = 0
    """All that was promised arrived and was sane."""
    partial: Count = 0
    """Parts of the average never came, or too few senders were left."""
    alone: Count = 0
    """Nobody else was there, or came."""
    only_clients: Count = 0
    """Others came, but nobody whom others can call, so nobody could average."""
    timeout: Count = 0
    non_finite: Count = 0
    """Somebody's values, or the average, were NaN or infinite."""
    zero_weight: Count = 0
    """Nobody brought a sample."""
    failed: Count = 0
    """For any other reason; the peer's log has it."""


class RoundReport(_Record):
    """One peer's last gradient round. What others say of a peer's weight is what later pays for it."""

    epoch: Count
    outcome: Outcome
    digest: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    """SHA-256 of the average, the same for all members of a true round; empty if there was none, or on stock's wire."""
    group_size: int = Field(default=0, ge=0, le=MAX_REPORTS)
    total_weight: Annotated[float, Field(ge=0, le=1e9), AfterValidator(lambda samples: round(samples, 1))] = 0.0
    weights: dict[PeerSuffix, Samples] = Field(default_factory=dict, max_length=MAX_LISTED)
    """Samples by sender, as the reporter received them or its reducers told it."""
    num_banned: int = Field(default=0, ge=0, le=MAX_REPORTS)
    """Members whose contribution was not, or not wholly, counted."""
    seconds: Annotated[float, Field(ge=0, le=1e6), AfterValidator(lambda seconds: round(seconds, 3))] = 0.0
    """From the group's beginning to the last byte."""
    bytes_sent: int = Field(default=0, ge=0, le=10**13)
    bytes_received: int = Field(default=0, ge=0, le=10**13)


class PeerReport(_Record):
    """What one peer publishes. Every field is bounded, so that decoding is the whole check of its shape."""

    peer_id: str = Field(pattern=r"^[1-9A-HJ-NP-Za-km-z]{1,64}$")
    boot_id: str = Field(pattern=r"^[0-9A-Za-z-]{1,36}$")
    """Drawn anew at each start: tells a restarted peer's counters from those before."""
    role: Role
    name: str = Field(default="", max_length=32, pattern=r"^[\w .@-]*$")
    version: str = Field(pattern=r"^[0-9A-Za-z.+-]{1,32}$")
    config_hash: str = Field(pattern=r"^[0-9a-f]{1,64}$")
    state: State
    is_client_mode: bool
    epoch: Count
    """Current local_epoch."""
    samples_accumulated: Count = 0
    """Towards this epoch."""
    samples_per_second: float = Field(default=0.0, ge=0, le=1e6)
    samples_contributed: int = Field(default=0, ge=0, le=10**15)
    """Since boot, in rounds that averaged."""
    last_epoch: EpochRecord | None = None
    rounds: RoundCounts = RoundCounts()
    """Since boot."""
    last_round: RoundReport | None = None
    num_resyncs: Count = 0
    """Times since boot that the whole state was downloaded anew, after the first."""
    parameter_norm: float | None = Field(default=None, ge=0, le=1e30)
    """L2 norm of all parameters."""
    last_group_size: int = Field(default=0, ge=0, le=MAX_REPORTS)
    published_at: float = Field(ge=0, le=1e11)


def encode(report: PeerReport) -> bytes:
    """JSON in UTF-8, at most MAX_REPORT_BYTES: the field bounds see to that."""
    data = json.dumps(
        report.model_dump(mode="json"), ensure_ascii=False, separators=(",", ":"), allow_nan=False
    ).encode()
    assert len(data) <= MAX_REPORT_BYTES, f"a report of {len(data)} bytes: a field's bound is too wide"
    return data


def decode(data: bytes) -> PeerReport:
    """Parse a stranger's bytes. Raises ReportRejected (a ValueError) whatever they hold."""
    if len(data) > MAX_REPORT_BYTES:
        raise ReportRejected("oversized", f"{len(data)} bytes, at most {MAX_REPORT_BYTES}")
    try:
        document = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_finite,
            parse_float=_finite,
        )
        return PeerReport.model_validate(document, strict=True)
    except ReportRejected:
        raise
    except ValidationError as exc:
        raise _rejection_of(exc) from None
    except (ValueError, RecursionError) as exc:
        raise ReportRejected("malformed", f"not JSON: {type(exc).__name__}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ReportRejected("malformed", "a key is there twice")
    return values


def _finite(text: str) -> float:
    value = float(text)  # 1e999 is valid JSON and reads as infinity
    if not math.isfinite(value):
        raise ReportRejected("non-finite", "a number is NaN or infinite")
    return value


def _rejection_of(exc: ValidationError) -> ReportRejected:
    first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
    is_out_of_range = first["type"].startswith(("greater_than", "less_than"))
    field = str(first["loc"][-1]) if first["loc"] else "report"
    reason = _REASON_OF_FIELD.get(field, "malformed") if is_out_of_range else "malformed"
    # A stranger chose the field's name: repr keeps line breaks and control characters out of our log.
    return ReportRejected(reason, f"{field[:40]!r}: {first['msg']}")
