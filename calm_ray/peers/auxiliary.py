"""An auxiliary peer: bootstrap address, desk for newcomers, and reducer in every averaging round. Claims no sample."""

import torch

from calm_ray.peers.context import PeerContext
from calm_ray.peers.learner import make_learner
from calm_ray.report import RoundCounts
from calm_ray.swarm.desk import Desk
from calm_ray.swarm.rounds import SwarmOptimizer

TICK_SECONDS = 0.25
SERVE_TIMEOUT_SECONDS = 15.0


def run(context: PeerContext) -> None:
    context.join()
    torch.set_num_threads(1)  # it adds up parts, it does not train
    table = context.run
    learner = make_learner(table, context.bundle, device="cpu")
    optimizer = SwarmOptimizer(
        context.swarm, param_groups=learner.param_groups, rules=learner.rules, averaging=table.averaging,
        target_batch_size=table.target_batch_size, is_auxiliary=True,
    )  # fmt: skip
    # Only now: hivemind has forked its averagers, threads may start.
    desk = Desk(context.bundle)
    context.swarm.call(lambda p2p: desk.serve(p2p, run_id=table.run_id), timeout_seconds=SERVE_TIMEOUT_SECONDS)
    context.report_with(lambda: _facts(optimizer))
    context.tell("assisting")
    while not context.stop.is_set():
        if optimizer.local_epoch < table.num_epochs:
            optimizer.assist()
        context.stop.wait(TICK_SECONDS)


def _facts(optimizer: SwarmOptimizer) -> dict[str, object]:
    return {
        "epoch": optimizer.local_epoch,
        "rounds": round_counts(optimizer),
        "last_group_size": optimizer.rounds.last_group_size,
    }


def round_counts(optimizer: SwarmOptimizer) -> RoundCounts:
    """The rounds of `optimizer` as the report counts them."""
    tally = optimizer.rounds.by_outcome
    return RoundCounts(
        averaged=tally["averaged"],
        partial=tally["partial"],
        alone=tally["alone"],
        failed=tally["failed"] + tally["nonfinite"],
    )
