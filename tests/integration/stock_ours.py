"""One peer of ours under `wire = "hivemind-1.1"`, training the model of `stock.py` among bare optimizers.

    python -m tests.integration.stock_ours FOLDER RUN_ID EPOCHS TARGET_BATCH_SIZE SEED GATE ADDRESS

writes `FOLDER/ready`, then, once GATE is there, trains; `FOLDER/rounds.json` gets its rounds, `FOLDER/peer.pt` the
parameters after each epoch, a row each.
"""

import json
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from calm_ray.swarm.holder import StepRules
from calm_ray.swarm.node import NodeOptions, Swarm
from calm_ray.swarm.rounds import SwarmOptimizer
from calm_ray.swarm.verdict import RoundResult
from calm_ray.tables import AveragingTable
from calm_ray.training.optim import clip_gradient_, make_schedule
from tests.integration import stock

TABLE = AveragingTable(
    network="lan", matchmaking_seconds=stock.MATCHMAKING_SECONDS, compression="none", max_staleness=0,
    average_state_every=1,
)  # fmt: skip
RULES = StepRules(
    make_optimizer=partial(stock.make_optimizer, "adamw"), make_schedule=make_schedule(stock.ADAMW),
    before_step=partial(clip_gradient_, max_norm=1e9),
)  # fmt: skip


def main() -> None:
    folder, run_id, num_epochs, target, seed, gate, address = sys.argv[1:]
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    options = NodeOptions(is_client_mode=False, listen="/ip4/127.0.0.1/tcp/0", identity_path=Path(folder) / "identity")
    swarm = Swarm.join(run_id, initial_peers=[address], options=options)
    model = stock.make_model(0)
    optimizer = SwarmOptimizer(
        swarm, param_groups=[{"params": list(model.parameters())}], rules=RULES, averaging=TABLE,
        target_batch_size=int(target), num_epochs=int(num_epochs), wire="hivemind-1.1",
    )  # fmt: skip
    rounds: list[dict[str, Any]] = []

    def note(result: RoundResult, epoch: int) -> None:
        rounds.append({
            "epoch": epoch, "outcome": result.outcome, "is_true": result.is_true, "group_size": result.group_size,
            "detail": result.detail, "weights": dict(result.weights),
        })  # fmt: skip

    optimizer.on_round.append(note)
    (Path(folder) / "ready").touch()
    stock.wait_for_gate(Path(gate))
    after_each_epoch, step = {0: stock.flat(model)}, 0
    while optimizer.local_epoch < int(num_epochs):
        inputs, wanted = stock.make_batch(int(seed), step)
        torch.nn.functional.mse_loss(model(inputs), wanted).backward()
        optimizer.step(batch_size=len(inputs))
        optimizer.zero_grad()
        after_each_epoch.setdefault(optimizer.local_epoch, stock.flat(model))
        step += 1
        time.sleep(stock.SECONDS_PER_BATCH)  # sleep: stands for the computing of a model that has some size
    torch.save(after_each_epoch, Path(folder) / "peer.pt")
    resyncs = optimizer.rounds.num_resyncs
    (Path(folder) / "rounds.json").write_text(json.dumps({"rounds": rounds, "num_resyncs": resyncs}))
    optimizer.shutdown()
    swarm.close()
    os._exit(0)


if __name__ == "__main__":
    main()
