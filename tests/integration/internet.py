"""Volunteers on a small internet of namespaces, started as volunteers start them; and what their logs say of rounds."""

import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from calm_ray.bundle import seal_bundle
from calm_ray.config import load_config
from calm_ray.invite import Invite
from calm_ray.peers.control import ControlClient
from calm_ray.peers.status import PeerStatus
from calm_ray.signing import load_or_create_key, public_bytes
from calm_ray.training.prepare import write_parts
from tests.eventually import Child, Children, eventually
from tests.integration.namespaces import Internet, NamespacesRefused
from tests.integration.runs import write_config

START_SECONDS = 120.0
_ROUND = re.compile(r"round epoch=(\d+) outcome=(\w+)(.*)")


@dataclass(frozen=True, kw_only=True)
class Round:
    """One line of a peer's log about a gradient round."""

    epoch: int
    outcome: str
    group_size: int
    num_bytes: int
    """Received from others."""
    num_banned: int
    digest: str


@dataclass
class VolunteerSwarm:
    """One auxiliary peer and some volunteers, each in its namespace."""

    folder: Path
    net: Internet
    children: Children
    namespaces: dict[str, str] = field(default_factory=dict)
    peers: dict[str, Child] = field(default_factory=dict)

    def start(self, name: str, *argv: str | Path) -> None:
        command = (sys.executable, "-W", "ignore", "-m", "calm_ray", *argv, "--folder", self.folder / name)
        self.peers[name] = self.children.start(self.net.inside(self.namespaces[name], *command))

    def status(self, name: str) -> PeerStatus:
        child = self.peers[name]
        try:
            client = ControlClient(self.folder / name)
        except OSError:
            if not child.is_running():
                raise RuntimeError(f"{name} has left:\n{child.tail()}\n{self.log(name)[-3000:]}") from None
            return PeerStatus(role="trainer")
        try:
            return client.call("status")
        finally:
            client.close()

    def wait(self, name: str, predicate: Callable[[PeerStatus], object], timeout: float) -> PeerStatus:
        def holds() -> PeerStatus | None:
            status = self.status(name)
            return status if predicate(status) else None

        found = eventually(
            holds, timeout, lambda: f"{name}: {self.status(name)}\n{self.log(name)[-3000:]}", interval=0.5
        )
        assert found is not None
        return found

    def log(self, name: str) -> str:
        path = self.folder / name / "peer.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def rounds(self, name: str) -> list[Round]:
        """All gradient rounds in the peer's log. One that never began has no group and received nothing."""
        found = []
        for epoch, outcome, rest in _ROUND.findall(self.log(name)):
            fields = dict(re.findall(r"(\w+)=(\S*)", rest))
            found.append(
                Round(
                    epoch=int(epoch),
                    outcome=outcome,
                    group_size=int(fields["group_size"]),
                    num_bytes=int(fields["received"]),
                    num_banned=int(fields["banned"]),
                    digest=fields["digest"],
                )
            )
        return found


@contextmanager
def volunteers(
    folder: Path, *, run_id: str, places: Callable[[Internet], Mapping[str, str]], target_batch_size: int = 256
) -> Iterator[VolunteerSwarm]:
    """`places` makes a namespace for `auxiliary` and for each volunteer, and names them. Skips where there are none."""
    config = load_config(write_config(folder / "run.toml", run_id=run_id, target_batch_size=target_batch_size))
    bundle, key = folder / "bundle", load_or_create_key(folder / "organiser.key")
    write_parts(config.run, config_dir=folder, out_dir=bundle)
    seal_bundle(bundle, run=config.run, key=key)
    machine = 'device = "cpu"\nnum_threads = 1\nmicro_batch_size = 4\n'
    (folder / "auxiliary.toml").write_text(f'[peer]\n{machine}listen = "/ip4/0.0.0.0/tcp/4001"\n')
    (folder / "volunteer.toml").write_text(f"[peer]\n{machine}")
    with internet() as net, Children(folder) as children:
        swarm = VolunteerSwarm(folder, net, children, dict(places(net)))
        options = ("--role", "auxiliary", "--bundle", bundle, "--config", folder / "auxiliary.toml")
        swarm.start("auxiliary", "peer", *options)
        try:
            addresses = swarm.wait("auxiliary", lambda s: s.state == "assisting", START_SECONDS).addresses
            invite = Invite(run_id=run_id, addresses=addresses, organiser_key=public_bytes(key)).encode()
            for name in swarm.namespaces.keys() - {"auxiliary"}:
                swarm.start(name, "join", invite, "--config", folder / "volunteer.toml")
            yield swarm
        finally:
            for child in swarm.peers.values():
                child.signal_group(signal.SIGTERM)  # to all at once; `children` then waits for each


@contextmanager
def internet() -> Iterator[Internet]:
    try:
        net = Internet().__enter__()
    except NamespacesRefused as exc:
        pytest.skip(f"no network namespaces here: {exc}")
    try:
        yield net
    finally:
        net.close()
