"""One Ray actor holds one peer process, by its lease. Detached: neither driver nor supervisor take it along.

The actor is a thin shell. hivemind forks, and a Ray worker holds gRPC threads: they never share a process. When its
worker dies, Ray makes the actor of an auxiliary peer or monitor again on its node, and that adopts the peer that still
runs there; a trainer leaves, and the supervisor alone decides where the next one starts.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import ray

from calm_ray.actors.desired import ActorReport, Orders
from calm_ray.actors.keeper import Keeper, answers, find_bundle, own_bundle
from calm_ray.actors.parent import end_with_parent


class PeerActor:
    """Begins by itself, for nobody else is there when Ray makes it again. Everything crosses as JSON."""

    def __init__(self, orders_json: str) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)
        end_with_parent()
        self._orders = Orders.model_validate_json(orders_json)
        context = ray.get_runtime_context()
        self._node_id = context.get_node_id()
        # An actor without a GPU would otherwise see all of the node's: trainers get exactly what Ray assigned.
        has_gpu = bool(context.get_accelerator_ids().get("GPU"))
        self._keeper = Keeper(self._orders, environment={} if has_gpu else {"CUDA_VISIBLE_DEVICES": ""})
        spec = self._orders.spec
        self._needs_bundle = spec.bundle is not None and find_bundle(self._orders) is None and not answers(spec.folder)
        if not self._needs_bundle:
            self._keeper.start()

    def take_bundle(self, parts: Mapping[str, bytes]) -> None:
        """The run's bundle, on a machine that does not have it."""
        if not self._needs_bundle:
            return
        for name, data in parts.items():
            path = own_bundle(self._orders) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self._needs_bundle = False
        self._keeper.start()

    def look(self) -> str:
        """An ActorReport."""
        keeper = self._keeper
        return ActorReport(
            peer=keeper.status, node_id=self._node_id, worker_pid=os.getpid(), is_adopted=keeper.is_adopted,
            num_revivals=keeper.num_revivals, needs_bundle=self._needs_bundle,
        ).model_dump_json()  # fmt: skip

    def stop(self) -> int:
        """Leave and wait; the exit code."""
        return self._keeper.stop()


def read_bundle(folder: Path) -> dict[str, bytes]:
    """A sealed bundle as one value for Ray's object store."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
