"""One Ray actor holds one peer process, by its lease: when the actor ends, for whatever reason, the peer leaves.

The actor is a thin shell. hivemind forks, and a Ray worker holds gRPC threads: they never share a process.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from calm_ray.peers.handle import PeerHandle
from calm_ray.peers.spec import PeerSpec


class PeerActor:
    """Start it with `start`, ask with `status`, end it with `stop`. Everything crosses as JSON."""

    def __init__(self, spec_json: str, *, bundle: Mapping[str, bytes] | None = None) -> None:
        spec = PeerSpec.model_validate_json(spec_json)
        if bundle is not None:
            for name, data in bundle.items():
                path = spec.folder / "bundle" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            spec = spec.model_copy(update={"bundle": spec.folder / "bundle"})
        # An actor without a GPU would otherwise see all of the node's: trainers get exactly what Ray assigned.
        has_gpu = bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))
        self._handle = PeerHandle(spec, environment={} if has_gpu else {"CUDA_VISIBLE_DEVICES": ""})

    def start(self) -> int:
        """Start the peer; its watchdog's pid."""
        self._handle.start()
        return self._handle.pid

    def status(self) -> str:
        """The peer's last status as JSON."""
        return self._handle.status().model_dump_json()

    def stop(self) -> int:
        """Leave and wait; the exit code."""
        return self._handle.stop()


def peer_actor() -> Any:
    """The Ray actor class of `PeerActor`: no CPU of its own, never restarted by Ray (one owner for each restart)."""
    return ray.remote(num_cpus=0, max_restarts=0)(PeerActor)


def read_bundle(folder: Path) -> dict[str, bytes]:
    """A sealed bundle as one value for Ray's object store."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
