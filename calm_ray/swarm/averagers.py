"""hivemind's averagers, made to tell how a round really went.

Stock `step()` reports a full group even when 0 % of the data came back, and a total weight of zero turns every tensor
into NaN. These subclasses return a verdict with the round and keep what is not finite out of our tensors. They carry
the stock class names on purpose: names are part of hivemind's RPC handles, and peers with other names cannot average.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hivemind.averaging.allreduce import AllReduceRunner, AveragingMode
from hivemind.averaging.group_info import GroupInfo
from hivemind.optim.grad_averager import GradientAverager as _GradientAverager
from hivemind.optim.state_averager import TrainingStateAverager as _TrainingStateAverager
from hivemind.utils.asyncio import as_aiter, azip

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RoundVerdict:
    """What one peer saw of one round."""

    group_size: int
    num_senders: int
    """Members that brought something to average: the group without its auxiliary peers."""
    received_fraction: float
    """Share of our elements that came back averaged, 0 to 1. Stock hivemind logs this and forgets it."""
    num_banned: int
    """Senders that our own reducer gave up on."""
    is_finite: bool

    @property
    def is_whole(self) -> bool:
        return self.num_senders > 1 and self.received_fraction >= 1.0 and self.num_banned == 0 and self.is_finite


class Gathered(dict[Any, Any]):
    """What stock rounds return, with the verdict attached; crosses the process boundary by pickle."""

    verdict: RoundVerdict


class _TruthfulRounds:
    """Mix-in: judge each all-reduce. Placed before a `DecentralizedAverager`."""

    async def _aggregate_with_group(self, group_info: GroupInfo, *args: Any, **kwargs: Any) -> Gathered:
        gathered = Gathered(await super()._aggregate_with_group(group_info, *args, **kwargs))  # type: ignore[misc]
        gathered.verdict = self._verdict  # set by the all-reduce that just ended; groups run one at a time
        return gathered

    async def _run_allreduce_inplace_(
        self, tensors: Sequence[torch.Tensor], group_info: GroupInfo, group_id: bytes | None = None, **kwargs: Any
    ) -> None:
        """As stock (averager.py:537), with three differences: updates that are not finite are not applied; the runner
        is asked how it went; and it is told the members' modes, which stock loses (averager.py:530), so that an
        auxiliary peer reduces without uploading tensors of its own that count for nothing.
        """
        group_id = group_info.group_id if group_id is None else group_id
        modes = tuple(AveragingMode(self.serializer.loads(entry)[1]) for entry in group_info.gathered)  # type: ignore[attr-defined]
        runner = AllReduceRunner(
            p2p=self._p2p,  # type: ignore[attr-defined]
            servicer_type=type(self),
            prefix=self.prefix,  # type: ignore[attr-defined]
            tensors=tensors,
            group_id=group_id,
            ordered_peer_ids=group_info.peer_ids,
            modes=modes,
            **kwargs,
        )
        self._running_groups[group_id].set_result(runner)  # type: ignore[attr-defined]
        is_finite = True
        if runner.modes[group_info.peer_ids.index(self.peer_id)] == AveragingMode.AUX:  # type: ignore[attr-defined]
            async for _ in runner:
                raise ValueError("an auxiliary peer received averages")
        else:
            async for tensor, update in azip(as_aiter(*tensors), runner):
                if torch.isfinite(update).all():
                    tensor.add_(update, alpha=self._averaging_alpha)  # type: ignore[attr-defined]
                else:
                    is_finite = False
                self._state_updated.set()  # type: ignore[attr-defined]
        container = runner.tensor_part_container
        self._verdict = RoundVerdict(
            group_size=group_info.group_size,
            num_senders=sum(mode != AveragingMode.AUX for mode in modes),
            received_fraction=1.0 - container.failed_size / max(1, container.total_size),
            num_banned=len(runner.banned_senders),
            is_finite=is_finite,
        )


class GradientAverager(_TruthfulRounds, _GradientAverager):
    """Averages accumulated gradients, weighted by samples."""


class TrainingStateAverager(_TruthfulRounds, _TrainingStateAverager):
    """Averages parameters, and serves the training state to newcomers."""

    def get_current_state(self) -> tuple[Any, Sequence[torch.Tensor], Any]:
        """A copy: stock hands out the live tensors, which the optimizer goes on changing while they are sent."""
        with self.lock_optimizer:
            metadata, tensors, infos = super().get_current_state()
            return metadata, [tensor.clone() for tensor in tensors], infos
