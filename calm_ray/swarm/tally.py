"""What a peer counts about its rounds, and the one line that it logs of each."""

import logging
from collections import Counter
from dataclasses import dataclass, field, replace

from calm_ray.swarm.verdict import RoundResult

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RoundTally:
    """Written by the rounds thread, read by reports: each field is replaced or increased at once."""

    by_outcome: Counter[str] = field(default_factory=Counter)
    """Gradient rounds by `verdict.Outcome`."""
    last: RoundResult | None = None
    """The last gradient round, without its vectors."""
    last_epoch: int = 0
    last_group_size: int = 0
    samples_averaged: int = 0
    """Our samples that went into true rounds: what a volunteer contributed."""
    samples_dropped: int = 0
    """Computed with parameters too old to count, or before another state was loaded."""
    num_late_reads: int = 0
    """Averages that we missed and read from others."""
    num_resyncs: int = 0
    """Times the whole state was downloaded after the first."""
    parameter_norm: float = 0.0

    def note(self, epoch: int, result: RoundResult, *, num_samples: int, is_counted: bool) -> None:
        """Count one gradient round; `num_samples` are ours, `is_counted` says whether they are in the average."""
        self.by_outcome[result.outcome] += 1
        self.last, self.last_epoch = replace(result, average=None, residual=None), epoch
        self.last_group_size = result.group_size
        if is_counted:
            self.samples_averaged += num_samples
        logger.info(
            "round epoch=%d outcome=%s group_size=%d senders=%d samples=%d total_weight=%.0f banned=%d seconds=%.2f "
            "sent=%d received=%d digest=%.12s%s",
            epoch, result.outcome, result.group_size, result.num_senders, num_samples, result.total_weight,
            len(result.banned), result.seconds, result.bytes_sent, result.bytes_received, result.digest,
            f" detail={result.detail!r}" if result.detail else "",
        )  # fmt: skip
