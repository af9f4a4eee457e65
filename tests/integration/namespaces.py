"""A small internet of network namespaces: public hosts on one switch, and home networks behind gateways that do NAT.

Public hosts have addresses 44.77.0.x. libp2p treats 10/8 and 192.168/16 as unreachable from the start, so with private
ones a test would show nothing. All of it, links included, lives inside namespaces with a prefix of their own: two runs
beside each other do not meet, and nothing is left in the machine's own network.
"""

import contextlib
import os
import secrets
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

PUBLIC_NET = "44.77.0"
FIRST_GATEWAY = 200
"""The k-th gateway is PUBLIC_NET.(200+k)."""


class NamespacesRefused(Exception):
    """The kernel does not let us make namespaces, for instance in a container without NET_ADMIN."""


@dataclass
class Internet:
    """Use as a context manager: it kills what still runs inside its namespaces, by pid, and removes them by name."""

    prefix: str = field(default_factory=lambda: f"calm{os.getpid()}{secrets.token_hex(2)}")
    names: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        try:
            self._switch = self._namespace("switch")
        except subprocess.CalledProcessError as exc:
            raise NamespacesRefused(f"ip netns add: {exc.stderr.strip()}") from exc
        try:
            self._ip(self._switch, "link", "add", "br0", "type", "bridge")
            self._ip(self._switch, "link", "set", "br0", "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def public_host(self, number: int) -> str:
        """A namespace with the address PUBLIC_NET.`number`; its name."""
        host = self._namespace(f"host{number}")
        self._plug(host, device="eth0", number=number)
        return host

    def shape(self, number: int, *, mbit: float) -> None:
        """Give the public host `number` a line of `mbit` Mbit/s in each direction: a token bucket at either end.

        The bucket holds 10 ms, but never less than some packets; the queue before it 100 ms, as a home router's. And
        TCP's congestion control is CUBIC, as on almost every computer, whatever this machine uses: BBR keeps several
        streams in both directions from filling such a line.
        """
        host, network = f"{self.prefix}-host{number}", f"{PUBLIC_NET}.0/24"
        source = f"{PUBLIC_NET}.{number}"
        self._ip(host, "route", "change", network, "dev", "eth0", "src", source, "congctl", "cubic")
        burst = max(16_000, round(mbit * 1e6 / 8 / 100))
        shaper = ("root", "tbf", "rate", f"{round(mbit * 1000)}kbit", "burst", str(burst), "latency", "100ms")
        self.run(host, "tc", "qdisc", "replace", "dev", "eth0", *shaper)
        self.run(self._switch, "tc", "qdisc", "replace", "dev", f"p{number}", *shaper)

    def cut(self, number: int) -> None:
        """Take the public host `number` off the switch: what it sends is lost, and it is not told."""
        self._ip(self._switch, "link", "set", f"p{number}", "down")

    def mend(self, number: int) -> None:
        self._ip(self._switch, "link", "set", f"p{number}", "up")

    def host_behind_nat(self, number: int, *, drops_strangers: bool) -> str:
        """A namespace whose only way out is a gateway that masquerades; its name.

        A stranger's packet to the gateway's own ports is refused at once, or dropped without a word as most home
        routers do; it never gets through to the host.
        """
        gateway, host = self._namespace(f"gw{number}"), self._namespace(f"nat{number}")
        self._plug(gateway, device="pub", number=FIRST_GATEWAY + number)
        self._ip(host, "link", "add", "eth0", "type", "veth", "peer", "name", "priv", "netns", gateway)
        home = f"192.168.{number}"
        for namespace, device, address in ((gateway, "priv", f"{home}.1/24"), (host, "eth0", f"{home}.2/24")):
            self._ip(namespace, "addr", "add", address, "dev", device)
            self._ip(namespace, "link", "set", device, "up")
        self._ip(host, "route", "add", "default", "via", f"{home}.1")
        self.run(gateway, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        known = ("-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT")
        for rule in (
            ("-t", "nat", "-A", "POSTROUTING", "-o", "pub", "-j", "MASQUERADE"),
            ("-P", "FORWARD", "DROP"),
            ("-A", "FORWARD", "-i", "priv", "-o", "pub", "-j", "ACCEPT"),
            ("-A", "FORWARD", "-i", "pub", "-o", "priv", *known),
            *([("-A", "INPUT", "-i", "pub", "-j", "DROP")] if drops_strangers else []),
        ):
            self.run(gateway, "iptables", *rule)
        return host

    def inside(self, namespace: str, *argv: str | Path) -> list[str]:
        """The command that runs `argv` in `namespace`. It execs, so the pid is that of `argv`."""
        return ["ip", "netns", "exec", namespace, *map(str, argv)]

    def run(self, namespace: str, *argv: str) -> str:
        """Run `argv` in `namespace` to its end and return what it printed; CalledProcessError if it fails."""
        return _run(self.inside(namespace, *argv))

    def pids(self, namespaces: Sequence[str] = ()) -> list[int]:
        """Processes that run in `namespaces`, or in any of ours."""
        found: list[int] = []
        for name in namespaces or self.names:
            found += map(int, _run(["ip", "netns", "pids", name]).split())
        return found

    def close(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for name in reversed(self.names):
            _run(["ip", "netns", "del", name])
        self.names.clear()

    def _namespace(self, what: str) -> str:
        name = f"{self.prefix}-{what}"
        _run(["ip", "netns", "add", name])
        self.names.append(name)
        self._ip(name, "link", "set", "lo", "up")
        return name

    def _plug(self, namespace: str, *, device: str, number: int) -> None:
        """Join `namespace` to the switch with the public address `number`."""
        port = f"p{number}"
        self._ip(self._switch, "link", "add", port, "type", "veth", "peer", "name", device, "netns", namespace)
        self._ip(self._switch, "link", "set", port, "master", "br0")
        self._ip(self._switch, "link", "set", port, "up")
        self._ip(namespace, "addr", "add", f"{PUBLIC_NET}.{number}/24", "dev", device)
        self._ip(namespace, "link", "set", device, "up")

    def _ip(self, namespace: str, *arguments: str) -> None:
        _run(["ip", "-n", namespace, *arguments])


def _run(argv: Sequence[str]) -> str:
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=30, env=environment
    ).stdout
