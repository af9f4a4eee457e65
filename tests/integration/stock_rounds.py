"""Rounds of bare averagers and of ours: what stock hivemind does, and what we do, case by case.

The tests that judge are in `test_pitfalls_rounds.py` and `test_stock_wire.py`.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from hivemind.averaging.control import AveragingStage
from hivemind.compression import serialization
from hivemind.compression.quantization import Uniform8BitQuantization

from calm_ray.swarm.stock import StockAveraging
from calm_ray.swarm.verdict import RoundResult
from tests.eventually import eventually
from tests.integration.stock_nodes import (
    ATTACKS,
    BARE,
    CLIENT,
    MANY_ELEMENTS,
    NUM_ELEMENTS,
    TIMEOUT_SECONDS,
    Attack,
    FellApartError,
    GradientAverager,
    Nodes,
    bare_round,
    hostile,
    result_of,
    run_here,
    seen,
    slow_machine,
    vector_of,
)  # fmt: skip

# --- stock -----------------------------------------------------------------------------------------------------------


def stock_attacked(nodes: Nodes, attack: Attack) -> list[dict[str, Any]]:
    """Two honest bare peers of 1.0 and 3.0, and one that is not."""
    averagers = [nodes.bare(number, value, averager=GradientAverager) for number, value in enumerate((1.0, 3.0))]
    averagers.append(nodes.bare(2, attack.value, averager=hostile(attack), bandwidth=attack.bandwidth))
    return bare_round(averagers, [1.0, 1.0, 1.0], can_fall_apart=attack.num_elements == 1000)[:2]


def stock_eight_bits(nodes: Nodes) -> list[dict[str, Any]]:
    """Two bare peers with hivemind's own 8-bit codec, which this process has mended for itself."""
    codec = Uniform8BitQuantization()
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(serialization._BASE_COMPRESSION_TYPES, "UNIFORM_8BIT", codec)
        places = enumerate((1.0, 3.0))
        averagers = [nodes.bare(n, v, averager=GradientAverager, compression=codec) for n, v in places]
    return bare_round(averagers, [1.0, 1.0])


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
    eventually(
        lambda: all(control.stage == AveragingStage.RUNNING_ALLREDUCE or control.done() for control in early), 30
    )
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
    nodes: Nodes, peers: Sequence[StockAveraging], takes: Sequence[Callable[[], Any]], *, linger: float = 5.0,
    num_strangers: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """One round of gradients; each peer leaves as soon as it has its result."""

    def run(peer: StockAveraging, take: Callable[[], Any]) -> RoundResult:
        result = peer.average("gradients", 7, take, timeout_seconds=TIMEOUT_SECONDS)
        peer.close(linger_seconds=linger)
        return result

    with ThreadPoolExecutor(len(peers)) as threads:
        found = [nodes.told(result) for result in threads.map(run, peers, takes)]
    if max(each["size"] for each in found) < len(peers) + num_strangers:
        raise FellApartError(found)
    return found


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
    try:
        return average_all(nodes, peers, [brings(1.0), brings(3.0)], num_strangers=1)
    finally:
        result_of(control)
        stranger.shutdown()


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


if __name__ == "__main__":
    run_here(CASES)
