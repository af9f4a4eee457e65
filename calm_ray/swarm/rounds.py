"""The global step: accumulate towards the target batch, average with the swarm, step once, publish.

A thin subclass of `hivemind.Optimizer`. It counts each round by how it ended, steps only on what was really averaged
(stock takes a step with zero gradients when averaging fails, and calls it "local gradients"), clips the *averaged*
gradient, and gives up on state downloads after a few tries instead of looping for ever.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import hivemind
import torch

from calm_ray.errors import StateUnavailable
from calm_ray.swarm.averagers import GradientAverager, RoundVerdict, TrainingStateAverager
from calm_ray.swarm.codecs import gradient_codec
from calm_ray.swarm.node import Swarm
from calm_ray.swarm.progress import ProgressTracker
from calm_ray.tables import AveragingTable

logger = logging.getLogger(__name__)

MAX_STATE_TRIES = 5
"""Downloads of the state before a peer gives up and lets its watchdog restart it."""
STATE_PAUSE_SECONDS = 2.0

MakeOptimizer = Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class StepRules:
    """What the training code wants to happen around the global step. Plain callables: the swarm knows no model."""

    make_optimizer: MakeOptimizer
    make_schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
    before_step: Callable[[list[torch.Tensor]], float]
    """Gets the averaged gradients, may change them in place (clip), returns their norm. Not finite: no step."""


@dataclass(kw_only=True)
class RoundTally:
    """Gradient rounds by outcome: averaged, partial, alone, failed, nonfinite."""

    by_outcome: Counter[str] = field(default_factory=Counter)
    last_group_size: int = 0
    samples_averaged: int = 0
    """Our samples that went into whole rounds: what a volunteer contributed."""


class SwarmOptimizer(hivemind.Optimizer):
    """`step(batch_size=n)` after each micro-batch; blocks at epoch boundaries while the swarm averages."""

    scheduled_grads: Any
    """Stock's control of the next round, or None."""

    def __init__(
        self, swarm: Swarm, *, param_groups: Iterable[dict[str, Any]], rules: StepRules, averaging: AveragingTable,
        target_batch_size: int, is_auxiliary: bool = False,
    ) -> None:  # fmt: skip
        self.rounds = RoundTally()
        self._rules = rules
        self._should_skip_step = False
        request_timeout = min(3.0, averaging.matchmaking_seconds / 2)  # longer than matchmaking can deadlock it
        super().__init__(
            dht=swarm.dht,
            run_id=swarm.run_id,
            target_batch_size=target_batch_size,
            params=tuple(param_groups),
            optimizer=self._make_guarded_optimizer,
            scheduler=rules.make_schedule,
            matchmaking_time=averaging.matchmaking_seconds,
            averaging_timeout=averaging.averaging_timeout_seconds,
            # Stock takes matchmaking_time, too short on a busy machine: the sender is banned, the round partial.
            next_chunk_timeout=averaging.averaging_timeout_seconds / 4,
            offload_optimizer=True,  # the optimizer works on the buffers that are averaged; the model gets a copy
            delay_state_averaging=False,
            average_state_every=averaging.average_state_every,
            # Never leave this to its default: an inverted test in stock turns None into a crash of every client.
            client_mode=swarm.is_client_mode,
            auxiliary=is_auxiliary,
            grad_compression=gradient_codec(averaging.compression),
            grad_averager_factory=partial(GradientAverager, request_timeout=request_timeout),
            averager_opts={"request_timeout": request_timeout},
            tracker_opts={
                "private_key": swarm.key,
                "min_refresh_period": 0.3,
                "default_refresh_period": min(3.0, averaging.matchmaking_seconds / 2),
                "max_refresh_period": min(10.0, averaging.matchmaking_seconds),
            },
        )

    # --- hooks of hivemind.Optimizer ---------------------------------------------------------------------------------

    def _make_state_averager(self, **kwargs: Any) -> TrainingStateAverager:
        return TrainingStateAverager(
            dht=self.dht,
            prefix=state_prefix(self.run_id),
            min_matchmaking_time=self.matchmaking_time,
            allreduce_timeout=self.allreduce_timeout,
            shutdown_timeout=self.shutdown_timeout,
            offload_optimizer=self.offload_optimizer,
            custom_gradients=self.offload_optimizer,
            status_loglevel=self.status_loglevel,
            next_chunk_timeout=self.next_chunk_timeout,
            client_mode=self.client_mode,
            auxiliary=self.auxiliary,
            start=True,
            **kwargs,
        )

    def _make_progress_tracker(self, target_batch_size: int, **kwargs: Any) -> ProgressTracker:
        return ProgressTracker(
            self.dht, self.run_id, target_batch_size, client_mode=self.client_mode,
            is_follower=self.client_mode or self.auxiliary, status_loglevel=self.status_loglevel, start=True, **kwargs,
        )  # fmt: skip

    def _make_guarded_optimizer(self, param_groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        optimizer = self._rules.make_optimizer(param_groups)
        unguarded = optimizer.step

        def step(_: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            if self._should_skip_step:
                return None
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if not math.isfinite(self._rules.before_step(gradients)):
                self._count("nonfinite")
                return None
            return unguarded(*args, **kwargs)

        optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]  # torch's schedulers want a method
        return optimizer

    def _begin_averaging_gradients(self, grad_scaler: Any) -> bool:
        if self.scheduled_grads is not None and (self.scheduled_grads.triggered or self.scheduled_grads.done()):
            self.scheduled_grads = None  # its group fell apart: look for a new one, stock would go on alone
        self._should_skip_step = False
        self._samples_at_stake = 0 if self.auxiliary else self.grad_averager.local_samples_accumulated
        began = bool(super()._begin_averaging_gradients(grad_scaler))
        if not began:
            outcome = "alone" if self.tracker.global_progress.num_peers <= 1 else "failed"
            self._should_skip_step = outcome == "failed"  # stock would step on our own gradient and leave the swarm
            self._count(outcome)
            logger.info("round epoch=%d outcome=%s reason='not begun'", self.local_epoch, outcome)
        return began

    def _average_gradients_and_load_into_optimizer(self, maybe_step_control: Any) -> None:
        """Replaces stock's: a round that failed moves nobody, and every outcome is counted and logged."""
        try:
            gathered = maybe_step_control.result(self.averaging_timeout)
            verdict: RoundVerdict = gathered.verdict
        except Exception as exc:  # noqa: BLE001  whatever ended the round, it did not average
            self._should_skip_step = True
            self._count("failed")
            logger.warning("round epoch=%d outcome=failed reason=%r", self.local_epoch, exc)
            return
        self.rounds.last_group_size = verdict.group_size
        outcome = _outcome(verdict)
        # A group that fell apart: we and an auxiliary peer, while others train. Our gradient alone is not the swarm's.
        is_cut_off = outcome == "alone" and self.tracker.global_progress.num_peers > 1
        self._should_skip_step = is_cut_off or outcome == "nonfinite"
        if verdict.is_whole:
            self.rounds.samples_averaged += self._samples_at_stake
        self._count(outcome)
        self.grad_averager.notify_used_averaged_gradients()
        logger.info(
            "round epoch=%d outcome=%s group_size=%d received=%.3f banned=%d samples=%d",
            self.local_epoch, outcome, verdict.group_size, verdict.received_fraction, verdict.num_banned,
            self._samples_at_stake,
        )  # fmt: skip

    def assist(self) -> None:
        """An auxiliary peer's `step()`. One that missed a boundary follows; stock would average it once more."""
        if self.tracker.global_epoch > self.local_epoch:
            with self.tracker.pause_updates():
                self.state_averager.local_epoch = self.tracker.global_epoch
                self.tracker.update_epoch(self.tracker.global_epoch)
        else:
            self.step()

    @property
    def awaits_full_peer(self) -> bool:
        """Whether we have done our part of the epoch, and no full peer is there to end it with."""
        return self.tracker.awaits_full_peer and self.local_progress.samples_accumulated >= self.target_batch_size

    def wait_for_swarm(self, *, timeout_seconds: float) -> None:
        """Let the tracker read the swarm's progress once, so that `tracker.global_epoch` is more than our own guess."""
        self.tracker.fetched_global_progress_this_epoch.wait(timeout_seconds)

    def _count(self, outcome: str) -> None:
        self.rounds.by_outcome[outcome] += 1

    def load_state_from_peers(self, **kwargs: Any) -> None:
        """Download parameters and optimizer state, at most MAX_STATE_TRIES times; StateUnavailable after that."""
        if self.scheduled_grads is not None and not self.scheduled_grads.done():
            self._tag_along_with_zero_weight(self.scheduled_grads)
            self.scheduled_grads = None
        self.state_averager.step(wait_for_delayed_updates=True)
        with self.tracker.pause_updates():
            for attempt in range(MAX_STATE_TRIES):
                if attempt:
                    time.sleep(STATE_PAUSE_SECONDS * attempt)  # donors may be averaging: give them time to finish
                try:
                    self.state_averager.load_state_from_peers(timeout=self.load_state_timeout, **kwargs)
                except Exception as exc:  # noqa: BLE001  a donor's failure of any kind: try again
                    logger.warning("load_state failed: %r", exc)
                if self.local_epoch >= self.tracker.global_epoch - 1:
                    break
            else:
                raise StateUnavailable(
                    f"no peer gave us the state of epoch {self.tracker.global_epoch} in {MAX_STATE_TRIES} tries; "
                    "are there full peers that train, or only clients?"
                )
            self.state_averager.local_epoch = max(self.local_epoch, self.tracker.global_epoch)
            self.tracker.report_local_progress(local_epoch=self.local_epoch, samples_accumulated=0)
            self.grad_averager.reset_accumulated_grads_()
            if not self.client_mode:
                self.state_averager.state_sharing_priority = self.local_epoch


def _outcome(verdict: RoundVerdict) -> str:
    if not verdict.is_finite:
        return "nonfinite"
    if verdict.num_senders <= 1:
        return "alone"
    return "averaged" if verdict.is_whole else "partial"


def state_prefix(run_id: str) -> str:
    """DHT prefix under which a run's training state is averaged and offered."""
    return f"{run_id}_state_averager"
