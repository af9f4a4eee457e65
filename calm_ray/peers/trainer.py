"""A trainer: computes gradients on its own stream of text and steps with the swarm."""

import logging
import os
import time
from pathlib import Path

import torch

from calm_ray.errors import CalmRayError
from calm_ray.peers.context import PeerContext
from calm_ray.peers.judge import Pulse
from calm_ray.peers.learner import make_learner
from calm_ray.peers.progress import note_success, optimizer_pulses, words
from calm_ray.peers.round_facts import round_facts
from calm_ray.report import EpochRecord
from calm_ray.swarm.rounds import SwarmOptimizer
from calm_ray.training.compute import choose_compute, describe_device
from calm_ray.training.data import stream_seed
from calm_ray.training.loop import GradientSource, MicroStep
from calm_ray.training.pace import Pace, busy_clock
from calm_ray.training.prepare import load_bundle_tokenizer
from calm_ray.training.stream import TrainingBatches

logger = logging.getLogger(__name__)

FIRST_FETCH_SECONDS = 10.0
COMPUTE_NICENESS = 10
MICRO_BATCH_SECONDS = 300.0
"""CALM's rule is 1 to 10 s for one; text from a hub may stall for minutes, and be back."""
MAX_REFUSED_IN_A_ROW = 30
"""An fp16 overflow now and then is normal while the loss scale settles."""
NO_FULL_PEER_SECONDS = 1.0
NO_FULL_PEER = (
    "no full peer trains yet, only clients, whose state newcomers cannot get: waiting for one "
    "(start a trainer with --public where others can reach it)"
)


class EpochTally:
    """This peer's sums over one epoch, as its reports give them."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.mini_steps = self.num_samples = 0
        self.mlm_loss_sum = self.sop_loss_sum = 0.0

    def add(self, step: MicroStep) -> None:
        self.mini_steps += 1
        self.num_samples += step.num_samples
        self.mlm_loss_sum += step.mean_mlm_loss
        self.sop_loss_sum += step.mean_sop_loss

    def record(self) -> EpochRecord | None:
        if not self.mini_steps:
            return None
        return EpochRecord(
            epoch=self.epoch, mini_steps=self.mini_steps, num_samples=self.num_samples,
            mlm_loss_sum=self.mlm_loss_sum, sop_loss_sum=self.sop_loss_sum,
        )  # fmt: skip


class Trainer:
    """One trainer's state; `train()` returns when the run has ended or the peer was asked to leave."""

    def __init__(self, context: PeerContext, source: GradientSource, optimizer: SwarmOptimizer) -> None:
        self._context, self._source, self.optimizer = context, source, optimizer
        self._tally = EpochTally(0)
        self._last_record: EpochRecord | None = None
        self._is_first_contribution = True
        self._num_steps = 0
        self._pace, self._busy_seconds = Pace(context.spec.peer.duty_cycle), busy_clock(source.device)
        optimizer.on_round.append(note_success(context))

    def train(self) -> None:
        context, optimizer = self._context, self.optimizer
        num_epochs = context.run.num_epochs
        context.report_with(self.facts, pulses=self.pulses, words=lambda: words(optimizer))
        self._catch_up()
        context.tell("training")
        while not context.stop.is_set() and optimizer.local_epoch < num_epochs:
            self.step()
        self._on_epoch_end()
        if optimizer.local_epoch >= num_epochs:
            context.tell("waiting", "the run has reached its last epoch: thank you")
            context.publish()
            context.stop.wait(context.spec.linger_seconds)
        context.tell("leaving")
        optimizer.shutdown()

    def step(self) -> None:
        """One micro-batch. With `max_staleness = 0` the last of an epoch takes as long as averaging does."""
        if self.optimizer.awaits_full_peer:
            self._wait_for_full_peer()
        if self.optimizer.local_epoch != self._tally.epoch:
            self._on_epoch_end()
        began, busy = time.monotonic(), self._busy_seconds()
        result = self._source.step(epoch=self._tally.epoch)
        self._pace.note(self._busy_seconds() - busy)
        self._num_steps += 1
        if not result.is_finite:
            if self._source.num_refused_in_a_row > MAX_REFUSED_IN_A_ROW:
                raise CalmRayError(
                    f"{self._source.num_refused_in_a_row} micro-batches in a row were not finite: this machine "
                    "computes wrongly, or the model has diverged; "
                    'try precision = "fp32" under [peer], then ask the organiser'
                )
            return
        self._tally.add(result)
        self.optimizer.step(batch_size=result.num_samples)
        self.optimizer.zero_grad()
        if rest := self._pace.rest_after(time.monotonic() - began):
            self._context.stop.wait(rest)

    def _wait_for_full_peer(self) -> None:
        while self.optimizer.awaits_full_peer and not self._context.stop.is_set():
            self._context.tell("waiting", NO_FULL_PEER)
            self._context.stop.wait(NO_FULL_PEER_SECONDS)
        self._context.tell("training")

    def _on_epoch_end(self) -> None:
        self._last_record = self._tally.record()
        self._tally = EpochTally(self.optimizer.local_epoch)
        if self._is_first_contribution and self.optimizer.rounds.samples_averaged:
            self._is_first_contribution = False
            self._context.tell("training", "the first gradient from here is in the model")
        record = self._last_record
        if record is not None:
            logger.info(
                "epoch=%d samples=%d mlm_mean_loss=%.4f sop_mean_loss=%.4f",
                record.epoch, record.num_samples, record.mlm_mean_loss, record.sop_mean_loss,
            )  # fmt: skip

    def _catch_up(self) -> None:
        """Load the swarm's state if it is ahead of us; gradients of older parameters help nobody."""
        self.optimizer.wait_for_swarm(timeout_seconds=FIRST_FETCH_SECONDS)
        if self.optimizer.swarm_epoch > self.optimizer.local_epoch:
            self._context.tell("joining", f"downloading the state of epoch {self.optimizer.swarm_epoch}")
            self.optimizer.load_state_from_peers()

    def pulses(self) -> dict[str, Pulse]:
        """Micro-batches are made unless we wait for others; the rounds thread turns, and does not stay behind."""
        found = optimizer_pulses(self.optimizer)
        if self._context.state == "training" and not self.optimizer.is_waited_for:
            found["micro-batches"] = Pulse(count=self._num_steps, allowance_seconds=MICRO_BATCH_SECONDS)
        return found

    def facts(self) -> dict[str, object]:
        """What changes from report to report."""
        progress = self.optimizer.tracker.local_progress
        epoch = self.optimizer.local_epoch
        record = self._last_record
        return {
            "epoch": epoch,
            "samples_accumulated": progress.samples_accumulated if progress.epoch == epoch else 0,
            "samples_per_second": progress.samples_per_second,
            "last_epoch": record if record is not None and record.epoch < epoch else None,
            **round_facts(self.optimizer.rounds),
        }


def run(context: PeerContext) -> None:
    context.join()
    table, peer = context.run, context.spec.peer
    compute = choose_compute(describe_device(peer.device), peer=peer, sequence_length=table.data.sequence_length)
    if peer.num_threads:
        torch.set_num_threads(peer.num_threads)
    context.tell("joining", f"building the model: {compute.device}, {compute.precision}")
    learner = make_learner(table, context.bundle, device=compute.device)
    optimizer = SwarmOptimizer(
        context.swarm, param_groups=learner.param_groups, rules=learner.rules, averaging=table.averaging,
        target_batch_size=table.target_batch_size, num_epochs=table.num_epochs, bandwidth_mbps=peer.bandwidth_mbps,
        wire=table.wire,
    )  # fmt: skip
    # For this thread, the one that computes: starved of CPU, those that find groups and average would be late for
    # everyone else; and a volunteer's desktop stays usable.
    os.nice(COMPUTE_NICENESS)
    tokenizer, special_ids = load_bundle_tokenizer(context.bundle)
    seed = stream_seed(peer_id=context.swarm.peer_id, boot_id=context.boot_id)
    with TrainingBatches(
        table, bundle_dir=context.bundle, data_root=Path(peer.data_root), tokenizer=tokenizer,
        special_ids=special_ids, batch_size=compute.micro_batch_size, seed=seed,
    ) as batches:  # fmt: skip
        Trainer(context, GradientSource(learner.model, batches=batches, compute=compute), optimizer).train()
