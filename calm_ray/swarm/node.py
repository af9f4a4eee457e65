"""A peer's place in the swarm: one DHT, one libp2p identity; publish a report, read everyone's, close."""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import hivemind
import psutil
from google.protobuf.message import DecodeError
from hivemind.dht.protocol import ValidationError
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from hivemind.utils import get_dht_time

from calm_ray.errors import ConfigError, SwarmUnreachable
from calm_ray.report import MAX_REPORT_BYTES
from calm_ray.swarm.addresses import live_addresses, parse_address, peer_at
from calm_ray.swarm.codecs import mend_codecs
from calm_ray.swarm.hygiene import bind_children_to_parent, share_memory_with_children
from calm_ray.swarm.loop import EventLoopThread
from calm_ray.swarm.records import load_identity, own_subkey, owner_of, record_validators, reports_key
from calm_ray.swarm.transport import bound_messages

CALL_TIMEOUT_SECONDS = 15.0
"""A DHT call over the internet takes well under a second per hop; past this the DHT process is stuck or dead."""
_CLOCK_WORDS, _BOOTSTRAP_WORDS = "local time must be within", "failed to connect to bootstrap peers"
"""Of hivemind's DHTNode and of p2pd: all that they give to tell one trouble from another."""
WITHDRAWN, WITHDRAW_SECONDS = b"", 2.0
STARTUP_TIMEOUT_SECONDS = 60.0
"""hivemind's 15 s is the most reported failure of its users: slow machines need longer."""
NARROW_READ = {"beam_size": 3, "num_workers": 3}
NARROW_WRITE = {"beam_size": 5, "num_workers": 5}
"""How many nodes nearest to a key are asked. A write stores its record on five, a read takes the newest of three; they
agree but for a node that has just come. hivemind asks twenty for either, and whoever has a copy answers with all of it,
even to those who look where to write."""

T = TypeVar("T")


class NobodyThere(SwarmUnreachable):
    """Somebody accepts connections at the addresses given, and none of them is a peer of the swarm."""


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """How this peer is reached."""

    is_client_mode: bool
    listen: str
    announce: tuple[str, ...] = ()
    identity_path: Path


class Swarm:
    """Membership of one run's DHT: `join`; then `publish`, `snapshot`, `call` from any thread; `close` at the end."""

    def __init__(self, dht: hivemind.DHT, *, run_id: str, identity_path: Path) -> None:
        self.dht, self.run_id = dht, run_id
        self.key = load_identity(identity_path.read_bytes())
        self._subkey = own_subkey(self.key)
        self.loop = EventLoopThread(name="swarm-calls")
        self._p2p: P2P | None = None
        self._p2p_lock = asyncio.Lock()
        self._helpers = _helpers_of(dht)

    @classmethod
    def join(cls, run_id: str, *, initial_peers: Sequence[str], options: NodeOptions) -> "Swarm":
        """Start a DHT node; SwarmUnreachable with a verdict per address."""
        bind_children_to_parent()
        mend_codecs()
        bound_messages()
        ensure_identity(options.identity_path)
        peers = live_addresses(initial_peers) if initial_peers else []
        key = load_identity(options.identity_path.read_bytes())

        def start(*, strict: bool) -> hivemind.DHT:
            return hivemind.DHT(
                initial_peers=peers or None,
                start=True,
                client_mode=options.is_client_mode,
                host_maddrs=[options.listen],
                announce_maddrs=list(options.announce) or None,
                identity_path=str(options.identity_path),
                check_if_identity_free=False,  # costs one more connection; the peer's folder is locked anyway
                record_validators=record_validators(run_id, key),
                startup_timeout=STARTUP_TIMEOUT_SECONDS,
                strict=strict,
                **network_options(options.listen),
            )

        share_memory_with_children()
        try:
            try:
                dht = start(strict=True)
            except ValidationError as exc:
                if _CLOCK_WORDS not in str(exc):
                    raise
                dht = start(strict=False)  # a clock that is off is told beside the state, or refused: `peers/vigil.py`
        except P2PDaemonError as exc:
            if _BOOTSTRAP_WORDS in str(exc):
                raise NobodyThere(f"{', '.join(peers)}: answers, but libp2p cannot connect: {exc}") from exc
            raise SwarmUnreachable(f"libp2p did not start on {options.listen}: {exc}") from exc
        except ValidationError as exc:  # DHTNode.create: a bootstrap peer could not call us back
            raise SwarmUnreachable(
                f"the swarm cannot call this peer back: a firewall, a wrong [peer] announce, or another process that "
                f"uses its identity, {options.identity_path} ({exc})"
            ) from exc
        except RuntimeError as exc:  # DHTNode.create: bootstrap peers answer on TCP but not as members of a DHT
            raise NobodyThere(f"{', '.join(peers)}: answers, but not as a peer of this swarm: {exc}") from exc
        return cls(dht, run_id=run_id, identity_path=options.identity_path)

    @property
    def peer_id(self) -> str:
        return str(self.dht.peer_id.to_base58())

    @property
    def is_client_mode(self) -> bool:
        return bool(self.dht.client_mode)

    def addresses(self) -> list[str]:
        """Where others can reach this peer, best first: what an invite lists."""
        found = [str(a) for a in self.dht.get_visible_maddrs(latest=True)]
        return sorted(filter(peer_at, found), key=lambda a: parse_address(a).is_loopback)

    def routed_peers(self) -> frozenset[str]:
        """Ids of the other nodes in our routing table: full peers. SwarmUnreachable if our DHT process is stuck."""
        return frozenset(self.run_in_dht(_routed_peers))

    def neighbours(self) -> list[str]:
        """Addresses of full peers that we are connected to; of one that called us, right only if it calls from where
        it listens, as libp2p does if it can. Of clients there would be nothing but ports that nobody answers at."""
        try:
            routed = self.routed_peers()
            found: Any = self.call(lambda p2p: p2p.list_peers(), timeout_seconds=CALL_TIMEOUT_SECONDS)
        except (SwarmUnreachable, TimeoutError, OSError, EOFError):
            return []
        texts = sorted(f"{address}/p2p/{peer.peer_id}" for peer in found for address in peer.addrs)
        dialable = [text for text in texts if peer_at(text) in routed]
        return sorted(dialable, key=lambda text: parse_address(text).is_loopback)

    def publish(self, report: bytes, *, lifetime_seconds: float) -> bool:
        """Store this peer's signed report; True if some node took it. Replaces the one before."""
        assert len(report) <= MAX_REPORT_BYTES, "reports are bounded: see calm_ray.report"
        return self.store(
            reports_key(self.run_id), subkey=self._subkey, value=report,
            expiration_time=get_dht_time() + lifetime_seconds,
        )  # fmt: skip

    def withdraw(self, *, lifetime_seconds: float) -> None:
        """Put nothing in the place of our report, so that nobody counts on us; waits WITHDRAW_SECONDS at most."""
        with contextlib.suppress(SwarmUnreachable):
            self._ask(
                self.dht.store, reports_key(self.run_id), WITHDRAWN, subkey=self._subkey,
                expiration_time=get_dht_time() + lifetime_seconds, timeout_seconds=WITHDRAW_SECONDS, **NARROW_WRITE,
            )  # fmt: skip

    def snapshot(self) -> list[tuple[str, bytes]]:
        """All reports that the DHT holds now, as (owner's peer id, bytes); what they say is not checked here."""
        reports = []
        for subkey, entry in self.get(reports_key(self.run_id)).items():
            if entry.value != WITHDRAWN:
                with contextlib.suppress(ValueError):
                    reports.append((owner_of(subkey), entry.value))
        return reports

    def call(self, action: Callable[[P2P], Awaitable[T]], *, timeout_seconds: float) -> T:
        """Run `action` with this peer's libp2p handle, on the thread that keeps it."""

        async def run() -> T:
            return await action(await self.p2p())

        return self.loop.run(run(), timeout_seconds=timeout_seconds)

    async def p2p(self) -> P2P:
        """This peer's libp2p handle. For coroutines that run on `loop` only."""
        async with self._p2p_lock:
            if self._p2p is None:
                try:
                    self._p2p = await self.dht.replicate_p2p()
                except (P2PDaemonError, OSError, EOFError) as exc:
                    raise SwarmUnreachable(f"libp2p's daemon does not let us in: {exc!r}") from exc
            return self._p2p

    def get(self, key: str) -> dict[Any, Any]:
        """The newest entries of a DHT dictionary, empty if there is none. SwarmUnreachable if the DHT is stuck."""
        found: Any = self._ask(self.dht.get, key, latest=True, **NARROW_READ)
        return found.value if found is not None and isinstance(found.value, dict) else {}

    def store(self, key: str, *, subkey: bytes, value: Any, expiration_time: float) -> bool:
        """Store one entry of a DHT dictionary; True if some node took it. SwarmUnreachable if the DHT is stuck."""
        found = self._ask(self.dht.store, key, value, expiration_time=expiration_time, subkey=subkey, **NARROW_WRITE)
        return bool(found)

    def run_in_dht(self, action: Callable[[hivemind.DHT, Any], Awaitable[Any]]) -> Any:
        """Run a module's coroutine function in the DHT's own process. SwarmUnreachable if that is stuck or gone."""
        return self._ask(self.dht.run_coroutine, action)

    def lost_process(self) -> str:
        """Which of our processes has ended, or nothing: without its DHT or p2pd a trainer would go on alone.

        Asks the operating system, not the processes: one that is slow is alive.
        """
        for name, process in self._helpers.items():
            with contextlib.suppress(psutil.Error):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    continue
            return f"the {name} has ended"
        return ""

    def stuck_process(self) -> str:
        """Which of our processes does not answer us, or nothing. Needs nobody else; blocks for two calls at most."""
        try:
            self.routed_peers()
        except SwarmUnreachable:
            return "the DHT process does not answer"
        try:
            self.call(lambda p2p: p2p.list_peers(), timeout_seconds=CALL_TIMEOUT_SECONDS)
        except (SwarmUnreachable, TimeoutError, OSError, EOFError):
            return "the libp2p daemon does not answer"
        return ""

    def _ask(
        self, method: Callable[..., Any], *args: Any, timeout_seconds: float = CALL_TIMEOUT_SECONDS, **kwargs: Any
    ) -> Any:
        """Wait for a DHT call, but never for ever; a dead or stuck DHT process is SwarmUnreachable."""
        try:
            return method(*args, return_future=True, **kwargs).result(timeout=timeout_seconds)
        except TimeoutError as exc:
            raise SwarmUnreachable(f"the DHT did not answer within {timeout_seconds:.0f} s") from exc
        except (OSError, EOFError) as exc:
            raise SwarmUnreachable(f"the DHT process has ended: {exc}") from exc

    def close(self) -> None:
        if self._p2p is not None:
            with contextlib.suppress(Exception):  # a daemon that died already has nothing to close
                self.loop.run(self._p2p.shutdown(), timeout_seconds=2.0)
            self._p2p = None
        self.loop.close()
        self.dht.shutdown()


def _helpers_of(dht: hivemind.DHT) -> dict[str, psutil.Process]:
    process = psutil.Process(dht.pid)
    daemons = [child for child in process.children(recursive=True) if child.name() == "p2pd"]
    if len(daemons) != 1:
        raise SwarmUnreachable(f"libp2p's daemon ended as soon as it had started: {len(daemons)} there")
    return {"DHT process": process, "libp2p daemon": daemons[0]}


async def _routed_peers(_dht: hivemind.DHT, node: Any) -> list[str]:
    """In the DHT's process."""
    return [str(peer) for peer in node.protocol.routing_table.uid_to_peer_id.values()]


def ensure_identity(path: Path) -> None:
    """Make a libp2p identity (RSA 2048, 0400) unless the file is there. ConfigError if what is there is none; OSError,
    and no file, if the disk has no room for it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _make_identity(path)
    try:
        load_identity(path.read_bytes())
    except (DecodeError, ValueError) as exc:
        raise ConfigError(f"{path}: damaged, perhaps by a full disk; delete it, and a new one is made") from exc


def _make_identity(path: Path) -> None:
    """Half of one, left by a full disk, would park the peer even after room was made."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # nobody may write to it
    try:
        P2P.generate_identity(str(partial))
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as exc:
        exc.filename = exc.filename or str(path)  # a write that finds no room does not say where
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def network_options(listen: str) -> dict[str, object]:
    """Options of p2pd that only make sense off this machine: none of them for a swarm on the loopback interface."""
    is_local = parse_address(listen.replace("/tcp/0", "/tcp/1")).is_loopback
    return {"auto_nat": not is_local, "nat_port_map": not is_local}
