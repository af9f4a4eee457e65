"""Where this machine is, as far as it can tell itself: a peer that has moved must join again, to be dialled there."""

import socket
from dataclasses import dataclass

import psutil

_INVISIBLE = ("127.", "169.254.", "fe80", "::1")


@dataclass(frozen=True, kw_only=True)
class Place:
    source: str = ""
    """Our address on the way to the internet, if there is one."""
    hosts: frozenset[str] = frozenset()
    """IP addresses that others could see; without loopback and link-local ones."""

    def __str__(self) -> str:
        return self.source or ", ".join(sorted(self.hosts))


def own_place() -> Place:
    """Asks the operating system only."""
    hosts = {
        address.address.partition("%")[0]
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6) and not address.address.startswith(_INVISIBLE)
    }
    source = _source(socket.AF_INET, "192.0.2.1") or _source(socket.AF_INET6, "2001:db8::1")
    return Place(source=source if source in hosts else "", hosts=frozenset(hosts))


def _source(family: socket.AddressFamily, anywhere: str) -> str:
    """The address that the default route begins at. No packet is sent."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as trial:
            trial.connect((anywhere, 9))
            return str(trial.getsockname()[0])
    except OSError:
        return ""


def has_moved(before: Place, now: Place) -> bool:
    """Whether the address is gone that this machine had on its way to the internet, and another is there instead.

    Others may stay wherever it goes: Docker's, a virtual machine's, a VPN's. Without a network it is nowhere, yet. One
    that had no way out is told by all of its addresses.
    """
    if before.source:
        return bool(now.source) and before.source not in now.hosts
    return bool(before.hosts) and bool(now.hosts) and not before.hosts & now.hosts
