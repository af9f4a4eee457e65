"""A tiny run for tests: a model of some thousand parameters, its bundle, and real peer processes."""

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from calm_ray.bundle import seal_bundle
from calm_ray.config import Config, load_config
from calm_ray.invite import Invite
from calm_ray.peers.handle import PeerHandle
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus
from calm_ray.signing import load_or_create_key, public_bytes
from calm_ray.training.prepare import write_parts
from tests.eventually import eventually

START_SECONDS = 60.0
ADOPTION_SECONDS = 60.0
"""Should the tests themselves be killed, their auxiliary peers do not stay for an hour."""

TINY = """
[run]
run_id = "{run_id}"
num_epochs = {num_epochs}
target_batch_size = {target_batch_size}
report_seconds = 0.5

[run.model]
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 64
embedding_size = 16
max_position_embeddings = 32

[run.tokenizer]
source = "train"
vocab_size = 300

[run.data]
sequence_length = 32
shuffle_buffer = 200
held_out_fraction = 0.1
sources = [{{ kind = "builtin" }}]

[run.optimizer]
name = "adamw"
learning_rate = 1e-2
decay_epochs = 1000

[run.averaging]
network = "lan"
compression = "{compression}"

[peer]
device = "cpu"
num_threads = 1
micro_batch_size = {micro_batch_size}
listen = "/ip4/127.0.0.1/tcp/0"
"""


def write_config(
    path: Path, *, run_id: str = "tiny", num_epochs: int = 1000, target_batch_size: int = 512,
    micro_batch_size: int = 8, compression: str = "none", more: str = "",
) -> Path:  # fmt: skip
    """Write a tiny run's TOML to `path`."""
    text = TINY.format(
        run_id=run_id, num_epochs=num_epochs, target_batch_size=target_batch_size, micro_batch_size=micro_batch_size,
        compression=compression,
    )  # fmt: skip
    path.write_text(text + textwrap.dedent(more))
    return path


@dataclass
class TinySwarm:
    """Real peers of one run on the loopback interface. Start them with `start`; all end with the context."""

    folder: Path
    config: Config
    organiser_key: bytes
    handles: dict[str, PeerHandle] = field(default_factory=dict)
    invite: str = ""

    def start(
        self, name: str, *, wait_for: str | None = None, environment: dict[str, str] | None = None, **spec: Any
    ) -> PeerHandle:
        """Start a peer; wait until its state is `wait_for`."""
        if "bundle" not in spec:
            spec["invite"] = self.invite
        handle = PeerHandle(
            PeerSpec(
                folder=self.folder / name,
                **{"peer": self.config.peer, "linger_seconds": 3600, "adoption_seconds": ADOPTION_SECONDS, **spec},
            ),
            environment=environment,
        )
        handle.start()
        self.handles[name] = handle
        if wait_for is not None:
            self.wait(name, lambda status: status.state == wait_for, START_SECONDS)
        return handle

    def start_first(self, **spec: Any) -> None:
        """Start the auxiliary peer whose address makes the invite: at the beginning, or once everyone has gone."""
        self.start("auxiliary", role="auxiliary", bundle=self.folder / "bundle", wait_for="assisting", **spec)
        addresses = self.handles["auxiliary"].status().addresses
        self.invite = Invite(
            run_id=self.config.run.run_id, addresses=addresses, organiser_key=self.organiser_key
        ).encode()  # fmt: skip

    def kill_all(self) -> None:
        """SIGKILL for every process of every peer, at once."""
        tops = [psutil.Process(handle.pid) for handle in self.handles.values()]
        processes = [process for top in tops for process in (top, *top.children(recursive=True))]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=10)
        for handle in self.handles.values():
            handle.stop()
        self.handles.clear()

    def wait(self, name: str, predicate: Callable[[PeerStatus], object], timeout: float) -> PeerStatus:
        """Wait until the peer's status satisfies `predicate`; fail at once if the peer has left."""
        handle = self.handles[name]

        def holds() -> PeerStatus | None:
            status = handle.status()
            if not predicate(status) and status.exit_code is not None:
                raise RuntimeError(f"{name} left: {status.error}\n{self.log(name)[-3000:]}")
            return status if predicate(status) else None

        found = eventually(holds, timeout, lambda: f"{name}: {handle.status()}\n{self.log(name)[-3000:]}", interval=0.2)
        assert found is not None
        return found

    def wait_for_epoch(self, name: str, epoch: int, timeout: float) -> PeerStatus:
        return self.wait(name, lambda s: s.report is not None and s.report.epoch >= epoch, timeout)

    def log(self, name: str) -> str:
        path = self.folder / name / "peer.log"
        return path.read_text(errors="replace") if path.exists() else ""


@contextmanager
def tiny_swarm(folder: Path, **values: Any) -> Iterator[TinySwarm]:
    """Prepare a bundle and start one auxiliary peer, whose address makes the invite."""
    config = load_config(write_config(folder / "run.toml", **values))
    bundle, key = folder / "bundle", load_or_create_key(folder / "organiser.key")
    write_parts(config.run, config_dir=folder, out_dir=bundle)
    seal_bundle(bundle, run=config.run, key=key)
    swarm = TinySwarm(folder, config, public_bytes(key))
    try:
        swarm.start_first()
        yield swarm
    finally:
        for handle in reversed(swarm.handles.values()):
            handle.request_stop()
        for handle in swarm.handles.values():
            handle.stop()


@contextmanager
def quiet_swarm(folder: Path, **values: Any) -> Iterator[TinySwarm]:
    """`tiny_swarm`, none of whose peers may have had to explain itself by a traceback, however bad its day was."""
    with tiny_swarm(folder, **values) as swarm:
        yield swarm
    for path in folder.glob("*/peer.log"):
        assert not (found := first_traceback(path.read_text(errors="replace"))), f"{path}: {found}"


def first_traceback(log: str) -> str:
    """The first in a log, with the line that it belongs to; empty if there is none."""
    before, mark, after = log.partition("Traceback (most recent call last)")
    return f"{before[-300:]}{mark}{after[:3000]}" if mark else ""
