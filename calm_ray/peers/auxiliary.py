"""An auxiliary peer: bootstrap address, desk for newcomers, reducer in every round, and holder of the state.

It claims no sample, but takes every step: when all trainers have left, newcomers get the state from here. When all
auxiliary peers have gone as well, the next one brings the state back from a checkpoint: see `resume`.
"""

import logging
from collections.abc import Sequence

import torch

from calm_ray.errors import ConfigError, StateUnavailable
from calm_ray.peers.context import PeerContext
from calm_ray.peers.learner import make_learner
from calm_ray.peers.progress import note_success, optimizer_pulses, words
from calm_ray.peers.resume import saved_state
from calm_ray.peers.round_facts import round_facts
from calm_ray.swarm.desk import Desk
from calm_ray.swarm.rounds import SwarmOptimizer
from calm_ray.training.model import parameter_names

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.25
FIRST_FETCH_SECONDS = 10.0
SERVE_TIMEOUT_SECONDS = 15.0


def run(context: PeerContext) -> None:
    context.join()
    torch.set_num_threads(1)  # it adds up parts and steps on one thread, it does not train
    table = context.run
    learner = make_learner(table, context.bundle, device="cpu")
    optimizer = SwarmOptimizer(
        context.swarm, param_groups=learner.param_groups, rules=learner.rules, averaging=table.averaging,
        target_batch_size=table.target_batch_size, num_epochs=table.num_epochs, is_auxiliary=True,
        bandwidth_mbps=context.spec.peer.bandwidth_mbps, wire=table.wire,
    )  # fmt: skip
    optimizer.on_round.append(note_success(context))
    context.report_with(
        lambda: {"epoch": optimizer.local_epoch, **round_facts(optimizer.rounds)},
        pulses=lambda: optimizer_pulses(optimizer), words=lambda: words(optimizer),
    )  # fmt: skip
    _take_up_state(context, optimizer, names=parameter_names(learner.model))
    optimizer.start()
    desk = Desk(context.bundle)  # only now: a newcomer that found no state yet would begin at epoch 0
    context.swarm.call(lambda p2p: desk.serve(p2p, run_id=table.run_id), timeout_seconds=SERVE_TIMEOUT_SECONDS)
    context.tell("assisting")
    while not context.stop.wait(TICK_SECONDS):
        if optimizer.failure is not None:
            raise optimizer.failure
    context.tell("leaving")
    optimizer.shutdown()


def _take_up_state(context: PeerContext, optimizer: SwarmOptimizer, *, names: Sequence[str]) -> None:
    """Become the newest state there is: the swarm's, or the checkpoint's if nobody has one as new."""
    spec, saved = context.spec, None
    if spec.resume is not None:
        context.tell("joining", f"reading the checkpoint in {spec.resume}")
        saved = saved_state(spec.resume, run=context.run, bundle=context.bundle, names=names)
    if not context.is_first:
        optimizer.wait_for_swarm(timeout_seconds=FIRST_FETCH_SECONDS)
    if optimizer.swarm_epoch >= max(1, saved.epoch if saved is not None else 0):
        context.tell("joining", f"downloading the state of epoch {optimizer.swarm_epoch}")
        try:
            optimizer.load_state_from_peers()
        except StateUnavailable as exc:
            if saved is None:
                raise
            logger.warning("taking the checkpoint instead: %s", exc)
    if saved is not None and saved.epoch > optimizer.local_epoch:
        context.tell("joining", f"going on from the checkpoint of epoch {saved.epoch}")
        try:
            optimizer.load_state(saved)
        except ValueError as exc:
            raise ConfigError(f"{spec.resume}: cannot be this run's: {exc}") from exc
