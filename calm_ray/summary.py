"""What can be believed of all reports together. Pure: no I/O, no clock.

hivemind's own tracker takes an epoch of 1e6 at its word. Here lies are dropped and counted by reason, and of what
remains no single peer moves an aggregate beyond the bounds in `SummaryLimits`. Those compare with medians and need
three peers at least: of two that contradict each other, nobody can say from outside which one lies.
Rejected: plain sums and maxima, as in hivemind's examples, where one volunteer crashes or captures the monitor.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

from pydantic import BaseModel, ConfigDict

from calm_ray.report import (
    IN_STEP_STATES,
    MAX_COUNT,
    MAX_REPORTS,
    ROLES,
    PeerReport,
    Reason,
    ReportRejected,
    Role,
    RoundCounts,
    decode,
)

MIN_WITNESSES = 3
"""With fewer, a median can itself be the lie."""
MIN_RATE = 1e-6
"""Samples per second below which no time of arrival is given."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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


class RoundSummary(_Record):
    """The last gradient round that most peers speak of, by the reports of `num_peers`. Sizes and times: medians."""

    epoch: int
    num_peers: int
    outcomes: RoundCounts
    digest: str
    """Of the average that most of them hold; empty if none is known."""
    num_other_digests: int
    """Peers that call the round true and hold another average: something is wrong with them, or with the wire."""
    group_size: int
    seconds: float
    bytes_sent: int
    bytes_received: int


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
    """Summed over peers, so one round of a group of four counts four times."""
    num_resyncs: int
    """Summed over peers."""
    last_round: RoundSummary | None
    parameter_norm: float | None
    """Of the median peer in step; None while nobody says."""
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
    progress by one epoch, the rounds of a kind grow by those of `max_ratio_to_median` median peers. What is said of the
    last round is the majority's.
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
    rounds, num_resyncs = _total_rounds(believed, limits=limits)
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
        rounds=rounds,
        num_resyncs=num_resyncs,
        last_round=_last_round(believed),
        parameter_norm=_median_norm(believed, epoch=epoch),
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
    if report.last_round is not None and report.last_round.epoch > report.epoch + 1:  # +1: read a moment later
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


def _total_rounds(reports: Sequence[PeerReport], *, limits: SummaryLimits) -> tuple[RoundCounts, int]:
    """Rounds by outcome, and re-syncs, of all peers together."""
    outcomes = tuple(RoundCounts.model_fields)
    totals = [sum(getattr(r.rounds, outcome) for outcome in outcomes) for r in reports]
    known = [total for total in totals if total]
    cap = int(limits.max_ratio_to_median * median_low(known)) if len(known) >= MIN_WITNESSES else MAX_COUNT

    def total(counts: Iterable[int]) -> int:
        clipped = (
            count if r.peer_id in limits.own_peer_ids else min(count, cap)
            for r, count in zip(reports, counts, strict=True)
        )  # fmt: skip
        return min(MAX_COUNT, sum(clipped))

    rounds = RoundCounts(**{outcome: total(getattr(r.rounds, outcome) for r in reports) for outcome in outcomes})
    return rounds, total(r.num_resyncs for r in reports)


def _last_round(reports: Sequence[PeerReport]) -> RoundSummary | None:
    said = [r.last_round for r in reports if r.last_round is not None]
    if not said:
        return None
    epoch = median_low(r.epoch for r in said)
    counted = [r for r in said if r.epoch == epoch]
    outcomes = dict(Counter[str](r.outcome for r in counted))
    digests = Counter(r.digest for r in counted if r.outcome == "averaged" and r.digest)
    digest = max(digests, key=lambda digest: (digests[digest], digest), default="")
    return RoundSummary(
        epoch=epoch,
        num_peers=len(counted),
        outcomes=RoundCounts(**outcomes),
        digest=digest,
        num_other_digests=digests.total() - digests[digest],
        group_size=median_low(r.group_size for r in counted),
        seconds=median_low(r.seconds for r in counted),
        bytes_sent=median_low(r.bytes_sent for r in counted),
        bytes_received=median_low(r.bytes_received for r in counted),
    )


def _median_norm(reports: Sequence[PeerReport], *, epoch: int) -> float | None:
    norms = [r.parameter_norm for r in reports if r.parameter_norm is not None and r.epoch == epoch]
    return median_low(norms) if norms else None


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
