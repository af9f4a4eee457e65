"""How far one gets towards one bootstrap address: name, TCP, libp2p, the right peer, its desk. Light: no hivemind.

`addresses.probe` says in a sentence whether somebody accepts connections. The doctor wants to know which step fails,
and how long those before it took.
"""

import socket
import time
from dataclasses import replace
from typing import Literal

from calm_ray.swarm.addresses import parse_address, probe
from calm_ray.tables import Table

TCP_SECONDS = 5.0
MAX_HOSTS = 3
"""Of those that a name resolves to. libp2p tries them all; we only want to know whether any is there."""

Step = Literal["name", "tcp", "libp2p", "peer", "desk", "bundle", "done"]

_FAMILIES = {"ip4": socket.AF_INET, "dns4": socket.AF_INET, "ip6": socket.AF_INET6, "dns6": socket.AF_INET6}


class AddressFacts(Table):
    """What is known about one address of an invite."""

    text: str
    """The multiaddress."""
    place: str
    """host:port, for people."""
    step: Step
    """How far we came: the step that `problem` is about, or where we stopped without one."""
    problem: str = ""
    tcp_seconds: float | None = None
    """None for an address that is not TCP."""
    libp2p_seconds: float | None = None
    peer_id: str = ""
    """Of who answers there."""
    version: str = ""
    """calm-ray of the organiser, as the signed manifest says."""
    mismatch: str = ""
    """Why our code cannot take part in the run, and the remedy."""
    bundle_bytes: int = 0


class ReachFacts(Table):
    """Whether others can reach us."""

    is_reachable: bool = False
    place: str = ""
    """Where, if so: host:port, for people."""
    address: str = ""
    """The same as a multiaddress, to be announced."""
    problem: str = ""
    is_known: bool = True
    """Not if every desk was busy."""


def place_of(text: str) -> str:
    """`/ip4/1.2.3.4/tcp/4001/p2p/Qm...` -> `1.2.3.4:4001`"""
    address = parse_address(text)
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{host}:{address.port}"


def knock(text: str) -> AddressFacts:
    """Resolve and connect once by TCP. Blocks for MAX_HOSTS * TCP_SECONDS and as long as the resolver takes."""
    address, place = parse_address(text), place_of(text)
    family = _FAMILIES.get(text.split("/")[1], socket.AF_UNSPEC)
    try:
        found = socket.getaddrinfo(address.host, address.port, family, socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):  # a label of a name may be too long for IDNA
        return AddressFacts(text=text, place=place, step="name", problem="name does not resolve")
    if not address.is_tcp:
        return AddressFacts(text=text, place=place, step="tcp")
    problem = ""
    for host in list(dict.fromkeys(str(info[4][0]) for info in found))[:MAX_HOSTS]:
        started = time.monotonic()
        verdict = probe(replace(address, host=host), timeout_seconds=TCP_SECONDS)
        if not verdict.problem:
            return AddressFacts(text=text, place=place, step="tcp", tcp_seconds=time.monotonic() - started)
        problem = problem or verdict.problem
    return AddressFacts(text=text, place=place, step="tcp", problem=problem)
