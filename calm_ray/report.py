"""What one peer tells the swarm about itself, and what can be believed of all reports together. Pure: no I/O, no clock.

A report is a claim by a stranger. The DHT proves *who* made it, never that it is true: hivemind's own tracker takes an
epoch of 1e6 at its word. So lies are dropped and counted by reason, and of what remains no single
peer moves an aggregate beyond the bounds in `SummaryLimits`. Those compare with medians and need three peers at least:
of two that contradict each other, nobody can say from outside which one lies.
Rejected: plain sums and maxima, as in hivemind's examples, where one volunteer crashes or captures the monitor.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_REPORT_BYTES = 2048
"""Of the encoded report. The DHT's pipe breaks somewhere above 8 kB."""
MAX_REPORTS = 4096
"""Reports read in one summary; more are counted as `over-limit`. Bounds the work that strangers can cause."""
MIN_WITNESSES = 3
"""With fewer, a median can itself be the lie."""
MIN_RATE = 1e-6
"""Samples per second below which no time of arrival is given."""

Role = Literal["trainer", "auxiliary", "monitor"]
State = Literal["starting", "joining", "training", "averaging", "assisting", "watching", "waiting", "leaving"]
Reason = Literal[
    "over-limit", "oversized", "malformed", "non-finite", "stale", "from-the-future", "wrong-config", "wrong-owner",
    "duplicate-peer", "epoch-out-of-reach", "impossible-rate", "zero-mini-steps", "absurd-loss",
]  # fmt: skip
ROLES: tuple[Role, ...] = get_args(Role)
IN_STEP_STATES: frozenset[State] = frozenset({"training", "averaging", "assisting"})
"""States in which a peer holds the swarm's state, so its epoch says where the swarm is."""

MAX_COUNT = 1_000_000_000
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
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
    """Rounds since boot by outcome, as the peer itself saw them."""

    averaged: Count = 0
    partial: Count = 0
    alone: Count = 0
    failed: Count = 0


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


@dataclass(frozen=True, kw_only=True)
class SummaryLimits:
    """What this run is, and how far one report is believed."""

    config_hash: str
    num_epochs: int
    target_batch_size: int
    own_peer_ids: frozenset[str] = frozenset()
    """The organiser's peers: their epoch decides when there are too few witnesses, their rate is not clipped."""
    max_reports: int = MAX_REPORTS
    max_age_seconds: float = 120.0
    """Four times the default `report_seconds`: a peer that misses three reports is gone."""
    max_skew_seconds: float = 10.0
    """hivemind's DHT refuses clocks that are off by more than 3 s."""
    max_epoch_lead: int = 10
    """A peer may be this far ahead of the median: epochs that pass while another's report grows old."""
    max_samples_per_second: float = 20_000.0
    """Of one peer. An H100 does some hundreds on ALBERT-large; only toy models come near."""
    max_mean_loss: float = 30.0
    """Nats. A uniform guess over 250,000 tokens costs 12.4."""
    max_ratio_to_median: float = 50.0
    """One peer counts for at most so many median peers, in the rate and in the loss: about an H100 beside laptops."""
    max_loss_deviation: float = 2.0
    """A peer's mean loss is pulled to within so many nats of the median peer's."""


class EpochLoss(_Record):
    """Losses of one completed epoch: means over mini_steps of `num_peers` trainers."""

    epoch: int
    mlm_mean_loss: float
    sop_mean_loss: float
    num_peers: int
    mini_steps: int
    num_samples: int


class SwarmSummary(_Record):
    """The swarm as its believable reports show it at `at`. Travels as JSON from the monitor to whoever asks it."""

    at: float
    epoch: int
    num_epochs: int
    samples_accumulated: int
    """Towards `epoch`, each peer counted for at most `target_batch_size`."""
    target_batch_size: int
    samples_per_second: float
    seconds_to_next_epoch: float | None
    """Accumulation only, as if averaging took no time; None while nobody trains."""
    seconds_to_end: float | None
    loss: EpochLoss | None
    """Of the newest completed epoch that anybody reports."""
    rounds: RoundCounts
    """Summed over peers, so one round of a group of four counts four times; held to a count's bound."""
    peers: tuple[PeerReport, ...]
    """Believed reports: trainers first, those who contributed most on top."""
    drops: tuple[tuple[str, Reason], ...]
    """(owner's peer id, reason) of every report that is not believed."""

    @property
    def dropped(self) -> Mapping[Reason, int]:
        return Counter(reason for _, reason in self.drops)

    @property
    def peers_by_role(self) -> Mapping[Role, int]:
        counts = Counter(peer.role for peer in self.peers)
        return {role: counts[role] for role in ROLES}

    @property
    def num_client_mode(self) -> int:
        return sum(peer.is_client_mode for peer in self.peers)


def summarise(reports: Sequence[tuple[str, bytes]], *, now: float, limits: SummaryLimits) -> SwarmSummary:
    """Add up what can be believed of `reports`: pairs of (owner's peer id as the DHT's signature proves it, bytes).

    With three or more peers in step, what one liar can do is bounded: the epoch stays between honest peers' epochs, the
    rate grows by at most `max_ratio_to_median` median rates, a mean loss moves by at most twice `max_loss_deviation`,
    progress by one epoch.
    """
    believed, drops = _sift(reports, now=now, limits=limits)
    epoch = _swarm_epoch(believed, num_epochs=limits.num_epochs, own_peer_ids=limits.own_peer_ids)
    drops += [(r.peer_id, "epoch-out-of-reach") for r in believed if r.epoch > epoch + limits.max_epoch_lead]
    believed = [r for r in believed if r.epoch <= epoch + limits.max_epoch_lead]
    trainers = [r for r in believed if r.role == "trainer"]
    in_step = [r for r in trainers if r.state in IN_STEP_STATES]
    target = limits.target_batch_size
    accumulated = sum(min(r.samples_accumulated, target) for r in in_step if r.epoch == epoch)
    rate = _swarm_rate(in_step, limits=limits)
    missing = max(0, target - accumulated) if epoch < limits.num_epochs else 0
    missing_to_end = missing + target * max(0, limits.num_epochs - epoch - 1)
    return SwarmSummary(
        at=now,
        epoch=epoch,
        num_epochs=limits.num_epochs,
        samples_accumulated=accumulated,
        target_batch_size=target,
        samples_per_second=rate,
        seconds_to_next_epoch=_seconds_for(missing, rate=rate),
        seconds_to_end=_seconds_for(missing_to_end, rate=rate),
        loss=_newest_loss(trainers, epoch=epoch, limits=limits),
        rounds=_total_rounds(believed),
        peers=tuple(sorted(believed, key=lambda r: (ROLES.index(r.role), -r.samples_contributed, r.peer_id))),
        drops=tuple(drops),
    )


def _sift(
    reports: Sequence[tuple[str, bytes]], *, now: float, limits: SummaryLimits
) -> tuple[list[PeerReport], list[tuple[str, Reason]]]:
    believed: dict[str, PeerReport] = {}
    drops: list[tuple[str, Reason]] = [(owner, "over-limit") for owner, _ in reports[limits.max_reports :]]
    for owner, data in reports[: limits.max_reports]:
        try:
            report = decode(data)
        except ReportRejected as exc:
            drops.append((owner, exc.reason))
            continue
        reason = _disbelief(report, owner=owner, now=now, limits=limits)
        if reason is not None:
            drops.append((owner, reason))
            continue
        other = believed.get(owner)
        if other is not None:  # one owner, so which of its two we keep harms nobody else
            drops.append((owner, "duplicate-peer"))
        if other is None or report.published_at > other.published_at:
            believed[owner] = report
    return list(believed.values()), drops


def _disbelief(report: PeerReport, *, owner: str, now: float, limits: SummaryLimits) -> Reason | None:
    """Why this report is a lie taken by itself; None if it may be true."""
    last = report.last_epoch
    if report.peer_id != owner:
        return "wrong-owner"
    if report.config_hash != limits.config_hash:
        return "wrong-config"
    if report.published_at > now + limits.max_skew_seconds:
        return "from-the-future"
    if report.published_at < now - limits.max_age_seconds:
        return "stale"
    if report.epoch > limits.num_epochs or (last is not None and last.epoch >= report.epoch):
        return "epoch-out-of-reach"
    if report.samples_per_second > limits.max_samples_per_second:
        return "impossible-rate"
    if last is not None and max(last.mlm_mean_loss, last.sop_mean_loss) > limits.max_mean_loss:
        return "absurd-loss"
    return None


def _swarm_epoch(reports: Sequence[PeerReport], *, num_epochs: int, own_peer_ids: Collection[str]) -> int:
    """The lower median of the epochs of peers in step, those included that have finished the run and wait.

    Own peers decide only among too few witnesses: an own peer that was cut off would otherwise hold the swarm back.
    """
    peers = [r for r in reports if r.role != "monitor"]
    in_step = [r for r in peers if r.state in IN_STEP_STATES or r.epoch == num_epochs]
    own = [r for r in in_step if r.peer_id in own_peer_ids]
    voters = own if own and len(in_step) < MIN_WITNESSES else (in_step or peers)
    return median_low(r.epoch for r in voters) if voters else 0


def _swarm_rate(in_step: Sequence[PeerReport], *, limits: SummaryLimits) -> float:
    rates = [r.samples_per_second for r in in_step if r.samples_per_second > 0]
    cap = limits.max_ratio_to_median * median_low(rates) if len(rates) >= MIN_WITNESSES else math.inf
    return math.fsum(
        r.samples_per_second if r.peer_id in limits.own_peer_ids else min(r.samples_per_second, cap) for r in in_step
    )


def _seconds_for(num_samples: int, *, rate: float) -> float | None:
    if num_samples == 0:
        return 0.0
    return num_samples / rate if rate >= MIN_RATE else None


def _total_rounds(reports: Sequence[PeerReport]) -> RoundCounts:
    totals = {outcome: sum(getattr(r.rounds, outcome) for r in reports) for outcome in RoundCounts.model_fields}
    return RoundCounts(**{outcome: min(total, MAX_COUNT) for outcome, total in totals.items()})


def _newest_loss(trainers: Sequence[PeerReport], *, epoch: int, limits: SummaryLimits) -> EpochLoss | None:
    """Means weighted by mini_steps. Peers that report an older epoch still witness what a likely loss is."""
    records = [r.last_epoch for r in trainers if r.last_epoch is not None]
    newest = max((record.epoch for record in records if record.epoch < epoch), default=None)
    if newest is None:
        return None
    counted = [record for record in records if record.epoch == newest]
    cap, deviation = math.inf, math.inf
    if len(records) >= MIN_WITNESSES:
        cap = limits.max_ratio_to_median * median_low(record.mini_steps for record in records)
        deviation = limits.max_loss_deviation
    weights = [min(record.mini_steps, cap) for record in counted]

    def mean(losses: Sequence[float], witnesses: Sequence[float]) -> float:
        middle = median_low(witnesses)
        pulled = [min(max(loss, middle - deviation), middle + deviation) for loss in losses]
        return math.fsum(w * loss for w, loss in zip(weights, pulled, strict=True)) / math.fsum(weights)

    return EpochLoss(
        epoch=newest,
        mlm_mean_loss=mean([r.mlm_mean_loss for r in counted], [r.mlm_mean_loss for r in records]),
        sop_mean_loss=mean([r.sop_mean_loss for r in counted], [r.sop_mean_loss for r in records]),
        num_peers=len(counted),
        mini_steps=sum(record.mini_steps for record in counted),
        num_samples=sum(record.num_samples for record in counted),
    )
