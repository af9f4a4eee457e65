"""Leaders and callers that lie, stall or shout, over real libp2p: what each of them costs the others at most."""

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

# hivemind tells a stream by typing's alias, and only by that.
from typing import Any, AsyncIterator  # noqa: UP035

import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2PContext

from calm_ray.swarm.gathering import NoGroup
from calm_ray.swarm.group import Group
from calm_ray.swarm.matchmaking import MAX_FAILED_ROUNDS, Matchmaker
from calm_ray.swarm.messages import MAX_EPOCH, pack, pack_group, pack_ticket, unpack, unpack_ticket
from calm_ray.swarm.wires import Behind
from tests.unit.swarm.camp import (
    EPOCH,
    HASTY,
    LIMITS,
    MARGIN_SECONDS,
    TICKET,
    Camp,
    Watch,
    assert_one_group,
    camp,
    form,
)
from tests.unit.swarm.loopback import Loopback, eventually, loopback

# hivemind leaves sockets and subprocess transports to the garbage collector, after their loop was closed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:loop is closed:ResourceWarning"),
]

STRICT = replace(LIMITS, request_seconds=3.0, grace_seconds=1.5)
Answers = Callable[["Liar", str], list[bytes]]


@pytest.fixture(scope="module")
def net() -> Iterator[Loopback]:
    with loopback() as found:
        yield found


class Liar(Matchmaker):
    """Says to whoever asks it to lead what a test tells it to, and then nothing more."""

    answers: Answers

    async def rpc_join_round(self, request: BytesValue, context: P2PContext) -> AsyncIterator[BytesValue]:
        for answer in type(self).answers(self, context.remote_id.to_base58()):
            yield BytesValue(value=answer)
        await asyncio.sleep(60)  # sleep: it stalls, until the caller hangs up


def liar(answers: Answers) -> type[Matchmaker]:
    return type("Matchmaker", (Liar,), {"answers": answers})  # the name is part of the RPC's handle


def says(*answers: bytes) -> type[Matchmaker]:
    return liar(lambda self, caller: list(answers))


ACCEPTED = pack(type="accepted")


def begin(**changes: Any) -> Answers:
    """An acceptance, and a group of the caller and the liar with something wrong in it."""

    def answers(self: Liar, caller: str) -> list[bytes]:
        group = form(("gradients", EPOCH), {caller: TICKET, self._own_id: TICKET})
        return [ACCEPTED, pack(**{**unpack(pack_group(group)), **changes})]

    return answers


async def find_two(here: Camp) -> float:
    """The two honest peers find each other; how long it took."""
    watch = Watch()
    found = await asyncio.gather(*(here.find(number, limits=STRICT) for number in (1, 2)))
    assert_one_group(found, of=here.names(1, 2))
    return watch.seconds


RUBBISH: dict[str, type[Matchmaker]] = {
    "no message": says(b""),
    "noise": says(random.Random(0).randbytes(500)),
    "no map": says(b"\x93\x01\x02\x03"),
    "unknown type": says(pack(type="obey")),
    "no type": says(pack(**{"": 1})),
    "over without an epoch": says(pack(type="over")),
    "over in the past": says(pack(type="over", epoch=EPOCH - 1)),
    "over beyond all epochs": says(pack(type="over", epoch=2**63)),
    "redirect to nobody": says(pack(type="redirect", to="")),
    "redirect to noise": says(pack(type="redirect", to="\u2026 0OIl")),
    "redirect to a list": says(pack(type="redirect", to=["x"])),
    "noise after acceptance": says(ACCEPTED, b"\xc1"),
    "times of a day": liar(begin(limits={**asdict(LIMITS), "round_seconds": 86400.0})),
    "no time at all": liar(begin(limits=dict.fromkeys(asdict(LIMITS), 0.0))),
    "group without us": liar(begin(members=[["a", True, 0.5], ["b", True, 0.5]])),
    "group of another epoch": liar(begin(epoch=EPOCH + 1)),
    "group of nobody": liar(begin(members=[])),
}


@pytest.mark.parametrize("what", RUBBISH, ids=lambda what: what.replace(" ", "-"))
def test_leader_that_talks_rubbish_is_passed_over(net: Loopback, what: str) -> None:
    async def test() -> None:
        async with camp(net, RUBBISH[what], count=3) as here:
            assert await find_two(here) < STRICT.grace_seconds + MARGIN_SECONDS

    net.run(test())


def test_leader_that_does_not_answer_costs_a_request(net: Loopback) -> None:
    async def test() -> None:
        async with camp(net, says(), count=3) as here:
            limit = STRICT.request_seconds + STRICT.grace_seconds
            assert limit - 1 < await find_two(here) < limit + MARGIN_SECONDS
            assert await find_two(here) < STRICT.grace_seconds + MARGIN_SECONDS, "and only once"

    net.run(test())


def test_leader_that_accepts_and_never_begins_costs_one_search(net: Loopback) -> None:
    async def test() -> None:
        async with camp(net, says(ACCEPTED), count=3) as here:
            watch = Watch()
            limits = replace(HASTY, request_seconds=3.0)
            found = await asyncio.gather(*(here.find(number, limits=limits) for number in (1, 2)))
            bound = limits.matchmaking_seconds + limits.grace_seconds + limits.request_seconds
            assert watch.seconds < bound + MARGIN_SECONDS
            assert all(isinstance(end, NoGroup) for end in found), found
            await find_two(here)

    net.run(test())


@pytest.mark.parametrize("to", ["itself", "the other liar", "its caller"])
def test_redirects_in_a_circle_end(net: Loopback, to: str) -> None:
    names: list[str] = []

    def answers(self: Liar, caller: str) -> list[bytes]:
        others = {"itself": self._own_id, "its caller": caller}
        other = next((name for name in names[:2] if name != self._own_id), "")
        return [pack(type="redirect", to=others.get(to, other))]

    async def test() -> None:
        async with camp(net, liar(answers), liar(answers), count=4) as here:
            names.extend(here.names())
            watch = Watch()
            found = await asyncio.gather(
                *(here.find(number, limits=STRICT, expects=dict.fromkeys(here.names(2, 3), True)) for number in (2, 3))
            )
            assert_one_group(found, of=here.names(2, 3))
            assert watch.seconds < STRICT.grace_seconds + MARGIN_SECONDS

    net.run(test())


def test_leader_that_claims_a_later_epoch_is_believed_until_it_is_found_out(net: Loopback) -> None:
    """The controller asks for the state of that epoch; if nobody has it, it says so, and goes on without the liar."""

    async def test() -> None:
        async with camp(net, says(pack(type="over", epoch=MAX_EPOCH)), count=3) as here:
            for number in (1, 2):
                end = await here.find(number, limits=STRICT)
                assert isinstance(end, Behind) and end.peer_id == here.seekers[0].name
                here.seekers[number].maker.distrust(end.peer_id)
            await find_two(here)

    net.run(test())


def test_called_peer_that_claims_a_later_epoch_is_found_out_as_well(net: Loopback) -> None:
    async def later(self: Matchmaker, request: BytesValue, context: P2PContext) -> BytesValue:
        return BytesValue(value=pack(epoch=EPOCH + 5, active=[]))

    boaster = type("Matchmaker", (Matchmaker,), {"rpc_call_round": later})

    async def test() -> None:
        async with camp(net, Matchmaker, Matchmaker, boaster) as here:
            end = await here.find(0, limits=STRICT)
            assert isinstance(end, Behind) and (end.epoch, end.peer_id) == (EPOCH + 5, here.seekers[2].name)
            here.seekers[0].maker.distrust(end.peer_id)
            found = await asyncio.gather(here.find(0, limits=STRICT), here.find(1, limits=STRICT))
            assert_one_group(found, of=here.names(0, 1))

    net.run(test())


@pytest.mark.parametrize(
    "answer", [b"", b"\xc1", pack(epoch=2**63), pack(epoch="8"), pack(active=[["gradients"], 7]), pack(active=5)],
    ids=lambda answer: answer.hex()[:16] or "nothing",
)  # fmt: skip
def test_called_peer_that_talks_rubbish_is_just_not_there(net: Loopback, answer: bytes) -> None:
    async def rubbish(self: Matchmaker, request: BytesValue, context: P2PContext) -> BytesValue:
        return BytesValue(value=answer)

    odd = type("Matchmaker", (Matchmaker,), {"rpc_call_round": rubbish})

    async def test() -> None:
        async with camp(net, Matchmaker, Matchmaker, odd) as here:
            found = await asyncio.gather(here.find(0, limits=STRICT), here.find(1, limits=STRICT))
            assert_one_group(found, of=here.names(0, 1))

    net.run(test())


def test_leader_whose_rounds_fail_again_and_again_is_left(net: Loopback) -> None:
    """Its groups look sound, and their members may not exist."""

    async def test() -> None:
        async with camp(net, liar(begin()), count=3) as here:
            for _ in range(MAX_FAILED_ROUNDS):
                for number in (1, 2):
                    found = await here.find(number, limits=STRICT)
                    assert isinstance(found, Group)
                    assert {member.peer_id for member in found.members} == set(here.names(0, number))
                    here.seekers[number].maker.done(has_failed=True)
            await find_two(here)

    net.run(test())


def test_leader_whose_rounds_fail_now_and_then_is_kept(net: Loopback) -> None:
    async def test() -> None:
        async with camp(net, count=2) as here:
            for has_failed in (True, False, True, False, True):
                found = await asyncio.gather(here.find(0), here.find(1))
                assert_one_group(found, of=here.names())
                for seeker in here.seekers:
                    seeker.maker.done(has_failed=has_failed)

    net.run(test())


# --- callers ----------------------------------------------------------------------------------------------------------


def stub_for(here: Camp, caller: int, leader: int) -> Any:
    maker = here.seekers[caller].maker
    return Matchmaker.get_stub(here.seekers[caller].p2p, here.seekers[leader].p2p.peer_id, namespace=maker._run_id)


async def first_answers(stub: Any, request: bytes, *, count: int = 1) -> list[dict[str, Any]]:
    stream = await stub.rpc_join_round(BytesValue(value=request))
    try:
        return [unpack((await anext(stream)).value) for _ in range(count)]
    finally:
        await stream.aclose()


@pytest.mark.parametrize(
    "request_bytes", [b"", b"\xc1" * 10, pack(kind="gradients"), pack_ticket(TICKET)[:-3], bytes(3 << 20)],
    ids=["nothing", "noise", "half a ticket", "cut", "3 MB"],
)  # fmt: skip
def test_caller_that_talks_rubbish_is_refused(net: Loopback, request_bytes: bytes) -> None:
    async def test() -> None:
        async with camp(net, count=2) as here:
            stub = stub_for(here, 1, 0)
            (answer,) = await first_answers(stub, request_bytes)
            assert answer["type"] == "refused" and answer["why"].startswith("malformed")
            reply = await stub.rpc_call_round(BytesValue(value=request_bytes[:100_000]))
            assert unpack(reply.value) == {"epoch": EPOCH, "active": []}
            assert here.seekers[0].knocks == []

    net.run(test())


def test_thousand_knocks_leave_nothing_behind(net: Loopback) -> None:
    """Callers come and hang up; honest peers find each other meanwhile."""

    async def knock(stub: Any, number: int) -> None:
        if number % 4:
            await stub.rpc_call_round(BytesValue(value=pack(kind="gradients", epoch=EPOCH + number % 3)))
        else:
            (answer,) = await first_answers(stub, pack_ticket(replace(TICKET, epoch=EPOCH - number % 3)))
            assert answer["type"] in ("accepted", "over", "redirect", "refused")

    async def test() -> None:
        async with camp(net, count=3) as here:
            stub, few = stub_for(here, 2, 0), asyncio.Semaphore(20)

            async def knock_in_turn(number: int) -> None:
                async with few:
                    await knock(stub, number)

            shouting = asyncio.gather(*(knock_in_turn(number) for number in range(1000)))
            expects = [dict.fromkeys(here.names(1 - number), True) for number in (0, 1)]
            found = await asyncio.gather(*(here.find(number, expects=expects[number]) for number in (0, 1)))
            assert all(isinstance(group, Group) for group in found), found
            assert found[0] == found[1]
            assert isinstance(found[0], Group)
            assert set(here.names(0, 1)) <= {member.peer_id for member in found[0].members}
            await shouting
            leader = here.seekers[0].maker
            assert len(leader._gatherings) <= 1
            assert not leader._calls

    net.run(test())


def test_stranger_that_hangs_up_has_left_the_gathering(net: Loopback) -> None:
    async def test() -> None:
        async with camp(net, count=2) as here:
            await first_answers(stub_for(here, 1, 0), pack_ticket(TICKET))
            (gathering,) = here.seekers[0].maker._gatherings.values()
            await eventually(lambda: not gathering.tickets)

    net.run(test())


def test_peer_that_asks_anew_keeps_its_place_when_its_first_stream_ends(net: Loopback) -> None:
    async def test() -> None:
        async with camp(net, count=2) as here:
            stub = stub_for(here, 1, 0)
            first = await stub.rpc_join_round(BytesValue(value=pack_ticket(TICKET)))
            await anext(first)
            second = await stub.rpc_join_round(BytesValue(value=pack_ticket(replace(TICKET, bandwidth=1e6))))
            await anext(second)
            await first.aclose()
            (gathering,) = here.seekers[0].maker._gatherings.values()
            await asyncio.sleep(0.5)  # sleep: for what must not happen
            assert {peer: ticket.bandwidth for peer, ticket in gathering.tickets.items()} == {here.seekers[1].name: 1e6}
            await second.aclose()
            await eventually(lambda: not gathering.tickets)

    net.run(test())


def test_follower_of_a_leader_that_goes_on_without_it_is_told(net: Loopback) -> None:
    async def test() -> None:
        async with camp(net, count=2) as here:
            waiting = asyncio.create_task(here.find(1))
            await eventually(lambda: bool(here.seekers[0].knocks))
            here.seekers[0].epoch = EPOCH + 1
            watch = Watch()
            end = await waiting
            assert isinstance(end, Behind) and end.epoch == EPOCH + 1
            assert watch.seconds < MARGIN_SECONDS

    net.run(test())


def test_ticket_of_the_epoch_before_comes_back_as_over(net: Loopback) -> None:
    async def test() -> None:
        async with camp(net, count=2) as here:
            (answer,) = await first_answers(stub_for(here, 1, 0), pack_ticket(replace(TICKET, epoch=EPOCH - 1)))
            assert answer == {"type": "over", "epoch": EPOCH}
            assert unpack_ticket(pack_ticket(TICKET)) == TICKET

    net.run(test())
