"""Callers who know of a group before we do wait here for us to begin it: news of it does not reach all at once."""

import asyncio
from collections import Counter, OrderedDict
from typing import Generic, TypeVar

R = TypeVar("R")

EARLY_SECONDS = 15.0
MAX_EARLY_CALLS, MAX_EARLY_CALLS_PER_PEER = 1024, 16
"""A peer's own limit is above what it needs, two rounds at once; nobody can fill the lobby for others."""
MAX_REMEMBERED = 64


class Lobby(Generic[R]):
    """Rounds that have begun, by group id, and calls for others. On one loop."""

    def __init__(self) -> None:
        self.begun: dict[str, R] = {}
        self._over: OrderedDict[str, None] = OrderedDict()
        self._calls: dict[str, set[asyncio.Future[None]]] = {}
        self._callers: Counter[str] = Counter()

    def begin(self, group_id: str, round_: R) -> None:
        self.begun[group_id] = round_
        for call in self._calls.pop(group_id, ()):
            if not call.done():
                call.set_result(None)

    def end(self, group_id: str) -> bool:
        """Whether it had begun and not ended. Who calls for it from now on is not kept waiting."""
        if self.begun.pop(group_id, None) is None:
            return False
        self._over[group_id] = None
        while len(self._over) > MAX_REMEMBERED:
            self._over.popitem(last=False)
        return True

    async def enter(self, group_id: str, peer: str) -> R | None:
        """The group's round, now or as soon as it begins; None if it is over, or does not begin in time."""
        if group_id in self.begun or group_id in self._over:
            return self.begun.get(group_id)
        if self._callers[peer] >= MAX_EARLY_CALLS_PER_PEER or self._callers.total() >= MAX_EARLY_CALLS:
            return None
        call: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._calls.setdefault(group_id, set()).add(call)
        self._callers[peer] += 1
        try:
            async with asyncio.timeout(EARLY_SECONDS):
                await call
        except TimeoutError:
            return None
        finally:
            self._callers[peer] -= 1
            if not self._callers[peer]:
                del self._callers[peer]
            calls = self._calls.get(group_id)
            if calls is not None:
                calls.discard(call)
                if not calls:
                    del self._calls[group_id]
        return self.begun.get(group_id)
