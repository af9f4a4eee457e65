"""Who calls for a round that we have not begun: waits for it, but neither for ever nor at others' expense."""

import asyncio

import pytest

from calm_ray.swarm.exchange_lobby import MAX_EARLY_CALLS_PER_PEER, Lobby


def test_lobby_keeps_callers_until_their_round_begins_and_sends_them_away_when_it_is_over() -> None:
    async def test() -> None:
        lobby: Lobby[str] = Lobby()
        early = [asyncio.create_task(lobby.enter(group, "ann")) for group in ("aa", "aa", "bb")]
        await asyncio.sleep(0)  # sleep: a turn of the loop
        lobby.begin("aa", "round a")
        assert await asyncio.gather(*early[:2]) == ["round a", "round a"] and not early[2].done()
        assert await lobby.enter("aa", "bob") == "round a"
        assert lobby.end("aa") and not lobby.end("aa")
        assert await lobby.enter("aa", "bob") is None
        early[2].cancel()

    asyncio.run(test())


def test_lobby_gives_up_on_a_round_that_never_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calm_ray.swarm.exchange_lobby.EARLY_SECONDS", 0.01)

    async def test() -> None:
        lobby: Lobby[str] = Lobby()
        assert await lobby.enter("aa", "ann") is None
        assert not lobby._calls and not lobby._callers

    asyncio.run(test())


def test_lobby_is_not_filled_by_one_peer() -> None:
    async def test() -> None:
        lobby: Lobby[str] = Lobby()
        hostile = [asyncio.create_task(lobby.enter(f"{n:04x}", "eve")) for n in range(2 * MAX_EARLY_CALLS_PER_PEER)]
        honest = asyncio.create_task(lobby.enter("aa", "ann"))
        await asyncio.sleep(0)  # sleep: a turn of the loop
        await asyncio.sleep(0)  # sleep: and one for those that are done
        assert sum(task.done() for task in hostile) == MAX_EARLY_CALLS_PER_PEER and not honest.done()
        lobby.begin("aa", "round")
        assert await honest == "round"
        for task in hostile:
            task.cancel()

    asyncio.run(test())
