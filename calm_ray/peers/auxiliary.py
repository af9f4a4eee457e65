"""An auxiliary peer: bootstrap address, desk for newcomers, reducer in every round, and holder of the state.

It claims no sample, but takes every step: when all trainers have left, newcomers get the state from here.
"""

import torch

from calm_ray.peers.context import PeerContext
from calm_ray.peers.learner import make_learner
from calm_ray.peers.round_facts import round_facts
from calm_ray.swarm.desk import Desk
from calm_ray.swarm.rounds import SwarmOptimizer

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
    desk = Desk(context.bundle)
    context.swarm.call(lambda p2p: desk.serve(p2p, run_id=table.run_id), timeout_seconds=SERVE_TIMEOUT_SECONDS)
    context.report_with(lambda: {"epoch": optimizer.local_epoch, **round_facts(optimizer.rounds)})
    if context.spec.bundle is None:  # the first peer of a swarm has nobody to ask
        optimizer.wait_for_swarm(timeout_seconds=FIRST_FETCH_SECONDS)
    if optimizer.swarm_epoch > optimizer.local_epoch:
        context.tell("joining", f"downloading the state of epoch {optimizer.swarm_epoch}")
        optimizer.load_state_from_peers()
    optimizer.start()
    context.tell("assisting")
    while not context.stop.wait(TICK_SECONDS):
        if optimizer.failure is not None:
            raise optimizer.failure
    context.tell("leaving")
    optimizer.shutdown()
