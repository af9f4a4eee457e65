"""What a DHT process of stock hivemind does not survive, and how ours are used: cases of `test_pitfalls_peers.py`."""

import sys
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import hivemind
import pytest
import torch
from hivemind.p2p import P2P
from hivemind.utils import get_dht_time

from calm_ray.errors import StateUnavailable
from calm_ray.report import MAX_REPORT_BYTES
from calm_ray.swarm import catchup
from calm_ray.swarm.doing import Doing
from calm_ray.swarm.donor import TrainingStateAverager
from calm_ray.swarm.holder import HeldState, StateHolder, StepRules
from calm_ray.swarm.roster import Roster
from calm_ray.tables import OptimizerTable
from calm_ray.training.optim import clip_gradient_, make_optimizer, make_schedule
from tests.eventually import eventually
from tests.integration.stock_nodes import Nodes, run_here

LARGE_BYTES = 200_000
NUM_TRIES = 60
WAIT_SECONDS = 5.0


def stock_large_value(nodes: Nodes) -> dict[str, Any]:
    """Store a large value, again and again, until one call is not answered, or the DHT process is gone."""
    dht = hivemind.DHT(initial_peers=nodes.swarms[0].addresses(), start=True)
    stored: list[bool] = []

    def store() -> None:
        for number in range(NUM_TRIES):
            expiration = get_dht_time() + 60 + number
            stored.append(dht.store("large", b"x" * LARGE_BYTES, expiration, return_future=True).result(WAIT_SECONDS))

    # In a thread, as a call to a DHT process that dies meanwhile never comes back, not even with `return_future`.
    caller = threading.Thread(target=store, daemon=True)
    caller.start()
    eventually(lambda: not caller.is_alive() or not dht.is_alive(), NUM_TRIES + WAIT_SECONDS)
    return {"num_stored": len(stored), "is_alive": dht.is_alive()}


def ours_large_report(nodes: Nodes) -> dict[str, Any]:
    """The largest report that we allow, as often."""
    swarm = nodes.swarms[1]
    stored = [swarm.publish(b"x" * MAX_REPORT_BYTES, lifetime_seconds=60 + n) for n in range(NUM_TRIES)]
    try:
        swarm.publish(b"x" * (MAX_REPORT_BYTES + 1), lifetime_seconds=60)
    except AssertionError as exc:
        return {"num_stored": sum(stored), "is_alive": not swarm.lost_process(), "refused": str(exc)}
    return {"refused": ""}


def stock_late_function(nodes: Nodes) -> dict[str, Any]:
    """Have the DHT process run a function that was defined after it was forked: it cannot find it."""
    dht = hivemind.DHT(initial_peers=nodes.swarms[0].addresses(), start=True)

    async def late(_dht: Any, _node: Any) -> int:
        return 7

    late.__qualname__ = "late"
    sys.modules[__name__].late = late  # type: ignore[attr-defined]
    future = dht.run_coroutine(late, return_future=True)
    try:
        answer: Any = future.result(WAIT_SECONDS)
    except TimeoutError:
        answer = "none"
    dht.join(WAIT_SECONDS)
    return {"answer": answer, "is_alive": dht.is_alive()}


def ours_late_function(nodes: Nodes) -> dict[str, Any]:
    swarm = nodes.swarms[1]

    async def late(p2p: P2P) -> str:
        return str(p2p.peer_id)

    answer = swarm.call(late, timeout_seconds=WAIT_SECONDS)
    return {"answer": answer == swarm.peer_id, "is_alive": not swarm.lost_process()}


def ours_other_model(nodes: Nodes) -> dict[str, Any]:
    """Everyone who offers a state has another model's."""
    table = OptimizerTable(name="adamw", learning_rate=0.1, decay_epochs=10)
    rules = StepRules(
        make_optimizer=partial(make_optimizer, table=table), make_schedule=make_schedule(table),
        before_step=partial(clip_gradient_, max_norm=1.0),
    )  # fmt: skip

    def holder(width: int) -> StateHolder:
        return StateHolder([{"params": [torch.nn.Parameter(torch.ones(width))]}], rules=rules, should_offload=True)

    num_asked = 0

    def copy(_: TrainingStateAverager) -> HeldState:
        nonlocal num_asked
        num_asked += 1
        return theirs.snapshot()

    theirs, ours = holder(65), holder(64)
    donor = type("TrainingStateAverager", (TrainingStateAverager,), {"_copy": copy})(theirs.snapshot)
    newcomer, other = nodes.swarms[0], nodes.swarms[1]
    other.call(lambda p2p: donor.serve(p2p, run_id=other.run_id), timeout_seconds=WAIT_SECONDS)
    roster = Roster(other, refresh_seconds=1.0)
    roster.offer(lambda: 3.0)
    roster.refresh(timeout_seconds=WAIT_SECONDS)
    said = ""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(catchup, "STATE_PAUSE_SECONDS", 0.1)
        unused: Any = None
        wire: Any = SimpleNamespace(out_of_step=())
        catcher = catchup.Catcher(newcomer, holder=ours, wire=wire, tracker=unused, roster=roster, doing=Doing())
        try:
            catcher.download(min_epoch=0, stop=threading.Event())
        except StateUnavailable as exc:
            said = str(exc)
    roster.close()
    return {"num_asked": num_asked, "max_tries": catchup.MAX_STATE_TRIES, "said": said}


CASES: dict[str, Callable[[Nodes], Any]] = {
    name: case for name, case in globals().items() if name.startswith(("stock_", "ours_"))
}

if __name__ == "__main__":
    run_here(CASES)
