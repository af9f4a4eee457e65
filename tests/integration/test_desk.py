"""The desk and its newcomers over real libp2p: who gets the bundle, what is refused, and who is told to be a client.

One libp2p daemon serves a desk for each test, told apart by run id: a desk dials back to one host only every few
seconds, and here everybody comes from the same one.
"""

import asyncio
import contextlib
import errno
import gc
import itertools
import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.wrappers_pb2 import BytesValue, StringValue
from hivemind.p2p import P2P, P2PContext

from calm_ray.bundle import MANIFEST, seal_bundle
from calm_ray.config import RunTable, load_config
from calm_ray.errors import ConfigError, SwarmUnreachable
from calm_ray.invite import Invite
from calm_ray.peers.endings import is_disk_trouble
from calm_ray.signing import public_bytes
from calm_ray.swarm.desk import Desk
from calm_ray.swarm.loop import EventLoopThread
from calm_ray.swarm.reception import Reception, receive
from tests.integration.runs import write_config

# hivemind leaves sockets and subprocess transports to the garbage collector, after their loop was closed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:loop is closed:ResourceWarning"),
]

CALL_SECONDS = 30.0
LISTEN = "/ip4/127.0.0.1/tcp/0"
TEXT = "text/0.txt"
BIG = "text/big.txt"


@dataclass
class Office:
    """The daemon that desks are served on, and all that a newcomer needs to come to one of them."""

    folder: Path
    run: RunTable
    loop: EventLoopThread
    p2p: P2P
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def address(self) -> str:
        return str(self.loop.run(self.p2p.get_visible_maddrs(), timeout_seconds=CALL_SECONDS)[0])

    def bundle(self, run_id: str = "") -> Path:
        """A sealed bundle of a run of its own."""
        run = self.run.model_copy(update={"run_id": run_id or f"run-{next(self._numbers)}"})
        folder = self.folder / "bundles" / run.run_id
        (folder / "text").mkdir(parents=True)
        (folder / "run.json").write_bytes(run.canonical_json())
        (folder / TEXT).write_text("some text\n")
        (folder / BIG).write_bytes(os.urandom(700_000))
        seal_bundle(folder, run=run, key=self.key)
        return folder

    def open_desk(self, bundle: Path, *, run_id: str = "", desk_class: type[Desk] = Desk) -> Invite:
        """Serve `bundle`; the invite that leads there."""
        run_id = run_id or bundle.name
        self.loop.run(desk_class(bundle).serve(self.p2p, run_id=run_id), timeout_seconds=CALL_SECONDS)
        return self.invite(run_id)

    def invite(self, run_id: str, *addresses: str) -> Invite:
        return Invite(run_id=run_id, addresses=addresses or (self.address,), organiser_key=public_bytes(self.key))


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    folder = tmp_path_factory.mktemp("desk")
    loop = EventLoopThread(name="desk")
    p2p = loop.run(P2P.create(host_maddrs=[LISTEN], auto_nat=False, nat_port_map=False), timeout_seconds=CALL_SECONDS)
    try:
        yield Office(folder, load_config(write_config(folder / "run.toml")).run, loop, p2p)
    finally:
        loop.run(p2p.shutdown(), timeout_seconds=CALL_SECONDS)
        loop.close()
        gc.collect()  # here, where its complaints are expected, rather than in another file's test


def come(
    invite: Invite, folder: Path, *, should_dial_back: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reception:  # fmt: skip
    """Do what a peer does before it joins."""
    return receive(
        invite,
        folder=folder / "bundle",
        listen=LISTEN,
        identity_path=folder / "identity.key",
        should_dial_back=should_dial_back,
        on_progress=on_progress,
    )


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- the bundle ------------------------------------------------------------------------------------------------------


def test_newcomer_gets_the_bundle_as_it_was_sealed(office: Office, tmp_path: Path) -> None:
    bundle, progress = office.bundle(), list[tuple[int, int]]()
    reception = come(office.open_desk(bundle), tmp_path, on_progress=lambda done, total: progress.append((done, total)))
    assert files_in(reception.bundle) == files_in(bundle)
    total = sum(len(data) for name, data in files_in(bundle).items() if not name.startswith("manifest"))
    assert progress[-1] == (total, total)
    assert progress == sorted(progress)


def test_bundle_sealed_with_another_key_is_refused(office: Office, tmp_path: Path) -> None:
    genuine = office.open_desk(office.bundle())
    forged = Invite(
        run_id=genuine.run_id,
        addresses=genuine.addresses,
        organiser_key=public_bytes(Ed25519PrivateKey.generate()),
    )
    with pytest.raises(ConfigError, match=r"not signed by the organiser of this invite; ask for a new invite"):
        come(forged, tmp_path)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("altered", [b"other text", b"some text\nand more of it\n"], ids=["other", "longer"])
def test_part_altered_on_the_desk_is_refused(office: Office, tmp_path: Path, altered: bytes) -> None:
    bundle = office.bundle()
    invite = office.open_desk(bundle)
    (bundle / TEXT).write_bytes(altered)
    with pytest.raises(SwarmUnreachable, match=rf"part {TEXT} (arrived damaged|is longer than announced)"):
        come(invite, tmp_path)
    assert not (tmp_path / "bundle" / TEXT).exists()
    assert not (tmp_path / "bundle" / MANIFEST).exists()


def test_desk_with_an_altered_bundle_does_not_open(office: Office) -> None:
    bundle = office.bundle()
    (bundle / TEXT).write_text("other text")
    with pytest.raises(ConfigError, match=r"0\.txt: missing or altered"):
        Desk(bundle)


def test_download_that_broke_off_is_resumed(office: Office, tmp_path: Path) -> None:
    """The desk has lost the big part since: had the newcomer asked for it again, it would have failed."""
    bundle = office.bundle()
    invite = office.open_desk(bundle)
    (tmp_path / "bundle" / "text").mkdir(parents=True)
    (tmp_path / "bundle" / BIG).write_bytes((bundle / BIG).read_bytes())
    (bundle / BIG).unlink()
    come(invite, tmp_path)
    assert (tmp_path / "bundle" / TEXT).read_text() == "some text\n"


def test_own_disk_that_is_full_is_not_the_desks_fault(
    office: Office, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog waits for room then (`peers/endings.py`), and what had arrived is kept."""
    bundle = office.bundle()
    invite = office.open_desk(bundle)
    write = Path.write_bytes

    def fill_up(path: Path, data: bytes) -> int:
        if "big" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(OSError, match="No space left on device") as caught:
        come(invite, tmp_path)
    assert is_disk_trouble(caught.value)
    assert str(tmp_path / "bundle" / BIG) in str(caught.value)
    monkeypatch.undo()
    come(invite, tmp_path)
    assert files_in(tmp_path / "bundle") == files_in(bundle)


def test_part_that_was_altered_here_is_fetched_again(office: Office, tmp_path: Path) -> None:
    bundle = office.bundle()
    (tmp_path / "bundle" / "text").mkdir(parents=True)
    (tmp_path / "bundle" / TEXT).write_text("some texT\n")
    come(office.open_desk(bundle), tmp_path)
    assert files_in(tmp_path / "bundle") == files_in(bundle)


def test_unknown_part_gives_nothing_and_the_desk_goes_on(office: Office) -> None:
    bundle = office.bundle()
    office.open_desk(bundle)
    (bundle / "secret").write_text("not in the manifest")

    async def ask() -> list[bytes]:
        async with stranger(office) as p2p:
            names = ["no-such-part", "secret", f"../{bundle.name}/run.json", "/etc/hostname", "run.json"]
            return [await first_message(p2p, office.p2p, bundle.name, name) for name in names]

    *refused, served = asyncio.run(ask())
    assert refused == [b""] * 4
    assert served == (bundle / "run.json").read_bytes()


def test_endless_part_is_cut_short(office: Office, tmp_path: Path) -> None:
    class Endless(Desk):
        async def rpc_part(
            self, requests: AsyncIterator[StringValue], context: P2PContext
        ) -> AsyncIterator[BytesValue]:
            while True:
                yield BytesValue(value=bytes(1 << 16))

    Endless.__name__ = Desk.__name__  # it is part of the RPC's name
    invite = office.open_desk(office.bundle(), desk_class=Endless)
    with pytest.raises(SwarmUnreachable, match=r"manifest\.json is longer than announced"):
        come(invite, tmp_path)


def test_many_downloads_all_arrive_whole(office: Office) -> None:
    """A stream that the desk itself ends loses its tail now and then: one in some hundreds (see `Desk.rpc_part`)."""
    bundle = office.bundle()
    office.open_desk(bundle)

    async def ask() -> set[bytes]:
        async with stranger(office) as p2p:
            received = set()
            for _ in range(100):
                asks = [first_message(p2p, office.p2p, bundle.name, TEXT) for _ in range(5)]
                received |= set(await asyncio.gather(*asks))
            return received

    assert asyncio.run(ask()) == {b"some text\n"}


# --- which run, which address ----------------------------------------------------------------------------------------


def test_run_that_nobody_serves_here_is_told_as_such(office: Office, tmp_path: Path) -> None:
    with pytest.raises(SwarmUnreachable, match=r"run bundle: .*answers, but has no desk for this run"):
        come(office.invite("not-served"), tmp_path)


def test_bundle_of_another_run_is_refused(office: Office, tmp_path: Path) -> None:
    invite = office.open_desk(office.bundle("genuine"), run_id="mistaken")
    with pytest.raises(ConfigError, match="is for run 'genuine', the invite for 'mistaken'"):
        come(invite, tmp_path)


def test_dead_desks_get_a_verdict_for_each_address(office: Office, tmp_path: Path) -> None:
    ports = closed_port(), closed_port()
    peer_id = office.address.split("/p2p/")[1]
    invite = office.invite("dead", *(f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_id}" for port in ports))
    with pytest.raises(SwarmUnreachable) as caught:
        come(invite, tmp_path)
    for port in ports:
        assert f"127.0.0.1:{port} refuses connections: the peer is down or listens elsewhere" in str(caught.value)
    assert "ask the organiser" in str(caught.value)


def test_one_living_desk_of_two_is_enough(office: Office, tmp_path: Path) -> None:
    bundle = office.bundle()
    served = office.open_desk(bundle)
    dead = f"/ip4/127.0.0.1/tcp/{closed_port()}/p2p/{office.address.split('/p2p/')[1]}"
    come(office.invite(served.run_id, dead, *served.addresses), tmp_path)
    assert files_in(tmp_path / "bundle") == files_in(bundle)


def test_address_of_something_else_is_told_as_such(office: Office, tmp_path: Path) -> None:
    """A port that has another owner by now: connections are accepted, and it does not speak libp2p."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_hang_up_on_everyone, args=(server,), daemon=True).start()
        port = server.getsockname()[1]
        invite = office.invite("gone", f"/ip4/127.0.0.1/tcp/{port}/p2p/{office.address.split('/p2p/')[1]}")
        with pytest.raises(SwarmUnreachable, match=rf"tcp/{port}.*answers, but libp2p cannot connect"):
            come(invite, tmp_path)
        server.shutdown(socket.SHUT_RDWR)


def _hang_up_on_everyone(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            server.accept()[0].close()


# --- the dial-back ---------------------------------------------------------------------------------------------------


def test_newcomer_that_can_be_reached_is_told_so(office: Office, tmp_path: Path) -> None:
    reception = come(office.open_desk(office.bundle()), tmp_path, should_dial_back=True)
    assert reception.is_reachable, reception
    port = reception.listen.rsplit("/", 1)[1]
    assert int(port) and reception.announce == (f"/ip4/127.0.0.1/tcp/{port}",)
    assert reception.verdict == f"others can reach this machine at 127.0.0.1:{port}: full peer"
    with socket.create_server(("127.0.0.1", int(port))):
        pass  # the port is free again, for the peer itself


def test_closed_port_is_unreachable_and_a_second_call_at_once_is_busy(office: Office) -> None:
    bundle = office.bundle()
    office.open_desk(bundle)

    async def ask() -> list[dict[str, Any]]:
        async with stranger(office) as p2p:
            stub = Desk.get_stub(p2p, office.p2p.peer_id, namespace=bundle.name)
            port = str(closed_port())
            return [json.loads((await stub.rpc_dial_back(StringValue(value=port))).value) for _ in range(2)]

    first, second = asyncio.run(ask())
    assert first == {
        "host": "127.0.0.1", "is_reachable": False, "reason": "nobody answers at the observed address",
    }  # fmt: skip
    assert second == {"host": "127.0.0.1", "is_reachable": False, "reason": "busy"}


def test_what_is_no_port_is_not_dialled(office: Office) -> None:
    bundle = office.bundle()
    office.open_desk(bundle)

    async def ask() -> list[str]:
        async with stranger(office) as p2p:
            stub = Desk.get_stub(p2p, office.p2p.peer_id, namespace=bundle.name)
            ports = ["0", "65536", "-1", "", "http", "²", "4001/../.."]
            return [json.loads((await stub.rpc_dial_back(StringValue(value=port))).value)["reason"] for port in ports]

    assert set(asyncio.run(ask())) == {"not a port"}


def test_another_peer_at_the_observed_port_is_not_the_caller(office: Office) -> None:
    """Whoever names a port where somebody else listens, here the desk itself, is not reachable there."""
    bundle = office.bundle()
    office.open_desk(bundle)

    async def ask() -> dict[str, Any]:
        async with stranger(office) as p2p:
            stub = Desk.get_stub(p2p, office.p2p.peer_id, namespace=bundle.name)
            port = office.address.split("/tcp/")[1].split("/")[0]
            answer: dict[str, Any] = json.loads((await stub.rpc_dial_back(StringValue(value=port))).value)
            return answer

    assert asyncio.run(ask())["is_reachable"] is False


def test_newcomer_that_finds_the_desk_busy_asks_again(office: Office, tmp_path: Path) -> None:
    """Taking "busy" for "no" would make a client of a peer that all can reach."""
    invite = office.open_desk(office.bundle())
    assert come(invite, tmp_path / "first", should_dial_back=True).is_reachable
    assert come(invite, tmp_path / "second", should_dial_back=True).is_reachable


@contextlib.asynccontextmanager
async def stranger(office: Office) -> AsyncIterator[P2P]:
    """A libp2p daemon of our own, connected to the office's."""
    p2p = await P2P.create(
        initial_peers=[office.address], host_maddrs=[LISTEN], dht_mode="client", auto_nat=False, nat_port_map=False
    )
    try:
        yield p2p
    finally:
        await p2p.shutdown()


async def first_message(p2p: P2P, desk: P2P, run_id: str, part: str) -> bytes:
    async def requests() -> AsyncIterator[StringValue]:
        yield StringValue(value=part)
        await asyncio.Event().wait()

    stream = await Desk.get_stub(p2p, desk.peer_id, namespace=run_id).rpc_part(requests())
    async with contextlib.aclosing(stream):
        return bytes((await anext(stream)).value)
