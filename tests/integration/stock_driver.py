"""Two of our peers in one process, on hivemind's wire, with just enough of a step controller to meet a bare optimizer.

    python -m tests.integration.stock_driver FOLDER RUN_ID EPOCHS TARGET_BATCH_SIZE BARE_PEER'S_ADDRESS

Each trains the model of `stock.py` by SGD. `FOLDER/rounds.json` gets every round of each peer, `FOLDER/peer-0.pt` its
parameters after each epoch. It begins when `FOLDER/gate` is there, after it has made `FOLDER/ready`.
"""

import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from hivemind.optim.progress_tracker import ProgressTracker
from hivemind.utils import get_dht_time

from calm_ray.swarm.limits import RoundLimits
from calm_ray.swarm.node import NodeOptions, Swarm
from calm_ray.swarm.stock import StockAveraging
from calm_ray.swarm.verdict import RoundResult
from tests.integration import stock

NUM_PEERS = 2
TIMEOUT_SECONDS = 30.0
LIMITS = RoundLimits(
    request_seconds=1.0, matchmaking_seconds=stock.MATCHMAKING_SECONDS, grace_seconds=1.0, chunk_seconds=5.0,
    round_seconds=15.0,
)  # fmt: skip


@dataclass
class Peer:
    """A peer of ours: joins and forks when made; `train` runs in a thread."""

    number: int
    folder: Path
    swarm: Swarm
    averaging: StockAveraging
    target_batch_size: int
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def train(self, num_epochs: int) -> None:
        tracker = ProgressTracker(
            self.swarm.dht, self.swarm.run_id, self.target_batch_size, private_key=self.swarm.key, start=True,
            min_refresh_period=0.2, default_refresh_period=0.5, max_refresh_period=1.0,
        )  # fmt: skip
        model = stock.make_model(0)
        after_each_epoch, step = [stock.flat(model)], 0
        for epoch in range(num_epochs):
            summed, samples = torch.zeros_like(after_each_epoch[0]), 0
            round_thread: threading.Thread | None = None
            is_complete, results = threading.Event(), []

            def take() -> tuple[torch.Tensor, float]:
                is_complete.wait(TIMEOUT_SECONDS)  # noqa: B023  joined before the next epoch
                return summed / max(1, samples), float(samples)  # noqa: B023

            while not tracker.ready_to_update_epoch:
                inputs, wanted = stock.make_batch(100 + self.number, step)
                torch.nn.functional.mse_loss(model(inputs), wanted).backward()
                gradient = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
                summed, samples, step = summed + len(inputs) * gradient, samples + len(inputs), step + 1
                model.zero_grad()
                tracker.report_local_progress(epoch, samples)
                is_soon = tracker.estimated_next_update_time - get_dht_time() < LIMITS.matchmaking_seconds
                if is_soon and round_thread is None:  # as bare peers do: look for the group ahead of the boundary
                    round_thread = threading.Thread(
                        target=lambda: results.append(self._average("gradients", epoch, take))  # noqa: B023
                    )
                    round_thread.start()
                time.sleep(0.05)  # sleep: stands for the computing of a model that has some size
            with tracker.pause_updates():
                is_complete.set()
                if round_thread is not None:
                    round_thread.join()
                gradients = results[0] if results else self._average("gradients", epoch, take)
                if gradients.average is not None:
                    self._move(model, stock.flat(model) - stock.LEARNING_RATES["sgd"] * gradients.average)
                state = self._average("state", epoch + 1, lambda: (stock.flat(model), 1.0))
                if state.average is not None:
                    self._move(model, state.average)
                tracker.update_epoch(epoch + 1)
            after_each_epoch.append(stock.flat(model))
        torch.save(torch.stack(after_each_epoch), self.folder / f"peer-{self.number}.pt")
        tracker.shutdown(2.0)

    def _average(self, kind: Any, epoch: int, take: Any) -> RoundResult:
        result = self.averaging.average(kind, epoch, take, timeout_seconds=TIMEOUT_SECONDS)
        told = {name: value for name, value in asdict(result).items() if name not in ("average", "residual")}
        self.rounds.append({"kind": kind, "epoch": epoch, "is_true": result.is_true, **told})
        return result

    @staticmethod
    def _move(model: torch.nn.Module, vector: torch.Tensor) -> None:
        torch.nn.utils.vector_to_parameters(vector, model.parameters())


def make_peer(number: int, folder: Path, run_id: str, initial_peers: list[str], target_batch_size: int) -> Peer:
    options = NodeOptions(is_client_mode=False, listen="/ip4/127.0.0.1/tcp/0", identity_path=folder / f"id-{number}")
    swarm = Swarm.join(run_id, initial_peers=initial_peers, options=options)
    averaging = StockAveraging(
        swarm, shapes=[p.shape for p in stock.make_model(0).parameters()], compression="none", limits=LIMITS,
        max_weight=1e4,
    )  # fmt: skip
    return Peer(number, folder, swarm, averaging, target_batch_size)


def main() -> None:
    folder, run_id, num_epochs, target, address = sys.argv[1:]
    torch.set_num_threads(1)
    peers = [make_peer(number, Path(folder), run_id, [address], int(target)) for number in range(NUM_PEERS)]
    (Path(folder) / "ready").touch()
    stock.wait_for_gate(Path(folder) / "gate")
    threads = [threading.Thread(target=peer.train, args=(int(num_epochs),)) for peer in peers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (Path(folder) / "rounds.json").write_text(json.dumps([peer.rounds for peer in peers]))
    for peer in peers:
        peer.averaging.close(linger_seconds=5.0)
        peer.swarm.close()
    os._exit(0)


if __name__ == "__main__":
    main()
