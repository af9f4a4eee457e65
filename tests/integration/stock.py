"""A bare `hivemind.Optimizer`, as its users write it, in a process of its own: what we must get along with.

    python -m tests.integration.stock --peer ADDRESS --run-id R --epochs 10 --seed 1 --folder F [--optimizer adamw] ...

writes `F/epoch-0001.pt` and so on, the flat parameters after each epoch; `F/events.jsonl`, one line for each epoch and
for what went wrong; `F/ready` when it trains. It leaves when `F/stop` is there or after `--epochs`, whichever is first.
"""

import argparse
import json
import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hivemind
import torch

from calm_ray.tables import OptimizerTable
from calm_ray.training import optim as training_optim
from tests.eventually import Child, Children, eventually
from tests.shards import ROOT

NUM_INPUTS, NUM_OUTPUTS, BATCH_SIZE = 16, 4, 8
MATCHMAKING_SECONDS = 3.0
SECONDS_PER_BATCH = 0.05
LEARNING_RATES = {"sgd": 0.1, "adamw": 1e-2}
ADAMW = OptimizerTable(name="adamw", learning_rate=LEARNING_RATES["adamw"], decay_epochs=1000)


def make_model(seed: int, *, hidden: int = 32) -> torch.nn.Sequential:
    """Some 700 parameters in four tensors; the same for a seed in every process and thread."""
    model = torch.nn.Sequential(
        torch.nn.Linear(NUM_INPUTS, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, NUM_OUTPUTS)
    )
    generator = torch.Generator().manual_seed(seed)  # torch's own one is shared by all threads
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def make_optimizer(name: str, params: Any) -> torch.optim.Optimizer:
    """Plain SGD; or the run's own AdamW, as somebody would use who wants to train with us."""
    if name == "sgd":
        return torch.optim.SGD(params, lr=LEARNING_RATES[name])
    return training_optim.make_optimizer(params, table=ADAMW)


def make_batch(seed: int, step: int, size: int = BATCH_SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples `step` of the trainer with this seed: inputs (size, 16) and what the model is to say, (size, 4)."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    inputs = torch.randn(size, NUM_INPUTS, generator=generator)
    return inputs, inputs[:, :NUM_OUTPUTS].sin()


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# --- the process -----------------------------------------------------------------------------------------------------


class _Events(logging.Handler):
    """Writes what hivemind says about rounds, and what the trainer does, one JSON object a line."""

    TELLING = ("Averaged", "failed", "out of sync", "local gradients", "no other peers", "Failed to load state")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("a", buffering=1)

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if any(words in message for words in self.TELLING):
            self.write("log", text=message.splitlines()[0][:200])

    def write(self, event: str, **values: Any) -> None:
        self._file.write(json.dumps({"event": event, "at": time.time(), **values}) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="multiaddress of any peer; without it, a swarm of its own")
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the data; the model's is --model-seed")
    parser.add_argument("--model-seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--optimizer", choices=sorted(LEARNING_RATES), default="sgd")
    parser.add_argument("--target-batch-size", type=int, default=256)
    parser.add_argument("--seconds-per-batch", type=float, default=SECONDS_PER_BATCH)
    parser.add_argument("--averaging-timeout", type=float, default=30.0)
    parser.add_argument("--next-chunk-timeout", type=float, default=5.0)
    parser.add_argument("--no-offload", action="store_true", help="hand over a torch optimizer, not a factory")
    parser.add_argument("--average-state-every", type=int, default=1)
    parser.add_argument("--client-mode-dht", action="store_true")
    parser.add_argument("--client-mode", action="store_true", help="say so to the optimizer too")
    parser.add_argument("--gate", type=Path, help="train when this file is there")
    parser.add_argument("--nan", action="store_true", help="poison every gradient")
    return parser.parse_args()


def main() -> None:
    args = _parse()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    events = _Events(args.folder / "events.jsonl")
    hivemind_log = logging.getLogger("hivemind")
    hivemind_log.addHandler(events)
    hivemind_log.setLevel(logging.INFO)
    dht = hivemind.DHT(initial_peers=[args.peer] if args.peer else None, client_mode=args.client_mode_dht, start=True)
    model = make_model(args.model_seed, hidden=args.hidden)
    how: dict[str, Any] = (
        {"optimizer": make_optimizer(args.optimizer, [{"params": list(model.parameters())}])}
        if args.no_offload
        else {"params": list(model.parameters()), "optimizer": lambda params: make_optimizer(args.optimizer, params)}
    )
    if args.optimizer == "adamw":
        how["scheduler"] = training_optim.make_schedule(ADAMW)
    optimizer = hivemind.Optimizer(
        dht=dht, run_id=args.run_id, target_batch_size=args.target_batch_size, batch_size_per_step=BATCH_SIZE,
        matchmaking_time=MATCHMAKING_SECONDS, averaging_timeout=args.averaging_timeout,
        next_chunk_timeout=args.next_chunk_timeout, average_state_every=args.average_state_every,
        averager_opts={"request_timeout": 1.0}, client_mode=True if args.client_mode else None, verbose=True,
        tracker_opts={"min_refresh_period": 0.2, "default_refresh_period": 0.5, "max_refresh_period": 1.0}, **how,
    )  # fmt: skip
    addresses = [str(address) for address in dht.get_visible_maddrs()] if not args.client_mode_dht else []
    ready = args.folder / "ready"
    ready.with_suffix(".part").write_text(json.dumps({"addresses": addresses, "peer_id": str(dht.peer_id)}))
    ready.with_suffix(".part").rename(ready)
    try:
        train(args, model, optimizer, events)
    except BaseException as exc:
        events.write("raised", error=repr(exc))
        raise
    finally:
        optimizer.shutdown()
        dht.shutdown()
        os._exit(0 if sys.exc_info()[0] is None else 1)  # hivemind's threads would keep the process for a while


def wait_for_gate(gate: Path | None) -> None:
    """So that all begin together, who take unlike times to start."""
    if gate is not None:
        eventually(gate.exists, 120, f"nobody opened {gate}")


def train(args: argparse.Namespace, model: torch.nn.Module, optimizer: Any, events: _Events) -> None:
    step, epoch, loss = 0, -1, torch.tensor(0.0)
    wait_for_gate(args.gate)
    while not (args.folder / "stop").exists():
        if optimizer.local_epoch != epoch:
            epoch = optimizer.local_epoch
            path = args.folder / f"epoch-{epoch:04d}.pt"
            torch.save(flat(model), path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
            num_peers = optimizer.tracker.global_progress.num_peers
            events.write("epoch", epoch=epoch, step=step, num_peers=num_peers, loss=float(loss))
            if epoch >= args.epochs:
                return
        inputs, wanted = make_batch(args.seed, step)
        loss = torch.nn.functional.mse_loss(model(inputs), wanted)
        loss.backward()
        if args.nan:
            for parameter in model.parameters():
                parameter.grad.fill_(float("nan"))  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        time.sleep(args.seconds_per_batch)  # sleep: stands for the computing of a model that has some size


# --- for tests -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bare:
    """A running bare optimizer."""

    folder: Path
    child: Child

    @property
    def addresses(self) -> list[str]:
        return list(json.loads((self.folder / "ready").read_text())["addresses"])

    @property
    def peer_id(self) -> str:
        return str(json.loads((self.folder / "ready").read_text())["peer_id"])

    def events(self, event: str) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [found for found in map(json.loads, lines) if found["event"] == event]

    def logged(self, words: str) -> list[str]:
        return [found["text"] for found in self.events("log") if words in found["text"]]

    def epoch(self) -> int:
        return max((found["epoch"] for found in self.events("epoch")), default=-1)

    def parameters(self, epoch: int) -> torch.Tensor:
        loaded: torch.Tensor = torch.load(self.folder / f"epoch-{epoch:04d}.pt", weights_only=True)
        return loaded

    def wait_for_epoch(self, epoch: int, timeout: float) -> None:
        eventually(lambda: self.epoch() >= epoch, timeout, self._story)

    def stop(self) -> None:
        (self.folder / "stop").touch()

    def _story(self) -> str:
        return f"epoch {self.epoch()}; {self.child.tail()}"


def start_bare(
    children: Children, folder: Path, *, run_id: str, peer: str | None = None, epochs: int = 1000, **options: Any
) -> Bare:
    """Start one and wait until it trains. `options` are the script's, underscores for dashes; True for a switch."""
    argv: list[str | Path] = [sys.executable, "-W", "ignore", "-m", "tests.integration.stock", "--folder", folder]
    argv += ["--run-id", run_id, "--epochs", str(epochs), *(["--peer", peer] if peer else [])]
    for name, value in options.items():
        argv += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    bare = Bare(folder=folder, child=children.start(argv, cwd=ROOT))

    def is_ready() -> bool:
        if not bare.child.is_running():
            raise RuntimeError(bare.child.tail())
        return (folder / "ready").exists()

    eventually(is_ready, 60, bare.child.tail)
    return bare


if __name__ == "__main__":
    main()
