"""A monitor: reads everyone's reports, keeps the feed, and writes checkpoints. Reading needs no model and no torch."""

import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from calm_ray.errors import CalmRayError, SwarmUnreachable
from calm_ray.observe.ingest import rows_of
from calm_ray.observe.keeper import FeedKeeper
from calm_ray.peers.context import PeerContext, reports_allowance
from calm_ray.peers.endings import disk_words
from calm_ray.peers.judge import Pulse
from calm_ray.peers.spec import CheckpointSpec
from calm_ray.summary import SummaryLimits, SwarmSummary, summarise

if TYPE_CHECKING:
    from calm_ray.swarm.state import TrainingState

logger = logging.getLogger(__name__)

RETRY_SECONDS, MAX_RETRY_SECONDS = 5.0, 300.0
"""Between two tries to get a checkpoint's state, which cost a donor the state's bytes: doubled each time."""
DOWNLOAD_SECONDS = 600.0
"""Of one state: 2 GB (ALBERT-large with LAMB has 216 MB) at 30 Mbit/s."""


def run(context: PeerContext) -> None:
    context.join()
    table = context.run
    limits = SummaryLimits(
        config_hash=table.config_hash(), num_epochs=table.num_epochs, target_batch_size=table.target_batch_size,
        max_age_seconds=table.report_lifetime_seconds,
    )  # fmt: skip
    epoch = 0
    previous: SwarmSummary | None = None
    num_readings = 0
    allowance = reports_allowance(table.report_seconds)  # without one reading, this process is not what is needed
    context.report_with(
        lambda: {"epoch": epoch},
        pulses=lambda: {"readings": Pulse(count=num_readings, allowance_seconds=allowance)},
    )
    context.tell("watching")
    warn = partial(context.warn, "feed")
    with FeedKeeper(context.spec.feed_path, warn=warn) as feed, Checkpointer(context) as checkpointer:
        while not context.stop.wait(table.report_seconds):
            try:
                reports = context.swarm.snapshot()
            except SwarmUnreachable as exc:
                context.tell("watching", f"no reports: {exc}")
                continue
            summary = summarise(reports, now=time.time(), limits=limits)
            epoch, num_readings = summary.epoch, num_readings + 1
            feed.append_all(rows_of(summary, previous=previous))
            previous = summary
            checkpointer.on_summary(summary)
            context.tell(
                "watching", summary=summary, last_checkpoint=checkpointer.last_path, last_success_at=time.time()
            )


class Checkpointer:
    """Writes a checkpoint every so many epochs, one at a time, beside the reading of reports."""

    def __init__(self, context: PeerContext) -> None:
        self._context = context
        self._spec = context.spec.checkpoints
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[tuple[int, str]] | None = None
        self._not_before, self._num_failures = 0.0, 0
        self._last_epoch = 0
        self.last_path = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def on_summary(self, summary: SwarmSummary) -> None:
        if self._spec is None:
            return
        if self._pending is not None:
            if not self._pending.done():
                return
            self._collect(self._pending)
            self._pending = None
        due = due_epoch(
            epoch=summary.epoch, last_epoch=self._last_epoch, every_epochs=self._spec.every_epochs,
            num_epochs=summary.num_epochs,
        )  # fmt: skip
        if due is not None and time.monotonic() >= self._not_before:
            self._pending = self._pool.submit(write_one, self._context, self._spec, due, summary.epoch)

    def _collect(self, pending: Future[tuple[int, str]]) -> None:
        try:
            self._last_epoch, self.last_path = pending.result()
        except CalmRayError as exc:
            self._try_later(str(exc))
        except OSError as exc:
            self._try_later(disk_words(exc, elsewhere="choose another folder for checkpoints"))
        except Exception as exc:
            logger.exception("checkpoint not written")
            self._try_later(f"{type(exc).__name__}: {exc}")
        else:
            self._num_failures = 0
            self._context.warn("checkpoint", "")

    def _try_later(self, problem: str) -> None:
        self._not_before = time.monotonic() + min(MAX_RETRY_SECONDS, RETRY_SECONDS * 2 ** min(10, self._num_failures))
        self._num_failures += 1
        self._context.warn("checkpoint", f"not written, trying again: {problem}")


def due_epoch(*, epoch: int, last_epoch: int, every_epochs: int, num_epochs: int) -> int | None:
    """The least epoch that the next checkpoint must have, or None if none is due. The last epoch is always due."""
    if last_epoch >= num_epochs:
        return None
    if epoch >= num_epochs:
        return num_epochs
    due = epoch // every_epochs * every_epochs
    return due if due > last_epoch else None


def check_state(state: "TrainingState", *, shapes: Sequence[tuple[int, ...]], swarm_epoch: int) -> None:
    """Raise ValueError or TypeError unless `state` can be a checkpoint of this run at this time.

    `shapes`: of the parameters, in the state's order. An epoch from far ahead would be the last checkpoint ever.
    """
    if state.epoch > swarm_epoch + SummaryLimits.max_epoch_lead:
        raise ValueError(f"claims epoch {state.epoch} while the swarm is at {swarm_epoch}")
    num_tensors = len(shapes) + sum(entry.get("type") == "tensor" for entry in state.optimizer_metadata)
    if len(state.tensors) != num_tensors:  # hivemind's streams can lose their end: see `Desk.rpc_part`
        raise ValueError(f"broke off: {len(state.tensors)} of {num_tensors} tensors")
    parameters = state.tensors[: len(shapes)]
    if [tuple(tensor.shape) for tensor in parameters] != list(shapes):
        raise ValueError("another model's state: shapes do not fit")
    if not all(tensor.is_floating_point() for tensor in parameters):
        raise ValueError("parameters are not floating-point numbers")
    if not all(bool(tensor.isfinite().all()) for tensor in state.tensors):
        raise ValueError("values are NaN or infinite")
    json.dumps(state.optimizer_metadata)


def write_one(context: PeerContext, spec: CheckpointSpec, min_epoch: int, swarm_epoch: int) -> tuple[int, str]:
    """Download the state from a full peer and write it down; (its epoch, the checkpoint's path)."""
    # Late: reading reports must not cost a monitor the memory of torch and transformers.
    import torch

    from calm_ray.checkpoint.write import write_checkpoint
    from calm_ray.swarm.state import download_state
    from calm_ray.training.model import build_model, parameter_names
    from calm_ray.training.optim import learning_rate_at
    from calm_ray.training.prepare import load_bundle_model_config

    run = context.run
    config = load_bundle_model_config(context.bundle)
    with torch.device("meta"):
        model = build_model(config, seed=0)
    names = parameter_names(model)
    num_elements = sum(parameter.numel() for parameter in model.parameters())
    ours = dict(model.named_parameters())
    shapes = [tuple(ours[name].shape) for name in names]
    state = download_state(
        context.swarm, min_epoch=min_epoch, max_bytes=16 * num_elements + (64 << 20),
        timeout_seconds=DOWNLOAD_SECONDS,
        check=partial(check_state, shapes=shapes, swarm_epoch=swarm_epoch),
    )  # fmt: skip
    parameters: dict[str, Any] = dict(zip(names, state.tensors[: len(names)], strict=True))
    optimizer_tensors: Sequence[Any] = state.tensors[len(names) :]
    facts = {
        "samples": state.epoch * run.target_batch_size,
        "learning_rate": learning_rate_at(state.epoch, table=run.optimizer),
        "schedule": run.optimizer.model_dump(mode="json"),
        "donor": state.donor,
    }
    path = write_checkpoint(
        spec.folder, epoch=state.epoch, run_id=run.run_id, config_hash=run.config_hash(),
        named_parameters=parameters, optimizer_tensors=optimizer_tensors,
        optimizer_metadata=state.optimizer_metadata, model_config=config.to_dict(),
        tokenizer_dir=context.bundle / "tokenizer", keep_last=spec.keep_last, facts=facts,
    )  # fmt: skip
    logger.info("checkpoint epoch=%d donor=%s path=%s", state.epoch, state.donor, path)
    return state.epoch, str(path)
