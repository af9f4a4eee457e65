"""Four real DHT nodes in one process tree, bare averagers and ours on them, and hostile ones: what cases are made of.

Every averager is forked, so cases run in a process of their own, one after the other; tests read what they found.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.averaging.partition import TensorPartContainer
from hivemind.compression import serialize_torch_tensor
from hivemind.utils.asyncio import as_aiter, azip

from calm_ray.swarm.limits import RoundLimits
from calm_ray.swarm.node import NodeOptions, Swarm
from calm_ray.swarm.stock import StockAveraging
from calm_ray.swarm.verdict import RoundResult
from tests.eventually import Children
from tests.shards import ROOT

SHAPES = [torch.Size([300_000]), torch.Size([400, 500]), torch.Size([7])]
NUM_ELEMENTS = sum(shape.numel() for shape in SHAPES)
MANY_ELEMENTS = 4_000_000
LIMITS = RoundLimits(
    request_seconds=1.0, matchmaking_seconds=2.0, grace_seconds=1.0, chunk_seconds=3.0, round_seconds=15.0
)
TIMEOUT_SECONDS = 30.0
NUM_TRIES = 4
CLIENT = 3

BARE: dict[str, Any] = {
    "start": True, "min_matchmaking_time": 2.0, "request_timeout": 0.7, "next_chunk_timeout": 3.0,
    "allreduce_timeout": 8.0,
}  # fmt: skip


def vector_of(value: float, num_elements: int = NUM_ELEMENTS) -> torch.Tensor:
    """`value` to twice `value`: no two numbers alike, so that nothing that lands in a wrong place passes for right."""
    return value * torch.linspace(1.0, 2.0, num_elements)


def values_in(vector: torch.Tensor) -> torch.Tensor:
    """Undo `vector_of`: everywhere the same if the vector is right."""
    return vector / torch.linspace(1.0, 2.0, len(vector))


class FellApartError(Exception):
    """hivemind's matchmaking made more than one group: this machine is busy, and the case has to be tried again."""


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


def bare_round(
    averagers: Sequence[Any], weights: Sequence[float | None], *, can_fall_apart: bool = False
) -> list[dict[str, Any]]:
    controls = [a.step(wait=False, timeout=TIMEOUT_SECONDS, weight=w) for a, w in zip(averagers, weights, strict=True)]
    found = [seen(a, result_of(control)) for a, control in zip(averagers, controls, strict=True)]
    for averager in averagers:
        averager.shutdown()
    if not can_fall_apart and any((each["group_size"] or 0) < len(averagers) for each in found):
        raise FellApartError(found)
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


def run_here(cases: Mapping[str, Callable[[Nodes], Any]]) -> None:
    """The main function of a module of cases: `python -m MODULE FOUND.json CASE...`."""
    torch.set_num_threads(1)
    path, *names = sys.argv[1:]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        nodes = Nodes(Path(folder))
        for name in names:
            started = time.monotonic()
            for _ in range(NUM_TRIES):
                try:
                    found[name] = cases[name](nodes)
                    break
                except FellApartError:
                    found[name] = {"raised": traceback.format_exc()}
                except Exception:  # noqa: BLE001  one case's failure is that case's
                    found[name] = {"raised": traceback.format_exc()}
                    break
            print(f"{name}: {time.monotonic() - started:.1f} s {found[name]}", flush=True)
        for swarm in reversed(nodes.swarms):
            swarm.close()
    Path(path).write_text(json.dumps(found))
    os._exit(0)


def run_cases(folder: Path, module: str, *names: str, timeout: float = 110.0) -> dict[str, Any]:
    """For tests: run cases of tests/integration/MODULE.py in a process of their own. AssertionError if one raised."""
    with Children(folder) as children:
        argv = [sys.executable, "-W", "ignore", "-m", f"tests.integration.{module}", str(folder / "found.json")]
        child = children.start([*argv, *names], cwd=ROOT)
        assert child.wait(timeout) == 0, child.tail()
        found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    broken = {name: case["raised"] for name, case in found.items() if isinstance(case, dict) and "raised" in case}
    assert not broken, broken
    return found
