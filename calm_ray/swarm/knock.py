"""One request to one leader: who calls us elsewhere while it is silent, and what its answer means."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from calm_ray.swarm.gathering import Key
from calm_ray.swarm.group import Group
from calm_ray.swarm.limits import RoundLimits
from calm_ray.swarm.messages import MAX_EPOCH, Malformed, unpack_group
from calm_ray.swarm.wires import Behind

logger = logging.getLogger(__name__)

MAX_ID_LENGTH = 64
T = TypeVar("T")


class Calls:
    """The last leader that called us to a round of its own."""

    def __init__(self) -> None:
        self._last: tuple[Key, str] | None = None
        self._is_new = asyncio.Event()

    def note(self, key: Key, leader: str) -> None:
        self._last = (key, leader)
        self._is_new.set()

    def take(self, key: Key) -> str | None:
        """Who has called us to `key` since we last asked, if anybody."""
        self._is_new.clear()
        call, self._last = self._last, None
        return call[1] if call is not None and call[0] == key else None

    async def wait(self) -> None:
        await self._is_new.wait()


async def unless_called(asking: Coroutine[Any, Any, T], calls: Calls, *, key: Key, leader: str) -> T | str:
    """What `asking` gives; or who calls us to `key` while `leader`, whom we ask, is silent: it may be dead."""
    task, calling = asyncio.create_task(asking), asyncio.create_task(calls.wait())
    try:
        while True:
            await asyncio.wait({task, calling}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if (caller := calls.take(key)) not in (None, leader):
                return caller
            calling = asyncio.create_task(calls.wait())
    finally:
        task.cancel()
        calling.cancel()


def understand(
    fields: dict[str, Any], *, leader: str, key: Key, own_peer_id: str, limits: RoundLimits
) -> Group | str | None:
    """The group; another leader to ask; None if it does not have us. Raises Behind, or Malformed."""
    match fields.get("type"):
        case "begin":
            return unpack_group(fields, kind=key[0], epoch=key[1], own_peer_id=own_peer_id, own_limits=limits)
        case "over":
            epoch = fields.get("epoch")
            if not isinstance(epoch, int) or not key[1] <= epoch <= MAX_EPOCH:
                raise Malformed("over")
            raise Behind(epoch, leader)
        case "redirect":
            to = fields.get("to")
            return to if isinstance(to, str) and len(to) <= MAX_ID_LENGTH else None
        case "refused":
            logger.debug("matchmaking kind=%s epoch=%d leader=%s refused=%r", *key, leader, fields.get("why"))
            return None
    raise Malformed("type")
