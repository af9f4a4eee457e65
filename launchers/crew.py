"""The job's own peers, as its driver sees them: by way of their supervisor, which it starts or adopts."""

import contextlib
import logging
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError

from calm_ray.actors.creation import create_supervisor, in_a_line
from calm_ray.actors.desired import (
    NAMESPACE,
    SUPERVISOR,
    Desired,
    Slot,
    SupervisorStatus,
    actor_name,
    bundle_digest,
)
from calm_ray.actors.ending import end_run
from calm_ray.actors.supervisor import Supervisor
from calm_ray.code import code_hash
from calm_ray.errors import CalmRayError, ConfigError
from calm_ray.peers.spec import CheckpointSpec, PeerSpec
from calm_ray.report import Role
from calm_ray.signing import load_or_create_key, public_bytes
from launchers.begin import differences, in_words
from launchers.organiser import OrganiserConfig
from launchers.output import BUNDLE, CHECKPOINTS, KEY, PEERS, run_of

CALL_SECONDS = 10.0
CONNECT_SECONDS = 10.0
PATIENCE_SECONDS = 90.0
"""For a supervisor that Ray is starting again, maybe on another node."""
LOCAL = "local"


class Crew:
    """One run's supervisor, by its name. All but the constructor need a connection."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._supervisor: Any = None
        self.is_gone = False
        """It was there once."""
        self.asked_at = 0.0
        """When we asked for the run's peers: who was parked before is tried again."""

    def find(self) -> bool:
        """Whether it lives on this cluster."""
        try:
            self._supervisor = ray.get_actor(actor_name(self._run_id, SUPERVISOR), namespace=NAMESPACE)
        except ValueError:
            return False
        except ray.exceptions.RayError as exc:
            raise CalmRayError(f"the Ray cluster does not answer: {in_a_line(exc)}") from exc
        return True

    def start(self, config: OrganiserConfig, *, out: Path) -> None:
        """Create it on this node, or follow one that another driver has created meanwhile. What `out` holds must be
        prepared: key, bundle, a checkpoint."""
        self.asked_at = time.time()
        key = public_bytes(load_or_create_key(out / KEY))
        desired = Desired(
            run_id=self._run_id, config_hash=config.run.config_hash(), code_hash=code_hash(),
            num_epochs=config.run.num_epochs, home=ray.get_runtime_context().get_node_id(), out=out,
            bundle_digest=bundle_digest(out / BUNDLE), organiser_key=key.hex(),
            slots=slots_of(config, out=out), asked_at=self.asked_at,
        )  # fmt: skip
        try:
            self._supervisor = create_supervisor(Supervisor, desired)
        except CalmRayError:
            if not self.find():
                raise
            self.follow(config, out=out)

    def status(self) -> SupervisorStatus:
        """What it knows; waits while it is being started again. CalmRayError if it is gone."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                answer = ray.get(self._supervisor.status.remote(), timeout=CALL_SECONDS)
                return SupervisorStatus.model_validate_json(answer)
            except ValidationError:
                raise ConfigError(
                    f"run {self._run_id!r} is up, with another version of calm-ray; use that one, or end the run first "
                    "with --down"
                ) from None
            except ray.exceptions.RayError as exc:
                if not self.find() or time.monotonic() > deadline:
                    self.is_gone = True
                    raise CalmRayError(
                        "the run's supervisor is gone: somebody has ended it, or its cluster; the same command again "
                        "goes on"
                    ) from exc
            time.sleep(1.0)

    def follow(self, config: OrganiserConfig, *, out: Path) -> None:
        """Ask the supervisor that lives for what has given up. ConfigError with the difference, unless it does what
        `config` asks for."""
        if told := difference(self.status().desired, config, out=out):
            raise ConfigError(f"run {self._run_id!r} is up, and {told}; change it back, or end it first with --down")
        self.asked_at = time.time()
        with contextlib.suppress(ray.exceptions.RayError):  # `status` tells, if it is gone
            ray.get(self._supervisor.ask_again.remote(self.asked_at), timeout=CALL_SECONDS)

    def end(self) -> list[str]:
        """It ends, all own peers leave, and their actors; also if it is gone and only they are there. A line for each
        peer that has not said that it left."""
        try:
            return end_run(self._run_id)
        except ray.exceptions.RayError as exc:
            raise CalmRayError(f"the run's actors could not be ended: {in_a_line(exc)}") from exc


def slots_of(config: OrganiserConfig, *, out: Path) -> tuple[Slot, ...]:
    """The peers that the config asks for: auxiliary peers, monitors, trainers."""
    job, checkpoint = config.organiser.job, config.organiser.checkpoint
    writes = CheckpointSpec(
        folder=out / CHECKPOINTS, every_epochs=checkpoint.every_epochs, keep_last=checkpoint.keep_last
    )

    def slot(role: Role, index: int) -> Slot:
        name = f"{role}-{index}"
        spec = PeerSpec(
            role=role, folder=out / PEERS / name, bundle=out / BUNDLE, reach="public",
            peer=config.peer.model_copy(update={"name": ""}),
            # One writer: the lease that lets several monitors take turns is not there yet.
            checkpoints=writes if (role, index) == ("monitor", 0) else None,
            resume=out / CHECKPOINTS if role == "auxiliary" else None,
            adoption_seconds=job.adoption_seconds,
            linger_seconds=3600,  # the job says when the last checkpoint is written
        )  # fmt: skip
        return Slot(name=name, spec=spec, num_gpus=job.num_gpus_per_trainer if role == "trainer" else 0)

    counts: tuple[tuple[Role, int], ...] = (
        ("auxiliary", job.num_auxiliary), ("monitor", job.num_monitors), ("trainer", job.num_trainers),
    )  # fmt: skip
    return tuple(slot(role, index) for role, count in counts for index in range(count))


def difference(there: Desired, config: OrganiserConfig, *, out: Path) -> str:
    """What `config` wants otherwise than the supervisor that lives, or an empty string."""
    if there.config_hash != config.run.config_hash():
        before = run_of(there.out)
        told = in_words(differences(before, config.run)) if before is not None else ""
        return f"[run] has changed: {told or 'its hash is another'}"
    if there.code_hash != code_hash():
        return f"it runs other code: {there.code_hash}, yours is {code_hash()}"
    if there.out != out:
        return f"it writes to {there.out}"
    wanted = {slot.name: slot for slot in slots_of(config, out=out)}
    runs = {slot.name: slot for slot in there.slots}
    changed = [name for name in sorted(wanted | runs) if wanted.get(name) != runs.get(name)]
    return f"[peer] or [organiser] has changed: {changed[0]} is not what it was" if changed else ""


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to the Ray cluster at `address`, or, for LOCAL, to one of our own that ends with us."""
    is_local = address == LOCAL
    require_answer(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR,
            include_dashboard=False if is_local else None,
            # Peers do not yield to Ray: by default its workers, and what they start, are niced by 15 (Ray 2.60), and a
            # trainer's computing could hardly be put below its talking any more.
            _system_config={"worker_niceness": 0} if is_local else None,
        )  # fmt: skip
    except (ConnectionError, ValueError) as exc:
        raise _no_cluster(address, str(exc)) from exc
    signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
    try:
        yield
    finally:
        ray.shutdown()


def require_answer(address: str) -> None:
    """CalmRayError if nobody listens at HOST:PORT or ray://HOST:PORT. Ray itself goes on trying for minutes (2.60)."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdecimal()):
        return  # a name of Ray's, such as `auto`
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as exc:
        raise _no_cluster(address, str(exc)) from exc


def _no_cluster(address: str, why: str) -> CalmRayError:
    return CalmRayError(
        f"no Ray cluster answers at RAY_ADDRESS={address}: {why}; start it (ray up), or unset RAY_ADDRESS to run on "
        "this machine alone"
    )
