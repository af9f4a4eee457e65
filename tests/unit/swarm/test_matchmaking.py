"""One group for a round, never two, over real libp2p daemons: late starts, dead leaders, unlike views, latecomers."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from calm_ray.swarm.gathering import NoGroup, is_quorum, rank_of, should_begin
from calm_ray.swarm.group import Group
from calm_ray.swarm.wires import Behind
from tests.unit.swarm.camp import (
    EPOCH,
    HASTY,
    LIMITS,
    MARGIN_SECONDS,
    Watch,
    assert_one_group,
    camp,
)
from tests.unit.swarm.loopback import Loopback, eventually, loopback

# hivemind leaves sockets and subprocess transports to the garbage collector, after their loop was closed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:loop is closed:ResourceWarning"),
]


@pytest.fixture(scope="module")
def net() -> Iterator[Loopback]:
    with loopback() as found:
        yield found


# --- when a leader begins: pure ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("here", "missing", "unreachable", "age", "quorum_age", "begins"),
    [
        (1, 0, 0, 99, None, False), (2, 0, 0, 0, 0, True), (5, 0, 0, 0, 0, True),
        (2, 1, 0, 0, 0, False), (2, 1, 0, 2, 1.4, False), (2, 1, 0, 2, 1.5, True), (2, 1, 0, 6, None, True),
        (2, 2, 0, 99, 99, False), (2, 3, 0, 99, 99, False), (3, 2, 0, 0, 1.5, True),
        (2, 0, 1, 0, 0, True), (2, 0, 2, 99, 99, False), (2, 1, 1, 99, 99, False), (3, 1, 1, 0, 0, False),
        (3, 1, 1, 0, 1.5, True), (3, 0, 2, 0, 0, True), (3, 0, 3, 99, 99, False),
    ],
)  # fmt: skip
def test_leader_begins_with_all_or_most_after_a_grace(
    here: int, missing: int, unreachable: int, age: float, quorum_age: float | None, begins: bool
) -> None:
    limits = replace(LIMITS, matchmaking_seconds=6.0, grace_seconds=1.5)
    found = should_begin(
        num_here=here, num_missing=missing, num_unreachable=unreachable, age=age, quorum_age=quorum_age, limits=limits
    )
    assert found is begins


def test_two_groups_of_one_round_cannot_both_have_a_quorum() -> None:
    for size in range(2, 40):
        both = [a for a in range(size + 1) if is_quorum(num_here=a, num_others=size - a)
                and is_quorum(num_here=size - a, num_others=a)]  # fmt: skip
        assert both == []


def test_leading_goes_round() -> None:
    peers = [f"peer {number}" for number in range(8)]
    leaders = [
        min(peers, key=lambda peer: rank_of(peer, run_id="run", key=("gradients", epoch))) for epoch in range(800)
    ]
    assert min(leaders.count(peer) for peer in peers) > 60
    assert rank_of("a", run_id="run", key=("gradients", 1)) != rank_of("a", run_id="run", key=("state", 1))


# --- one group --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "starts", [(0.0, 0.0, 0.0, 0.0), (2.0, 0.0, 0.7, 1.3), (0.0, 2.0, 2.0, 2.0), (1.0, 2.0, 0.0, 0.5)]
)
def test_starts_up_to_two_seconds_apart_give_one_group(net: Loopback, starts: tuple[float, ...]) -> None:
    """The best-ranked first: whether the leader is early or late makes no difference."""

    async def test() -> None:
        async with camp(net, count=4) as here:
            watch = Watch()
            found = await asyncio.gather(*(here.find(number, after=start) for number, start in enumerate(starts)))
            assert_one_group(found, of=here.names())
            assert watch.seconds < max(starts) + MARGIN_SECONDS
            assert here.seekers[0].knocks, "followers wake their leader"

    net.run(test())


def test_client_without_an_open_port_joins_others(net: Loopback) -> None:
    async def test() -> None:
        async with camp(net, count=4, clients=[0, 2]) as here:
            found = await asyncio.gather(*(here.find(number) for number in range(4)))
            assert_one_group(found, of=here.names())
            assert isinstance(found[0], Group)
            fractions = {member.peer_id: member.fraction for member in found[0].members}
            assert [fractions[name] for name in here.names()] == [0.0, 0.5, 0.0, 0.5]

    net.run(test())


def test_clients_alone_find_nobody(net: Loopback) -> None:
    async def test() -> None:
        async with camp(net, count=2, clients=[0, 1]) as here:
            found = await asyncio.gather(*(here.find(number, limits=HASTY) for number in range(2)))
            assert [exc.outcome for exc in found if isinstance(exc, NoGroup)] == ["only_clients"] * 2

    net.run(test())


def test_leader_that_is_dead_costs_little(net: Loopback) -> None:
    limits = replace(LIMITS, grace_seconds=1.5)

    async def test() -> None:
        async with camp(net, None, count=4) as here:
            watch = Watch()
            found = await asyncio.gather(*(here.find(number, limits=limits) for number in (1, 2, 3)))
            assert_one_group(found, of=here.names(1, 2, 3))
            assert watch.seconds < MARGIN_SECONDS
            assert here.seekers[1].maker.unreachable == set(here.names(0))

    net.run(test())


def test_leader_that_some_do_not_know_leads_all_the_same(net: Loopback) -> None:
    """Whoever asks the second best is sent to the best."""

    async def test() -> None:
        async with camp(net, count=4) as here:
            unknown = here.names(1, 2, 3)
            found = await asyncio.gather(
                here.find(0), here.find(1, after=0.5), here.find(2, knows=unknown), here.find(3, knows=unknown)
            )
            assert_one_group(found, of=here.names())

    net.run(test())


def test_two_leaders_become_one_when_they_hear_of_each_other(net: Loopback) -> None:
    """Two halves: each knows only its own. The worse leader brings its followers along."""

    async def test() -> None:
        async with camp(net, count=4) as here:
            known = here.names(1, 3)

            async def hear_of_the_best() -> None:
                await eventually(lambda: bool(here.seekers[1].knocks))
                await eventually(lambda: bool(here.seekers[0].knocks))
                known.append(here.seekers[0].name)

            found = await asyncio.gather(
                here.find(0), here.find(2), here.find(1, knows=known), here.find(3, knows=here.names(1)),
                hear_of_the_best(),
            )  # fmt: skip
            assert_one_group([group for group in found if group is not None], of=here.names())

    net.run(test())


def test_followers_wait_for_a_leader_that_is_not_due_yet(net: Loopback) -> None:
    """It may be finishing the last step; its followers' knock tells it to hurry."""

    async def test() -> None:
        async with camp(net, count=3) as here:
            followers = asyncio.gather(here.find(1), here.find(2))
            await eventually(lambda: len(here.seekers[0].knocks) >= 2)
            found = [await here.find(0), *await followers]
            assert_one_group(found, of=here.names())

    net.run(test())


# --- never two --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("are_there", [True, False], ids=["others answer", "others are dead"])
def test_minority_never_begins(net: Loopback, are_there: bool) -> None:
    async def test() -> None:
        roles = () if are_there else (None, None, None)
        async with camp(net, *roles, count=5) as here:
            found = await asyncio.gather(here.find(3, limits=HASTY), here.find(4, limits=HASTY))
            assert [type(exc) for exc in found] == [NoGroup, NoGroup], found
            assert [exc.outcome for exc in found if isinstance(exc, NoGroup)] == ["timeout", "timeout"]

    net.run(test())


@pytest.mark.parametrize("latecomers", [(0, 1), (3, 4), (0, 4)])
def test_latecomers_never_form_a_second_group(net: Loopback, latecomers: tuple[int, int]) -> None:
    """Whether the best-ranked is among them or not. They are told when the others have stepped."""

    async def test() -> None:
        async with camp(net, count=5) as here:
            early = [number for number in range(5) if number not in latecomers]
            known = here.names(*early)
            found = await asyncio.gather(*(here.find(number, knows=known, limits=HASTY) for number in early))
            assert_one_group(found, of=here.names(*early))
            late = asyncio.gather(*(here.find(number) for number in latecomers))
            done, _ = await asyncio.wait({late}, timeout=4.0)
            assert not done, "while the round is on, they can only wait"
            here.end_round(*early, epoch=EPOCH + 1)
            watch = Watch()
            ends = await late
            assert [type(end) for end in ends] == [Behind, Behind], ends
            assert [end.epoch for end in ends if isinstance(end, Behind)] == [EPOCH + 1] * 2
            assert watch.seconds < MARGIN_SECONDS

    net.run(test())


def test_who_has_heard_that_a_round_is_over_keeps_nobody_waiting(net: Loopback) -> None:
    """It may take minutes to download the state, and is the best-ranked until it has."""

    async def test() -> None:
        async with camp(net, count=3) as here:
            here.end_round(1, epoch=EPOCH + 1)
            assert isinstance(await here.find(0), Behind)
            watch = Watch()
            found = await here.find(2, knows=here.names(0))  # all that it knows
            assert isinstance(found, Behind), found
            assert (found.epoch, found.peer_id) == (EPOCH + 1, here.seekers[1].name)
            assert watch.seconds < MARGIN_SECONDS

    net.run(test())


def test_round_that_failed_elsewhere_can_begin_anew_with_those_who_missed_it(net: Loopback) -> None:
    """The best-ranked came too late for the first try, and leads the second."""

    async def test() -> None:
        async with camp(net, count=3) as here:
            known = here.names(1, 2)
            first = await asyncio.gather(*(here.find(number, knows=known, limits=HASTY) for number in (1, 2)))
            assert_one_group(first, of=here.names(1, 2))
            late = asyncio.create_task(here.find(0))
            await asyncio.sleep(1.5)  # sleep: while it learns that the round has begun elsewhere
            assert not late.done()
            here.end_round(1, 2, epoch=EPOCH)
            watch = Watch()
            found = await asyncio.gather(late, here.find(1), here.find(2))
            assert_one_group(found, of=here.names())
            assert watch.seconds < MARGIN_SECONDS

    net.run(test())


def test_peer_that_is_ahead_is_not_asked_to_come_back(net: Loopback) -> None:
    async def test() -> None:
        async with camp(net, count=2) as here:
            here.seekers[1].epoch = EPOCH + 3
            found = await here.find(0)
            assert isinstance(found, Behind)
            assert (found.epoch, found.peer_id) == (EPOCH + 3, here.seekers[1].name)

    net.run(test())


def test_leader_that_is_still_a_step_behind_is_waited_for(net: Loopback) -> None:
    async def test() -> None:
        async with camp(net, count=2) as here:
            here.seekers[0].epoch = EPOCH - 1
            first = asyncio.create_task(here.find(1))
            await asyncio.sleep(1.0)  # sleep: while it is sent away
            assert not first.done()
            here.seekers[0].epoch = EPOCH
            assert_one_group([await here.find(0), await first], of=here.names())

    net.run(test())


def test_state_round_that_a_peer_will_not_take_part_in_is_over_at_once(net: Loopback) -> None:
    async def test() -> None:
        async with camp(net, count=2, kind="state") as here:
            here.seekers[0].maker.close_state_round(EPOCH)
            watch = Watch()
            assert isinstance(await here.find(1, kind="state"), Behind)
            assert watch.seconds < MARGIN_SECONDS

    net.run(test())


def test_peer_of_another_model_is_not_in_the_group(net: Loopback) -> None:
    """Nor does it hold the others up for longer than their grace, though it would be their leader."""

    async def test() -> None:
        async with camp(net, count=3) as here:
            here.seekers[0].maker._schema = b"other"
            watch, limits = Watch(), replace(LIMITS, grace_seconds=1.5)
            odd = asyncio.create_task(here.find(0, limits=HASTY))
            assert_one_group(
                await asyncio.gather(here.find(1, limits=limits), here.find(2, limits=limits)), of=here.names(1, 2)
            )
            assert watch.seconds < limits.grace_seconds + MARGIN_SECONDS
            assert isinstance(await odd, NoGroup)

    net.run(test())


def test_peer_that_leaves_sends_its_followers_away(net: Loopback) -> None:
    async def test() -> None:
        async with camp(net, count=3) as here:
            watch, limits = Watch(), replace(LIMITS, grace_seconds=1.5)
            followers = asyncio.gather(here.find(1, limits=limits), here.find(2, limits=limits))
            await eventually(lambda: len(here.seekers[0].knocks) >= 2)
            here.seekers[0].maker.leave()
            assert_one_group(await followers, of=here.names(1, 2))
            assert watch.seconds < limits.grace_seconds + MARGIN_SECONDS

    net.run(test())
