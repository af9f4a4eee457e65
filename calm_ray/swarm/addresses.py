"""Bootstrap addresses: parse them, and say of each whether anyone is there.

hivemind starts its daemon with all addresses at once and, if none answers, reports the daemon's last log line. Probing
with a plain TCP connection first gives the user a verdict per address, in a second instead of fifteen.
"""

import ipaddress
import re
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from calm_ray.errors import ConfigError, SwarmUnreachable

_MULTIADDR = re.compile(
    r"^/(ip4|ip6|dns|dns4|dns6)/([^/]+)/(tcp|udp)/(\d+)(?:/[a-z0-9-]+)*(?:/p2p/([1-9A-HJ-NP-Za-km-z]+))?$"
)

REFUSED = "refuses connections: the peer is down or listens elsewhere"

_LISTEN = re.compile(r"^/(ip4|ip6)/([^/]+)/tcp/(\d+)")


@dataclass(frozen=True, kw_only=True)
class Address:
    """The parts of a libp2p multiaddress that a TCP connection needs."""

    text: str
    host: str
    port: int
    is_tcp: bool
    peer_id: str

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a probe found: `problem` is empty if something accepts connections there."""

    address: Address
    problem: str

    def __str__(self) -> str:
        return f"{self.address.host}:{self.address.port} {self.problem or 'accepts connections'}"


def parse_address(text: str) -> Address:
    """Split a multiaddress such as `/ip4/1.2.3.4/tcp/4001/p2p/Qm...`. Raises ValueError."""
    match = _MULTIADDR.fullmatch(text)
    if match is None or not 0 < int(match[4]) < 65536:
        raise ValueError(f"not a multiaddress with host and port: {text!r}")
    return Address(text=text, host=match[2], port=int(match[4]), is_tcp=match[3] == "tcp", peer_id=match[5] or "")


def peer_at(text: str) -> str:
    """The peer id in an address that can be dialled by TCP, or nothing: a relayed one cannot, nor what libp2p may say
    besides. For addresses that a stranger or a file tells."""
    try:
        address = parse_address(text)
    except ValueError:
        return ""
    return address.peer_id if address.is_tcp else ""


def check_listen(listen: str, announce: Sequence[str]) -> None:
    """Raise ConfigError if `[peer] listen` or `announce` is malformed, or if this machine cannot listen there now."""
    for key, text in (("listen", listen.replace("/tcp/0", "/tcp/1")), *(("announce", text) for text in announce)):
        try:
            parse_address(text)
        except ValueError as exc:
            raise ConfigError(f"[peer] {key}: {exc}; write it like /ip4/0.0.0.0/tcp/4001") from None
    match = _LISTEN.match(listen)
    if match is None:
        return
    try:
        with socket.socket(socket.AF_INET6 if match[1] == "ip6" else socket.AF_INET) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((match[2], int(match[3])))
    except OSError as exc:
        remedy = "choose another port, or 0 for any free one; 0.0.0.0 stands for every address of this machine"
        raise ConfigError(f"[peer] listen {listen}: {exc.strerror or exc}; {remedy}") from exc


def probe(address: Address, *, timeout_seconds: float) -> Verdict:
    """Connect once. A UDP address cannot be probed so and gets the benefit of the doubt."""
    if not address.is_tcp:
        return Verdict(address=address, problem="")
    try:
        with socket.create_connection((address.host, address.port), timeout=timeout_seconds):
            return Verdict(address=address, problem="")
    except socket.gaierror:
        problem = "name does not resolve"
    except TimeoutError:
        problem = f"no answer within {timeout_seconds:.0f} s"
    except ConnectionRefusedError:
        problem = REFUSED
    except OSError as exc:
        problem = exc.strerror or str(exc)
    return Verdict(address=address, problem=problem)


def live_addresses(addresses: Sequence[str], *, timeout_seconds: float = 5.0) -> list[str]:
    """The addresses that answer, in the given order; SwarmUnreachable with a verdict for each if none does."""
    verdicts = _probe_all(addresses, timeout_seconds=timeout_seconds)
    live = [verdict.address.text for verdict in verdicts if not verdict.problem]
    if not live:
        raise SwarmUnreachable(
            "no bootstrap peer answers: "
            + "; ".join(str(verdict) for verdict in verdicts)
            + ". Check your connection; if it is fine, ask the organiser whether the run is up or has a newer invite"
        )
    return live


def all_refuse(addresses: Sequence[str], *, timeout_seconds: float = 2.0) -> bool:
    """Whether each machine says itself that nobody is there. Silence may as well be our own line's."""
    return all(verdict.problem == REFUSED for verdict in _probe_all(addresses, timeout_seconds=timeout_seconds))


def _probe_all(addresses: Sequence[str], *, timeout_seconds: float) -> list[Verdict]:
    parsed = [parse_address(text) for text in addresses]
    with ThreadPoolExecutor(max_workers=len(parsed)) as pool:
        return list(pool.map(lambda a: probe(a, timeout_seconds=timeout_seconds), parsed))
