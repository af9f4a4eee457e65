"""The state goes to newcomers whole, to few at a time, and beside averaging only if there is no other time.

Over real libp2p daemons; and what strangers can do at either end: stall, send for ever, send something else.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

# hivemind tells a stream by typing's alias, and only by that.
from typing import Any
from typing import AsyncIterator as Stream  # noqa: UP035

import pytest
import torch
from hivemind.compression import CompressionInfo, NoCompression
from hivemind.p2p import P2P, P2PContext, ServicerBase
from hivemind.proto import averaging_pb2
from hivemind.utils import MSGPackSerializer
from hivemind.utils.streaming import split_for_streaming

from calm_ray.swarm import donor as module
from calm_ray.swarm import state as reading
from calm_ray.swarm.donor import MAX_DOWNLOADS, TrainingStateAverager
from calm_ray.swarm.holder import HeldState
from calm_ray.swarm.roster import state_prefix
from calm_ray.swarm.state import TrainingState
from tests.unit.swarm.loopback import Loopback, eventually, loopback, start_daemon
from tests.unit.swarm.tiny_state import gradient, holder

# hivemind leaves sockets and subprocess transports to the garbage collector, after their loop was closed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:loop is closed:ResourceWarning"),
]

MAX_BYTES = 256 << 20
MARGIN_SECONDS = 6.0
BIG = HeldState(epoch=3, optimizer_metadata=[], tensors=[torch.zeros(12 << 20)])
"""More than all buffers on the way to somebody who does not read."""
_runs = itertools.count()


@pytest.fixture(scope="module")
def net() -> Iterator[Loopback]:
    with loopback() as found:
        yield found


@dataclass
class Counter:
    """Where the donor takes its state from."""

    state: HeldState | None
    num_copies: int = 0

    def __call__(self) -> HeldState | None:
        self.num_copies += 1
        return self.state


@dataclass
class Pair:
    """A donor and a newcomer, with a daemon each."""

    donor: TrainingStateAverager
    copies: Counter
    there: P2P
    here: P2P
    run_id: str

    async def download(self, *, max_bytes: int = MAX_BYTES) -> TrainingState:
        return await reading._download(
            self.here, donor=self.there.peer_id, run_id=self.run_id, max_bytes=max_bytes, on_progress=lambda done: None
        )

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Ask, and do not read the answer."""
        handle = TrainingStateAverager._get_handle_name(state_prefix(self.run_id), "rpc_download_state")
        _, reader, writer = await self.here.call_binary_stream_handler(self.there.peer_id, handle)
        await P2P.send_protobuf(averaging_pb2.DownloadRequest(), writer)
        await P2P.send_protobuf(P2P.END_OF_STREAM, writer)
        return reader, writer


async def two_daemons(net: Loopback) -> tuple[P2P, P2P]:
    while len(net.daemons) < 2:
        net.daemons.append(await start_daemon(net.daemons[:1]))
    return net.daemons[0], net.daemons[1]


@contextlib.asynccontextmanager
async def pair(net: Loopback, state: HeldState | None) -> AsyncIterator[Pair]:
    there, here = await two_daemons(net)
    copies, run_id = Counter(state), f"state{next(_runs)}"
    donor = TrainingStateAverager(copies)
    await donor.serve(there, run_id=run_id)
    try:
        yield Pair(donor, copies, there, here, run_id)
    finally:
        await donor.remove_p2p_handlers(there, namespace=state_prefix(run_id))


def stepped() -> HeldState:
    held = holder()
    for epoch in range(3):
        held.step(gradient(epoch))
    return held.snapshot()


# --- the donor --------------------------------------------------------------------------------------------------------


def test_state_arrives_as_it_is(net: Loopback) -> None:
    state = stepped()

    async def test() -> None:
        async with pair(net, state) as both:
            found = await both.download()
            assert (found.epoch, found.donor) == (3, str(both.there.peer_id))
            assert all(torch.equal(a, b) for a, b in zip(found.tensors, state.tensors, strict=True))
            newcomer = holder(seed=5)
            newcomer.load(found)
            assert newcomer.epoch == 3
            await eventually(lambda: both.donor._num_downloads == 0)

    net.run(test())


def test_peer_without_a_state_sends_nothing(net: Loopback) -> None:
    async def test() -> None:
        async with pair(net, None) as both:
            with pytest.raises(ValueError, match="sent no state"):
                await both.download()

    net.run(test())


def test_few_are_served_at_a_time_and_the_others_are_told_at_once(net: Loopback) -> None:
    async def test() -> None:
        async with pair(net, BIG) as both:
            streams = [await both.open() for _ in range(MAX_DOWNLOADS)]
            await eventually(lambda: both.donor._num_downloads == MAX_DOWNLOADS)
            started = time.monotonic()
            with pytest.raises(ValueError, match="sent no state"):
                await both.download()
            assert time.monotonic() - started < MARGIN_SECONDS
            for _, writer in streams:
                writer.transport.abort()
            await eventually(lambda: both.donor._num_downloads == 0)
            assert (await both.download()).epoch == 3

    net.run(test())


def test_downloads_between_two_rounds_share_one_copy(net: Loopback) -> None:
    async def test() -> None:
        async with pair(net, stepped()) as both:
            for _ in range(2):
                await asyncio.gather(both.download(), both.download())
                await eventually(lambda: both.donor._num_downloads == 0)
            assert both.copies.num_copies == 1
            both.donor.pause()
            both.donor.resume()
            await both.download()
            assert both.copies.num_copies == 2, "after a round there is a newer state"

    net.run(test())


def test_state_waits_for_an_all_reduce_to_end(net: Loopback) -> None:
    async def test() -> None:
        async with pair(net, stepped()) as both:
            both.donor.pause()
            download = asyncio.create_task(both.download())
            await eventually(lambda: both.donor._num_downloads == 1)
            done, _ = await asyncio.wait({download}, timeout=1.0)
            assert not done
            assert both.copies.num_copies == 0, "nor is it copied: copying holds the step up"
            both.donor.resume()
            assert (await download).epoch == 3

    net.run(test())


def test_state_is_sent_beside_averaging_if_that_never_ends(net: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAIT_SECONDS", 0.3)
    state = HeldState(epoch=3, optimizer_metadata=[], tensors=[torch.ones(10)] * 4)

    async def test() -> None:
        async with pair(net, state) as both:
            both.donor.pause()
            started = time.monotonic()
            assert (await both.download()).epoch == 3
            assert time.monotonic() - started > 4 * 0.3, "it waits before each tensor"

    net.run(test())


def test_newcomer_that_does_not_read_loses_its_place(net: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are few places, and each holds a copy of the state."""
    monkeypatch.setattr(module, "STALL_SECONDS", 1.0)

    async def test() -> None:
        async with pair(net, BIG) as both:
            streams = [await both.open() for _ in range(MAX_DOWNLOADS)]
            await eventually(lambda: both.donor._num_downloads == MAX_DOWNLOADS)
            await eventually(lambda: both.donor._num_downloads == 0, timeout_seconds=30.0)
            assert (await both.download()).epoch == 3
            for _, writer in streams:
                writer.transport.abort()

    net.run(test())


def test_newcomer_that_reads_for_ever_loses_its_place(net: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SECONDS", 0.0)

    async def test() -> None:
        async with pair(net, BIG) as both:
            with pytest.raises(ValueError, match="sent no state"):
                await both.download()

    net.run(test())


def test_newcomer_that_hangs_up_has_left(net: Loopback) -> None:
    async def test() -> None:
        async with pair(net, BIG) as both:
            for _ in range(3 * MAX_DOWNLOADS):
                reader, writer = await both.open()
                await reader.readexactly(100)
                writer.transport.abort()
                await eventually(lambda: both.donor._num_downloads == 0)

    net.run(test())


# --- the newcomer, when its donor is a stranger -----------------------------------------------------------------------


def part(tensor: torch.Tensor, **metadata: Any) -> averaging_pb2.DownloadData:
    (packed,) = split_for_streaming(NoCompression().compress(tensor, CompressionInfo.from_tensor(tensor)))
    return averaging_pb2.DownloadData(
        tensor_part=packed, metadata=MSGPackSerializer.dumps(metadata) if metadata else b""
    )  # fmt: skip


GOOD = {"epoch": 3, "optimizer_metadata": [], "num_tensors": 1}
ONE = torch.ones(4)


class _Stranger(ServicerBase):
    async def rpc_download_state(
        self, _request: averaging_pb2.DownloadRequest, _context: P2PContext
    ) -> Stream[averaging_pb2.DownloadData]:
        for message in self.messages:
            yield message
        await asyncio.sleep(60 if self.stalls else 0)  # sleep: it stalls, until the caller hangs up

    messages: Any = ()
    stalls = False


async def ask_stranger(net: Loopback, messages: Any, *, stalls: bool = False) -> TrainingState:
    there, here = await two_daemons(net)
    run_id = f"stranger{next(_runs)}"
    stranger: Any = type("TrainingStateAverager", (_Stranger,), {})()
    stranger.messages, stranger.stalls = messages, stalls
    await stranger.add_p2p_handlers(there, namespace=state_prefix(run_id))
    try:
        return await reading._download(
            here, donor=there.peer_id, run_id=run_id, max_bytes=1 << 20, on_progress=lambda done: None
        )
    finally:
        await stranger.remove_p2p_handlers(there, namespace=state_prefix(run_id))


def test_sound_state_of_a_stranger_is_read(net: Loopback) -> None:
    found = net.run(ask_stranger(net, [part(ONE, **GOOD)]))
    assert found.epoch == 3
    assert torch.equal(found.tensors[0], ONE)


@pytest.mark.parametrize(
    "messages",
    [
        [], [part(ONE)], [part(ONE, epoch="3", optimizer_metadata=[], num_tensors=1)],
        [part(ONE, epoch=None, optimizer_metadata=[], num_tensors=1)],
        [averaging_pb2.DownloadData(tensor_part=part(ONE).tensor_part, metadata=b"\xc1")],
        [averaging_pb2.DownloadData(tensor_part=part(ONE).tensor_part, metadata=MSGPackSerializer.dumps([1, 2]))],
        [part(ONE, epoch=3, num_tensors=1)], [part(ONE, epoch=3, num_tensors="many", optimizer_metadata=[])],
        [part(ONE, epoch=3, num_tensors=1, optimizer_metadata=5)], [averaging_pb2.DownloadData()],
    ],
    ids=["nothing", "no metadata", "epoch a text", "no epoch", "noise", "a list", "no optimizer", "count a text",
         "optimizer a number", "empty"],
)  # fmt: skip
def test_what_is_no_state_is_refused(net: Loopback, messages: Any) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011  of any kind: `download_state` then asks the next donor
        net.run(ask_stranger(net, messages))


def test_endless_state_is_cut_short(net: Loopback) -> None:
    endless = itertools.repeat(part(torch.zeros(15_000), epoch=3, optimizer_metadata=[], num_tensors=10**9))
    with pytest.raises(ValueError, match="more than the 1048576 bytes"):
        net.run(ask_stranger(net, endless))


def test_donor_that_stalls_is_given_up(net: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK_TIMEOUT_SECONDS", 1.0)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        net.run(ask_stranger(net, [part(ONE, **{**GOOD, "num_tensors": 2})], stalls=True))
    assert time.monotonic() - started < MARGIN_SECONDS
