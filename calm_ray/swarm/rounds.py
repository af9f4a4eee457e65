"""The global step: accumulate, match, average, verify, step, publish.

One thread per peer walks through these stages; trainers compute meanwhile. What a round gives is either the swarm's
average, the same bits on every member, or nothing: then the gradient goes back to where it came from, and the round is
tried once more. Whoever misses a round reads its average from others, and downloads the whole state only if that fails.

Rejected: `hivemind.Optimizer`. It steps with zero or local gradients when averaging fails, waits for matchmaking in the
computing thread, keeps two forked processes that exchange tensors with it through shared memory, and cannot tell how a
round went. See docs/decisions/0004.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from calm_ray.errors import StateUnavailable
from calm_ray.swarm.averaging import OwnAveraging, schema_of
from calm_ray.swarm.catchup import Catcher
from calm_ray.swarm.doing import Doing, Stage
from calm_ray.swarm.donor import TrainingStateAverager
from calm_ray.swarm.holder import HeldState, StateHolder, StepRules
from calm_ray.swarm.intake import Intake
from calm_ray.swarm.node import Swarm
from calm_ray.swarm.progress import ProgressTracker
from calm_ray.swarm.roster import Roster
from calm_ray.swarm.sketch import Sketch
from calm_ray.swarm.tally import RoundTally
from calm_ray.swarm.verdict import RoundResult, digest_of
from calm_ray.swarm.wires import Behind, StockWire, Wire
from calm_ray.tables import AveragingTable

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
MIN_CALLED_SHARE = 0.5
"""A trainer heeds a call for a round once the swarm has this share of the epoch's samples, as far as it knows."""
BACKOFF_SECONDS = 1.0
MAX_WEIGHT_IN_BATCHES = 4
"""No peer can honestly have more samples than a few target batches."""
MAX_ERRORS_IN_A_ROW = 5
STOP_SECONDS = 6.0
REFRESH_SECONDS = {"lan": 1.0, "internet": 5.0, "slow": 10.0}
ROSTER_SECONDS = 5.0
"""Donors come and go seldom; whoever needs one now asks for a fresh roster."""
SERVE_TIMEOUT_SECONDS = 15.0


class SwarmOptimizer:
    """`step(batch_size=n)` after each micro-batch. Auxiliary peers only `start()` it, and hold the state.

    `num_epochs`: no step beyond it. `on_round` gets (result, epoch) of every gradient round, on the rounds thread.
    """

    def __init__(
        self, swarm: Swarm, *, param_groups: Iterable[dict[str, Any]], rules: StepRules, averaging: AveragingTable,
        target_batch_size: int, num_epochs: int | None = None, is_auxiliary: bool = False,
        bandwidth_mbps: float | None = None, wire: str = "calm-1",
    ) -> None:  # fmt: skip
        self.swarm, self.rounds, self.doing = swarm, RoundTally(), Doing()
        self.on_round: list[Callable[[RoundResult, int], None]] = []
        self._table, self._is_auxiliary, self._target = averaging, is_auxiliary, target_batch_size
        self._num_epochs = num_epochs
        self.holder = StateHolder(param_groups, rules=rules, should_offload=averaging.offload_optimizer)
        self._epoch = 0
        self._sketch: Sketch | None = None
        self._called_epoch, self._not_before = -1, 0.0
        self._is_first_state = True
        self._failure: Exception | None = None
        self._stop, self._wake, self._started = threading.Event(), threading.Event(), threading.Event()

        shapes = [p.shape for p in self.holder.parameters]
        self._max_weight = max_weight = float(MAX_WEIGHT_IN_BATCHES * target_batch_size)
        stock = None
        if wire == "hivemind-1.1":  # forks, so before there are threads
            stock = StockWire(swarm, shapes=shapes, table=averaging, max_weight=max_weight)
        self.roster = Roster(swarm, refresh_seconds=ROSTER_SECONDS)
        self.tracker = ProgressTracker(
            swarm.dht, swarm.run_id, target_batch_size, client_mode=swarm.is_client_mode, start=True,
            has_holders=lambda: bool(self.roster.holders), private_key=swarm.key, min_refresh_period=0.3,
            default_refresh_period=REFRESH_SECONDS[averaging.network],
            max_refresh_period=2 * REFRESH_SECONDS[averaging.network],
        )  # fmt: skip
        self._intake = (
            None if is_auxiliary else Intake(self.holder, self.tracker, max_staleness=averaging.max_staleness)
        )
        self._donor = TrainingStateAverager(lambda: self.holder.snapshot())
        if stock is not None:
            stock.follow(self.tracker)
        self.wire: Wire = stock or OwnAveraging(
            swarm, num_elements=self.holder.num_elements, tracker=self.tracker, roster=self.roster,
            schema=schema_of(shapes, compression=averaging.compression, optimizer=type(self.holder.optimizer).__name__),
            table=averaging, epoch=lambda: self.holder.epoch, sketch=self._current_sketch, on_knock=self._on_knock,
            is_auxiliary=is_auxiliary, max_weight=max_weight,
            bandwidth=None if bandwidth_mbps is None else bandwidth_mbps * 1e6 / 8,
        )  # fmt: skip
        self._catcher = Catcher(
            swarm, holder=self.holder, wire=self.wire, tracker=self.tracker, roster=self.roster, doing=self.doing
        )
        if not swarm.is_client_mode:
            swarm.call(lambda p2p: self._donor.serve(p2p, run_id=swarm.run_id), timeout_seconds=SERVE_TIMEOUT_SECONDS)
        self._thread = threading.Thread(target=self._run, name="rounds", daemon=True)
        self._thread.start()

    # --- the computing thread ----------------------------------------------------------------------------------------

    @property
    def local_epoch(self) -> int:
        return self._epoch

    @property
    def awaits_full_peer(self) -> bool:
        """Whether we have done our part of the epoch, and no full peer is there to end it with."""
        return self.tracker.awaits_full_peer and self.tracker.local_progress.samples_accumulated >= self._target

    @property
    def is_waited_for(self) -> bool:
        """Whether the computing thread stands still until a round is over: with max_staleness = 0."""
        return self._intake is not None and self._intake.is_waited_for

    def start(self) -> None:
        """Take part in rounds from now on, and offer our state. `step` does it by itself."""
        if not self._started.is_set():
            if not self.swarm.is_client_mode:
                self.roster.offer(lambda: self._epoch + (0.5 if self._is_auxiliary else 0.0))
            self._started.set()

    def step(self, *, batch_size: int) -> None:
        """Count the gradients in `.grad`, means over `batch_size` samples. Blocks only if max_staleness = 0.

        Afterwards the model has the newest parameters. Raises what ended the rounds thread, if something did.
        """
        assert self._intake is not None, "auxiliary peers have no gradients"
        self.start()
        if self._failure is not None:
            raise self._failure
        self.tracker.note_samples(batch_size)
        self._intake.add(batch_size)
        if self._table.max_staleness == 0:
            if self.tracker.is_epoch_full and time.monotonic() >= self._not_before:
                self._intake.park()
                self._wake.set()
            self._intake.wait_while_parked()
        self._intake.refresh_model()

    def zero_grad(self) -> None:
        for parameter in self.holder.model_parameters:
            parameter.grad = None

    def wait_for_swarm(self, *, timeout_seconds: float) -> None:
        """Let tracker and roster read the swarm's records once, so that what they say is more than our own guess."""
        self.tracker.fetched_global_progress_this_epoch.wait(timeout_seconds)
        self.roster.refresh(timeout_seconds=timeout_seconds)

    @property
    def swarm_epoch(self) -> int:
        """The newest epoch that anybody claims."""
        return max([self.tracker.global_epoch, *(holder.epoch for holder in self.roster.holders.values())])

    def load_state_from_peers(self) -> None:
        """Become what the swarm is, before `start`; StateUnavailable after some tries."""
        self.load_state(self._catcher.download(min_epoch=self._epoch, stop=self._stop))

    def load_state(self, state: HeldState) -> None:
        """Become `state`, before `start`: a cold start's checkpoint. ValueError if it is not of this model."""
        self._adopt(state)
        if self._intake is not None:
            self._intake.refresh_model()

    def shutdown(self) -> None:
        """Leave: withdraw our records, finish or leave the round, linger for groupmates. Some seconds at most."""
        self._stop.set()
        self._wake.set()
        self.tracker.shutdown(2.0)
        self.roster.close()
        if self._intake is not None:
            self._intake.close()
        self._thread.join(timeout=STOP_SECONDS)
        self.wire.close()

    # --- the rounds thread -------------------------------------------------------------------------------------------

    def _on_knock(self, epoch: int) -> None:
        self._called_epoch = epoch
        self._wake.set()

    def _run(self) -> None:
        num_errors = 0
        while not self._stop.is_set():
            self._wake.wait(POLL_SECONDS)
            self._wake.clear()
            self.doing.turns += 1
            try:
                if self._started.is_set():
                    self._tick()
                num_errors = 0
            except StateUnavailable as exc:
                self._fail(exc)
                return
            except Exception as exc:
                num_errors += 1
                logger.exception("rounds thread: error %d in a row", num_errors)
                if num_errors >= MAX_ERRORS_IN_A_ROW:
                    self._fail(exc)
                    return
                time.sleep(BACKOFF_SECONDS)
            finally:
                if self._intake is not None:
                    self._intake.unpark()
                self.doing.stage = Stage.ACCUMULATE

    def _fail(self, error: Exception) -> None:
        self._failure = error
        if self._intake is not None:
            self._intake.close()

    @property
    def failure(self) -> Exception | None:
        """What ended the rounds thread, for peers that never call `step`."""
        return self._failure

    def _tick(self) -> None:
        epoch = self._epoch
        if self.tracker.global_epoch > epoch:
            self._catch_up(self.tracker.global_epoch)
        elif self._is_due(epoch) and time.monotonic() >= self._not_before:
            self._end_epoch(epoch)

    def _is_due(self, epoch: int) -> bool:
        if self._is_auxiliary and not self.tracker.records:
            return False  # nobody trains
        if self._num_epochs is not None and epoch >= self._num_epochs:
            return False  # the run is over
        is_called = self._called_epoch == epoch
        if is_called and (self._is_auxiliary or self.tracker.share_done >= MIN_CALLED_SHARE):
            return True
        return self.tracker.is_epoch_full or self.tracker.is_nearly_full(self.wire.lead_seconds)

    def _end_epoch(self, epoch: int) -> None:
        for _ in range(2):  # retried once: most failures are one peer's, and it will not come again
            if not self.wire.has_company():
                self.roster.refresh(timeout_seconds=2.0)
                if not self.wire.has_company():
                    self._end_epoch_alone(epoch)
                    return
            self.doing.is_forsaken = False
            try:
                result = self._average(epoch)
            except Behind as exc:
                self._catch_up(exc.epoch, hint=exc.peer_id)
                return
            if result.average is not None:
                self._step(epoch, result.average)
                return
            if self._stop.is_set():
                return
        self._not_before = time.monotonic() + BACKOFF_SECONDS * random.uniform(1.0, 2.0)

    def _average(self, epoch: int) -> RoundResult:
        """One try. The gradient goes back to where it came from unless the round is true."""
        self.doing.stage = Stage.MATCH
        result: RoundResult | None = None
        try:
            result = self.wire.average("gradients", epoch, self._take)
            is_counted = result.is_true and not self.wire.is_out_of_step
            self._count(epoch, result, is_counted=is_counted and self.swarm.peer_id not in result.banned)
            return result
        finally:
            self._donor.resume()
            if self._intake is not None:
                self._intake.settle(
                    is_used=result is not None and result.is_true, residual=result.residual if result else None
                )

    def _take(self) -> tuple[torch.Tensor, float] | None:
        """What we bring, at the moment the group stands. Until the round is over nobody downloads our state."""
        self.doing.stage = Stage.AVERAGE
        deadline = time.monotonic() + self.wire.lead_seconds  # a group may be found ahead of time, as bare peers do
        while time.monotonic() < deadline and not self.tracker.is_epoch_full and not self._stop.is_set():
            if self.tracker.global_epoch > self._epoch:
                break
            time.sleep(POLL_SECONDS)
        self._donor.pause()
        if self._intake is None:
            return None
        self._intake.park()
        taken = self._intake.take()
        # After failed rounds it may be a mean of more samples than anybody believes: it then counts for fewer.
        return (taken[0], min(taken[1], self._max_weight)) if taken is not None else None

    def _count(self, epoch: int, result: RoundResult, *, is_counted: bool) -> None:
        num_samples = self._intake.num_samples_taken if self._intake is not None else 0
        self.rounds.note(epoch, result, num_samples=num_samples, is_counted=is_counted)
        self.rounds.samples_dropped = self._intake.num_dropped if self._intake is not None else 0
        for callback in self.on_round:
            callback(result, epoch)

    def _end_epoch_alone(self, epoch: int) -> None:
        """Nobody else is there: the swarm is we. An auxiliary peer then has nothing to step with."""
        if self.wire.is_forsaken:  # our line may have failed, not theirs: we would make another model, in vain
            self.doing.is_forsaken, self._not_before = True, time.monotonic() + BACKOFF_SECONDS
            return
        taken = self._take()
        if self._intake is None or taken is None:
            self._donor.resume()
            self._not_before = time.monotonic() + BACKOFF_SECONDS
            if self._intake is not None:
                self._intake.settle(is_used=False)
            return
        vector, weight = taken
        result = RoundResult(
            outcome="alone", average=vector, digest=digest_of(vector), group_size=1, num_senders=1,
            total_weight=weight, weights={self.swarm.peer_id: weight}, detail="nobody else is there",
        )  # fmt: skip
        self._count(epoch, result, is_counted=True)
        self._intake.settle(is_used=True)
        self.wire.forget_group()
        self._step(epoch, vector)

    def _step(self, epoch: int, average: torch.Tensor) -> None:
        self.doing.stage = Stage.STEP
        if not self.holder.step(average):
            logger.warning("epoch=%d not stepped: the averaged gradient's norm is not finite", epoch)
        try:
            self._maybe_average_state(epoch + 1)
        finally:
            self._publish()
        if self.wire.is_out_of_step:
            logger.warning("epoch=%d our parameters are not the swarm's: downloading its state", epoch)
            self._download(min_epoch=self._epoch)

    def _maybe_average_state(self, epoch: int) -> None:
        """Remove drift: unlike CPUs give unlike last bits. All members of the last group decide alike."""
        if not self.wire.is_state_due(epoch):
            self.wire.close_state_round(epoch)
            return
        self._sketch = None
        try:
            result = self.wire.average("state", epoch, self._take_state)
        except Behind:
            result = RoundResult(outcome="failed", detail="others have averaged without us")
        self.wire.close_state_round(epoch)
        logger.info("state round epoch=%d outcome=%s group_size=%d", epoch, result.outcome, result.group_size)
        if result.average is not None:
            self.holder.load_parameters(result.average)

    def _take_state(self) -> tuple[torch.Tensor, float]:
        self._donor.pause()
        return self.holder.flat_parameters.clone(), 1.0

    def _publish(self) -> None:
        """Whatever the holder has now is the swarm's state at its epoch, and ours."""
        self._sketch = None
        self._donor.resume()
        self.rounds.parameter_norm = self._current_sketch().norm
        self._epoch = self.holder.epoch
        if self._intake is not None:
            self._intake.begin_epoch(self._epoch)
        else:
            self.tracker.begin_epoch(self._epoch)
        self.roster.wake()

    def _current_sketch(self) -> Sketch:
        sketch = self._sketch
        if sketch is None:
            with self.holder.lock:
                sketch = self._sketch = Sketch.of(self.holder.flat_parameters)
        return sketch

    # --- behind ------------------------------------------------------------------------------------------------------

    def _catch_up(self, global_epoch: int, *, hint: str | None = None) -> None:
        """Others have stepped without us: read the average that we missed, or download the state."""
        self.doing.stage = Stage.CATCH_UP
        found = self._catcher.find(global_epoch, hint=hint, stop=self._stop)
        if isinstance(found, torch.Tensor):
            self.rounds.num_late_reads += 1
            if self._intake is not None and self._table.max_staleness == 0:
                self._intake.drop()
            self.wire.forget_group()
            self._step(self._epoch, found)
        elif found is not None:
            self._adopt(found)

    def _download(self, *, min_epoch: int) -> None:
        self._adopt(self._catcher.download(min_epoch=min_epoch, stop=self._stop))

    def _adopt(self, state: HeldState) -> None:
        self.holder.load(state)
        if self._intake is not None:
            self._intake.drop()
        self.rounds.num_resyncs += not self._is_first_state
        self._is_first_state = False
        self._publish()
