"""Asking one leader, while another may call."""

import asyncio
import json

import pytest

from calm_ray.swarm.exchange_messages import BadMessage, Ending, decode
from calm_ray.swarm.gathering import Key
from calm_ray.swarm.knock import Calls, unless_called
from calm_ray.swarm.limits import round_limits
from calm_ray.swarm.messages import MAX_TIMES_OWN

KEY: Key = ("gradients", 7)


async def answer_after(seconds: float) -> int:
    await asyncio.sleep(seconds)  # sleep: the leader takes its time
    return 1


def test_answer_of_a_leader_that_answers_is_taken() -> None:
    async def test() -> int | str:
        return await unless_called(answer_after(0.01), Calls(), key=KEY, leader="asked")

    assert asyncio.run(test()) == 1


def test_call_wins_over_a_leader_that_is_silent() -> None:
    """Otherwise a dead leader costs us a whole request while the round goes on elsewhere."""

    async def test() -> int | str:
        calls = Calls()
        asyncio.get_running_loop().call_later(0.05, calls.note, KEY, "caller")
        return await asyncio.wait_for(
            unless_called(answer_after(60), calls, key=KEY, leader="asked"), timeout=10
        )  # fmt: skip

    assert asyncio.run(test()) == "caller"


@pytest.mark.parametrize(("key", "caller"), [(("gradients", 6), "caller"), (("state", 7), "caller"), (KEY, "asked")])
def test_call_to_another_round_or_by_whom_we_ask_changes_nothing(key: Key, caller: str) -> None:
    async def test() -> int | str:
        calls = Calls()
        calls.note(key, caller)
        return await unless_called(answer_after(0.05), calls, key=KEY, leader="asked")

    assert asyncio.run(test()) == 1


def test_nothing_is_left_of_a_request_that_timed_out() -> None:
    async def test() -> int:
        for _ in range(10):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await unless_called(answer_after(60), Calls(), key=KEY, leader="asked")
        await asyncio.sleep(0)  # sleep: lets what was cancelled end
        return len(asyncio.all_tasks())

    assert asyncio.run(test()) == 1


@pytest.mark.parametrize("codec_bytes", [4, 2, 1])
def test_fast_follower_accepts_the_times_that_a_slow_member_needs(codec_bytes: int) -> None:
    """A leader sets them by the slowest line; a gigabit peer must not take that for an attack."""
    size = {"num_bytes": codec_bytes * 18_000_000, "num_members": 6}
    slow = round_limits(**size, network="internet", slowest_bandwidth=5e6 / 8)  # type: ignore[arg-type]
    fast = round_limits(**size, network="internet", slowest_bandwidth=1e9 / 8)  # type: ignore[arg-type]
    ceiling = round_limits(**size, network="internet", slowest_bandwidth=1.0)  # type: ignore[arg-type]
    assert slow.round_seconds <= MAX_TIMES_OWN * ceiling.round_seconds
    if codec_bytes > 1:
        assert slow.round_seconds > MAX_TIMES_OWN * fast.round_seconds, "by its own line it would refuse"


@pytest.mark.parametrize("weight", ["-1.0", "1e300", "Infinity", "-Infinity", "NaN"])
def test_weights_that_a_reducer_makes_up_are_no_message(weight: str) -> None:
    """Their sum would be an error in the middle of a true round."""
    assert decode(Ending, json.dumps({"weights": {"a": 8.0}, "banned": {}}).encode()).weights == {"a": 8.0}
    with pytest.raises(BadMessage):
        decode(Ending, b'{"weights": {"a": %s}, "banned": {}}' % weight.encode())
