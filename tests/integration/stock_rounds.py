"""Rounds of bare averagers and of ours in one process tree: what stock hivemind does, and what we do, case by case.

    python -m tests.integration.stock_rounds FOUND.json CASE...

runs the cases one after the other on the same four DHT nodes, the last of them a client, and writes what each found. A
process of its own, as every averager is forked. The tests that judge are in `test_pitfalls_rounds.py` and
`test_stock_wire.py`.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.averaging.control import AveragingStage
from hivemind.averaging.partition import TensorPartContainer
from hivemind.compression import serialize_torch_tensor
from hivemind.utils.asyncio import as_aiter, azip

from calm_ray.swarm.limits import RoundLimits
from calm_ray.swarm.node import NodeOptions, Swarm
from calm_ray.swarm.stock import StockAveraging
from calm_ray.swarm.verdict import RoundResult
from tests.eventually import Children, eventually
from tests.shards import ROOT

SHAPES = [torch.Size([300_000]), torch.Size([400, 500]), torch.Size([7])]
NUM_ELEMENTS = sum(shape.numel() for shape in SHAPES)
MANY_ELEMENTS = 4_000_000
LIMITS = RoundLimits(
    request_seconds=1.0, matchmaking_seconds=1.5, grace_seconds=1.0, chunk_seconds=3.0, round_seconds=15.0
)
TIMEOUT_SECONDS = 30.0
CLIENT = 3

BARE: dict[str, Any] = {
    "start": True, "min_matchmaking_time": 1.5, "request_timeout": 0.7, "next_chunk_timeout": 3.0,
    "allreduce_timeout": 8.0,
}  # fmt: skip


def vector_of(value: float, num_elements: int = NUM_ELEMENTS) -> torch.Tensor:
    """`value` to twice `value`: no two numbers alike, so that nothing that lands in a wrong place passes for right."""
    return value * torch.linspace(1.0, 2.0, num_elements)


def values_in(vector: torch.Tensor) -> torch.Tensor:
    """Undo `vector_of`: everywhere the same if the vector is right."""
    return vector / torch.linspace(1.0, 2.0, len(vector))


class Nodes:
    """Three full peers and a client, all on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.swarms: list[Swarm] = []
        for number in range(4):
            self.join(is_client_mode=number == CLIENT)

    def join(self, *, is_client_mode: bool = False) -> int:
        """One more peer: for cases that kill a process, whose daemon is no use any more after that. Its number."""
        number, known = len(self.swarms), self.swarms[0].addresses() if self.swarms else []
        options = NodeOptions(
            is_client_mode=is_client_mode, listen="/ip4/127.0.0.1/tcp/0", identity_path=self._folder / f"id-{number}"
        )
        self.swarms.append(Swarm.join("rounds", initial_peers=known, options=options))
        return number

    def bare(self, number: int, value: float, *, averager: type[DecentralizedAverager], **options: Any) -> Any:
        """An averager as a bare optimizer's."""
        parts = vector_of(value).split([shape.numel() for shape in SHAPES])
        tensors = [part.reshape(shape).clone() for part, shape in zip(parts, SHAPES, strict=True)]
        return averager(tensors, self.swarms[number].dht, prefix="rounds_grad_averager", **{**BARE, **options})

    def ours(self, *numbers: int, compression: str = "none", num_elements: int = 0) -> list[StockAveraging]:
        shapes = [torch.Size([num_elements])] if num_elements else SHAPES
        return [
            StockAveraging(self.swarms[n], shapes=shapes, compression=compression, limits=LIMITS, max_weight=1e4)
            for n in numbers
        ]

    def told(self, result: RoundResult) -> dict[str, Any]:
        """A result as JSON; peers by their numbers."""
        names = {swarm.peer_id: str(number) for number, swarm in enumerate(self.swarms)}
        found: dict[str, Any] = {
            "outcome": result.outcome, "detail": result.detail, "is_true": result.is_true, "size": result.group_size,
            "senders": result.num_senders, "missing": result.missing_fraction, "seconds": result.seconds,
            "sent": result.bytes_sent, "received": result.bytes_received,
            "weights": {names[peer]: weight for peer, weight in result.weights.items()},
            "banned": {names[peer]: reason for peer, reason in result.banned.items()},
        }  # fmt: skip
        if result.average is not None:
            values = values_in(result.average)
            found["least"], found["most"] = float(values.min()), float(values.max())
        return found


@contextlib.contextmanager
def slow_machine() -> Iterator[None]:
    """Averagers made here take a while for every averaged part that they get."""
    with pytest.MonkeyPatch.context() as patched:
        register = TensorPartContainer.register_processed_part

        def register_slowly(*args: Any) -> None:
            time.sleep(0.05)  # sleep: is a slow machine
            register(*args)

        patched.setattr(TensorPartContainer, "register_processed_part", register_slowly)
        yield


class GradientAverager(DecentralizedAverager):
    """Stock's averager under the name that a bare optimizer's has on the wire."""


def seen(averager: Any, result: Any) -> dict[str, Any]:
    """What a bare peer has after a round, and what `step` returned."""
    with averager.get_tensors() as tensors:
        values = values_in(torch.cat([tensor.flatten() for tensor in tensors]))
        return {
            "group_size": len(result) if isinstance(result, dict) else None, "error": repr(result),
            "least": float(values.min()), "most": float(values.max()), "is_finite": bool(values.isfinite().all()),
        }  # fmt: skip


def bare_round(averagers: Sequence[Any], weights: Sequence[float | None]) -> list[dict[str, Any]]:
    controls = [a.step(wait=False, timeout=TIMEOUT_SECONDS, weight=w) for a, w in zip(averagers, weights, strict=True)]
    found = [seen(a, result_of(control)) for a, control in zip(averagers, controls, strict=True)]
    for averager in averagers:
        averager.shutdown()
    return found


def result_of(control: Any) -> Any:
    try:
        return control.result(TIMEOUT_SECONDS)
    except Exception as exc:  # noqa: BLE001  is what the case is about
        return exc


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What a hostile peer makes of the parts that it sends."""

    value: float = 100.0
    weight: float = 1.0
    num_elements: int | None = None
    """Of each part, whatever it should have."""
    bandwidth: float | None = 0.0
    """0: it averages nothing for others, and can do no harm as a reducer."""


ATTACKS = {
    "nan": Attack(value=float("nan")),
    "weight": Attack(weight=1e9),
    "one-element": Attack(value=1e4, num_elements=1),
    "short": Attack(num_elements=1000),
}


class _HostileRunner(AllReduceRunner):
    attack: Attack

    async def _generate_input_for_peer(self, peer_index: int) -> Any:
        async for message in super()._generate_input_for_peer(peer_index):
            numel = self.attack.num_elements or sum(message.tensor_part.size)
            message.tensor_part.CopyFrom(serialize_torch_tensor(torch.full((numel,), self.attack.value)))
            message.weight = self.attack.weight
            yield message


def hostile(attack: Attack) -> type[DecentralizedAverager]:
    """A class of averagers that look like everybody's and send what `attack` says."""

    async def attack_with(self: Any, tensors: Any, group_info: Any, group_id: Any = None, **kwargs: Any) -> None:
        runner_class = type("_Runner", (_HostileRunner,), {"attack": attack})
        runner = runner_class(
            p2p=self._p2p, servicer_type=type(self), prefix=self.prefix, tensors=tensors,
            group_id=group_info.group_id, ordered_peer_ids=group_info.peer_ids, **kwargs,
        )  # fmt: skip
        self._running_groups[group_info.group_id].set_result(runner)
        async for tensor, update in azip(as_aiter(*tensors), runner):
            tensor.add_(update)

    return type("GradientAverager", (DecentralizedAverager,), {"_run_allreduce_inplace_": attack_with})


# --- stock -----------------------------------------------------------------------------------------------------------


def stock_attacked(nodes: Nodes, attack: Attack) -> list[dict[str, Any]]:
    """Two honest bare peers of 1.0 and 3.0, and one that is not."""
    averagers = [nodes.bare(number, value, averager=GradientAverager) for number, value in enumerate((1.0, 3.0))]
    averagers.append(nodes.bare(2, attack.value, averager=hostile(attack), bandwidth=attack.bandwidth))
    return bare_round(averagers, [1.0, 1.0, 1.0])[:2]


def stock_weightless(nodes: Nodes) -> list[dict[str, Any]]:
    averagers = [nodes.bare(number, 1.0, averager=GradientAverager) for number in range(2)]
    return bare_round(averagers, [0.0, 0.0])


def stock_mate_dies(nodes: Nodes) -> dict[str, Any]:
    """Two bare peers find each other; then one is killed."""
    places = ((0, 1.0), (nodes.join(), 3.0))
    survivor, victim = (nodes.bare(n, v, averager=GradientAverager) for n, v in places)
    controls = [a.step(wait=False, timeout=TIMEOUT_SECONDS, require_trigger=True) for a in (survivor, victim)]
    eventually(lambda: all(control.stage == AveragingStage.AWAITING_TRIGGER for control in controls), 20)
    victim.kill()
    controls[0].allow_allreduce()
    found = seen(survivor, result_of(controls[0]))
    survivor.shutdown()
    return found


def stock_cut_off(nodes: Nodes) -> list[dict[str, Any]]:
    """A full peer and a client average 16 MB; the full peer leaves as soon as it has its own result."""

    def averager(number: int, value: float) -> Any:
        tensors = [vector_of(value, MANY_ELEMENTS)]
        return GradientAverager(tensors, nodes.swarms[number].dht, prefix="rounds_grad_averager", **BARE)

    full = averager(0, 1.0)
    with slow_machine():
        client = averager(CLIENT, 3.0)
    controls = [a.step(wait=False, timeout=TIMEOUT_SECONDS) for a in (full, client)]
    found = [seen(full, result_of(controls[0]))]
    full.shutdown()
    found.append(seen(client, result_of(controls[1])))
    client.shutdown()
    return found


def stock_fragments(nodes: Nodes) -> list[int | None]:
    """Four bare peers end one epoch; two of them some seconds later than the others."""
    averagers = [nodes.bare(number, float(number), averager=GradientAverager) for number in range(4)]
    early = [a.step(wait=False, timeout=TIMEOUT_SECONDS) for a in averagers[:2]]
    eventually(lambda: all(control.stage == AveragingStage.RUNNING_ALLREDUCE or control.done() for control in early))
    late = [a.step(wait=False, timeout=TIMEOUT_SECONDS) for a in averagers[2:]]
    found = [seen(a, result_of(c))["group_size"] for a, c in zip(averagers, [*early, *late], strict=True)]
    for averager in averagers:
        averager.shutdown()
    return found


def stock_integers(nodes: Nodes) -> list[dict[str, Any]]:
    """Two bare peers whose tensors are, as BatchNorm's counters, integers."""
    averagers = [
        GradientAverager(
            [torch.ones(10), torch.full((1,), n)], nodes.swarms[n].dht, prefix="rounds_grad_averager", **BARE
        )
        for n in range(2)
    ]
    controls = [a.step(wait=False, timeout=10.0, allow_retries=False) for a in averagers]
    found = [{"error": repr(result_of(control))} for control in controls]
    for averager in averagers:
        averager.shutdown()
    return found


# --- ours, on the same wire ------------------------------------------------------------------------------------------


def average_all(
    nodes: Nodes, peers: Sequence[StockAveraging], takes: Sequence[Callable[[], Any]], *, linger: float = 5.0
) -> list[dict[str, Any]]:
    """One round of gradients; each peer leaves as soon as it has its result."""

    def run(peer: StockAveraging, take: Callable[[], Any]) -> RoundResult:
        result = peer.average("gradients", 7, take, timeout_seconds=TIMEOUT_SECONDS)
        peer.close(linger_seconds=linger)
        return result

    with ThreadPoolExecutor(len(peers)) as threads:
        return [nodes.told(result) for result in threads.map(run, peers, takes)]


def brings(value: float, weight: float = 1.0, *, num_elements: int = NUM_ELEMENTS) -> Callable[[], Any]:
    return lambda: (vector_of(value, num_elements), weight)


def ours_mixed(nodes: Nodes, compression: str) -> list[dict[str, Any]]:
    """Two full peers, one that only reads, and a client."""
    peers = nodes.ours(0, 1, 2, CLIENT, compression=compression)
    return average_all(nodes, peers, [brings(1.0, 1.0), brings(3.0, 2.0), lambda: None, brings(5.0, 5.0)])


def ours_attacked(nodes: Nodes, attack: Attack) -> list[dict[str, Any]]:
    """Two of ours with 1.0 and 3.0, and a bare peer that is hostile."""
    peers = nodes.ours(0, 1)
    stranger = nodes.bare(2, attack.value, averager=hostile(attack), bandwidth=attack.bandwidth)
    control = stranger.step(wait=False, timeout=TIMEOUT_SECONDS, weight=1.0)
    found = average_all(nodes, peers, [brings(1.0), brings(3.0)])
    result_of(control)
    stranger.shutdown()
    return found


def ours_own_nan(nodes: Nodes) -> list[dict[str, Any]]:
    peers = nodes.ours(0, 1, 2)
    return average_all(nodes, peers, [brings(1.0), brings(3.0), brings(float("nan"))])


def ours_weightless(nodes: Nodes) -> list[dict[str, Any]]:
    return average_all(nodes, nodes.ours(0, 1), [lambda: None, lambda: None])


def ours_mate_dies(nodes: Nodes) -> list[dict[str, Any]]:
    """Both of ours have found each other; then the second one's averaging process is killed."""
    peers = nodes.ours(0, nodes.join())
    victim = peers[1]._processes["gradients"]

    def wait_for_death() -> tuple[torch.Tensor, float]:
        eventually(lambda: not victim.is_alive(), 20)
        return vector_of(1.0), 1.0

    def die() -> tuple[torch.Tensor, float]:
        victim.kill()
        return vector_of(3.0), 1.0

    found = average_all(nodes, peers, [wait_for_death, die], linger=0.0)
    return [*found, {"is_alive": [peer.is_alive() for peer in peers]}]


def ours_without_process(nodes: Nodes) -> dict[str, Any]:
    (peer,) = nodes.ours(nodes.join())
    peer._processes["gradients"].kill()
    started = time.monotonic()
    found = nodes.told(peer.average("gradients", 7, brings(1.0), timeout_seconds=TIMEOUT_SECONDS))
    peer.close(linger_seconds=0.0)
    return {**found, "seconds": time.monotonic() - started}


def ours_stuck(nodes: Nodes) -> dict[str, Any]:
    """The averaging process is there and does not answer."""
    (peer,) = nodes.ours(nodes.join())
    pid = peer._processes["gradients"].pid
    os.kill(pid, signal.SIGSTOP)
    found = nodes.told(peer.average("gradients", 7, brings(1.0), timeout_seconds=3.0))
    os.kill(pid, signal.SIGCONT)
    peer.close(linger_seconds=0.0)
    return found


def ours_alone(nodes: Nodes) -> dict[str, Any]:
    (peer,) = nodes.ours(0)
    found = nodes.told(peer.average("gradients", 7, brings(1.0), timeout_seconds=5.0))
    peer.close()
    return found


def ours_cut_off(nodes: Nodes) -> list[dict[str, Any]]:
    """As `stock_cut_off`: the full peer leaves at once, or would."""
    peers = nodes.ours(0, num_elements=MANY_ELEMENTS)
    with slow_machine():
        peers += nodes.ours(CLIENT, num_elements=MANY_ELEMENTS)
    takes = [brings(1.0, num_elements=MANY_ELEMENTS), brings(3.0, num_elements=MANY_ELEMENTS)]
    return average_all(nodes, peers, takes)


def ours_unlike_epochs(nodes: Nodes) -> list[dict[str, Any]]:
    peers = nodes.ours(0, 1)
    with ThreadPoolExecutor(2) as threads:
        rounds = [
            threads.submit(peer.average, "state", epoch, brings(1.0), timeout_seconds=TIMEOUT_SECONDS)
            for peer, epoch in zip(peers, (7, 8), strict=True)
        ]
        found = [nodes.told(each.result()) for each in rounds]
    for peer in peers:
        peer.close()
    return found


CASES: dict[str, Callable[[Nodes], Any]] = {
    **{f"stock_attacked_{name}": partial(stock_attacked, attack=attack) for name, attack in ATTACKS.items()},
    **{f"ours_attacked_{name}": partial(ours_attacked, attack=attack) for name, attack in ATTACKS.items()},
    "ours_attacked_by_reducer": partial(ours_attacked, attack=Attack(value=float("nan"), bandwidth=None)),
    **{f"ours_mixed_{codec}": partial(ours_mixed, compression=codec) for codec in ("none", "fp16", "8bit")},
    **{name: case for name, case in globals().items() if name.startswith(("stock_", "ours_"))},
}


def main() -> None:
    torch.set_num_threads(1)
    path, *names = sys.argv[1:]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        nodes = Nodes(Path(folder))
        for name in names:
            started = time.monotonic()
            try:
                found[name] = CASES[name](nodes)
            except Exception:  # noqa: BLE001  one case's failure is that case's
                found[name] = {"raised": traceback.format_exc()}
            print(f"{name}: {time.monotonic() - started:.1f} s {found[name]}", flush=True)
        for swarm in reversed(nodes.swarms):
            swarm.close()
    Path(path).write_text(json.dumps(found))
    os._exit(0)


def run_cases(folder: Path, *names: str, timeout: float = 110.0) -> dict[str, Any]:
    """For tests: run the cases in a process of their own."""
    with Children(folder) as children:
        argv = [sys.executable, "-W", "ignore", "-m", "tests.integration.stock_rounds", str(folder / "found.json")]
        child = children.start([*argv, *names], cwd=ROOT)
        assert child.wait(timeout) == 0, child.tail()
        found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    broken = {name: case["raised"] for name, case in found.items() if isinstance(case, dict) and "raised" in case}
    assert not broken, broken
    return found


if __name__ == "__main__":
    main()
