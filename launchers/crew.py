"""The job's own peers: start them in order, ask how they are, send them home."""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from calm_ray.actors.peer_actor import peer_actor, read_bundle
from calm_ray.errors import CalmRayError
from calm_ray.invite import Invite
from calm_ray.peers.spec import CheckpointSpec, PeerSpec
from calm_ray.peers.status import PeerStatus
from calm_ray.report import Role
from calm_ray.signing import load_or_create_key, public_bytes
from launchers.organiser import OrganiserConfig
from launchers.output import BUNDLE, CHECKPOINTS, KEY, PEERS

START_SECONDS = 120.0
CALL_SECONDS = 30.0
STOP_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Member:
    """One own peer."""

    name: str
    role: Role
    actor: Any
    folder: Path


class Crew:
    """Auxiliary peers first, for their addresses make the invite; then the monitor, then trainers."""

    def __init__(self, config: OrganiserConfig, *, out: Path, resume: Path | None) -> None:
        """`resume`: a folder of checkpoints from which the first peer brings the swarm back to life."""
        self._config, self._out, self._resume = config, out, resume
        self.members: list[Member] = []
        self.invite: Invite | None = None

    def start_auxiliaries(self) -> Invite:
        """Start the bootstrap peers; the invite that names all of them."""
        bundle = read_bundle(self._out / BUNDLE)
        key = public_bytes(load_or_create_key(self._out / KEY))
        addresses: list[str] = []
        for index in range(self._config.organiser.job.num_auxiliary):
            invite = self.invite.encode() if self.invite else None
            self._start("auxiliary", index, bundle=None if invite else bundle, invite=invite)
            status = self._wait_for_address(self.members[-1])
            addresses += status.addresses[:2]
            self.invite = Invite(run_id=self._config.run.run_id, addresses=tuple(addresses), organiser_key=key)
        assert self.invite is not None
        return self.invite

    def start_others(self) -> None:
        """Start monitors and trainers; they join like everyone else, by invite."""
        assert self.invite is not None, "start_auxiliaries() first"
        job, checkpoint = self._config.organiser.job, self._config.organiser.checkpoint
        for index in range(job.num_monitors):
            spec = CheckpointSpec(
                folder=self._out / CHECKPOINTS, every_epochs=checkpoint.every_epochs, keep_last=checkpoint.keep_last
            )
            # One writer: the lease that lets several monitors take turns comes with the cluster.
            self._start("monitor", index, invite=self.invite.encode(), checkpoints=spec if index == 0 else None)
        for index in range(job.num_trainers):
            self._start("trainer", index, invite=self.invite.encode(), num_gpus=job.num_gpus_per_trainer)

    def _start(
        self, role: Role, index: int, *, invite: str | None, bundle: dict[str, bytes] | None = None,
        checkpoints: CheckpointSpec | None = None, num_gpus: float = 0,
    ) -> None:  # fmt: skip
        name = f"{role}-{index}"
        folder = self._out / PEERS / name
        spec = PeerSpec(
            role=role, folder=folder, invite=invite, bundle=self._out / BUNDLE if invite is None else None,
            peer=self._config.peer.model_copy(update={"name": ""}), reach="public", checkpoints=checkpoints,
            resume=self._resume if invite is None else None,
            linger_seconds=3600,  # the job says when the last checkpoint is written
        )  # fmt: skip
        actor = (
            peer_actor()
            .options(name=f"{self._config.run.run_id}/{name}", num_gpus=num_gpus)
            .remote(spec.model_dump_json(), bundle=bundle)
        )
        self.members.append(Member(name=name, role=role, actor=actor, folder=folder))
        _get(actor.start.remote(), what=name, seconds=START_SECONDS)

    def _wait_for_address(self, member: Member) -> PeerStatus:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            status = self.status(member)
            if status.state == "assisting" and status.addresses:
                return status
            if status.exit_code is not None:
                raise CalmRayError(f"{member.name} did not start: {status.error}; log: {member.folder / 'peer.log'}")
            time.sleep(0.2)
        raise CalmRayError(f"{member.name} is not up after {START_SECONDS:.0f} s; log: {member.folder / 'peer.log'}")

    def status(self, member: Member) -> PeerStatus:
        """What `member` says; CalmRayError if its actor is gone."""
        answer = _get(member.actor.status.remote(), what=member.name, seconds=CALL_SECONDS)
        return PeerStatus.model_validate_json(answer)

    def of_role(self, role: Role) -> list[Member]:
        return [member for member in self.members if member.role == role]

    def stop(self) -> None:
        """Trainers first, auxiliary peers last, so that goodbyes still find someone."""
        for role in ("trainer", "monitor", "auxiliary"):
            members = self.of_role(role)
            pending = [m.actor.stop.remote() for m in members]
            with contextlib.suppress(ray.exceptions.RayError):
                ray.wait(pending, num_returns=len(pending), timeout=STOP_SECONDS)
            for member in members:
                ray.kill(member.actor)
        self.members.clear()


def _get(ref: Any, *, what: str, seconds: float) -> Any:
    try:
        return ray.get(ref, timeout=seconds)
    except ray.exceptions.GetTimeoutError as exc:
        raise CalmRayError(f"{what}: its Ray actor does not answer within {seconds:.0f} s") from exc
    except ray.exceptions.RayTaskError as exc:
        raise CalmRayError(f"{what}: {exc.cause}") from exc
    except ray.exceptions.RayError as exc:
        raise CalmRayError(f"{what}: its Ray actor is gone: {exc}") from exc
