"""One Ray actor holds one peer process, by its lease. Detached: neither driver nor supervisor take it along.

The actor is a thin shell. hivemind forks, and a Ray worker holds gRPC threads: they never share a process. When its
worker dies, Ray makes the actor of an auxiliary peer or monitor again on its node, and that adopts the peer that still
runs there; a trainer leaves, and the supervisor alone decides where the next one starts.
"""

import logging
import os
from collections.abc import Mapping

import ray

from calm_ray.actors.bundles import find_bundle, read_bundle, store_bundle
from calm_ray.actors.desired import ActorReport, Orders
from calm_ray.actors.keeper import Keeper
from calm_ray.errors import CalmRayError
from calm_ray.parent import end_with_parent
from calm_ray.peers.control import ask
from calm_ray.peers.endings import disk_words


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
        self._keeper = Keeper(
            self._orders, environment={} if has_gpu else {"CUDA_VISIBLE_DEVICES": ""},
            has_news=not context.was_current_actor_reconstructed,
        )  # fmt: skip
        spec = self._orders.spec
        self._needs_bundle = (
            spec.bundle is not None and find_bundle(self._orders) is None and ask(spec.folder) is None
        )  # fmt: skip
        if not self._needs_bundle:
            self._keeper.start()

    def take_bundle(self, parts: Mapping[str, bytes]) -> str:
        """The run's bundle, on a machine that does not have it. Why it is not taken, or an empty string."""
        if not self._needs_bundle:
            return ""
        try:
            store_bundle(self._orders, parts)
        except OSError as exc:
            return f"{self._orders.spec.folder}: {disk_words(exc)}"
        except CalmRayError as exc:
            return str(exc)
        self._needs_bundle = False
        self._keeper.start()
        return ""

    def give_bundle(self) -> dict[str, bytes]:
        """The bundle that is on this machine, or nothing: for one that lacks it, when its home is gone."""
        place = find_bundle(self._orders)
        return read_bundle(place) if place is not None else {}

    def ask_again(self, asked_at: float) -> None:
        """A person has asked for the run again."""
        self._keeper.ask_again(asked_at)

    def look(self) -> str:
        """An ActorReport."""
        keeper = self._keeper
        asked_at = keeper.asked_at  # first: what is read later may be newer, never older
        return ActorReport(
            peer=keeper.status, node_id=self._node_id, worker_pid=os.getpid(), is_adopted=keeper.is_adopted,
            num_revivals=keeper.num_revivals, asked_at=asked_at, needs_bundle=self._needs_bundle,
        ).model_dump_json()  # fmt: skip

    def stop(self) -> int:
        """Leave and wait; the exit code. CalmRayError if it cannot be told that it left."""
        return self._keeper.stop()
