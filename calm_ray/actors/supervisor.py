"""A detached Ray actor that keeps a run's own peers there. The driver may die; submitted again, it adopts this one.

One thread: observe nodes, named actors and what they say; let `plan_starts` decide; act. Calls are asked for in one
turn and read in a later one, so that an actor that hangs does not stop the others from being looked after. All that a
restart needs is in the constructor's argument, in the named actors, and in the invite on disk. Elsewhere than at home
it has no disk to look at: the run's own peers hand on the bundle then, and make a new invite.
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from logging.handlers import RotatingFileHandler
from typing import Any

import ray

from calm_ray.actors.bundles import FOLDER, holds_bundle, read_bundle
from calm_ray.actors.creation import alive_nodes, create_peer, named_actors
from calm_ray.actors.desired import (
    NAMESPACE,
    ActorReport,
    Desired,
    Incident,
    Member,
    Orders,
    Slot,
    SupervisorStatus,
    actor_name,
)
from calm_ray.actors.handover import Handover
from calm_ray.actors.incidents import incidents_of
from calm_ray.actors.invites import Invites
from calm_ray.actors.peer_actor import PeerActor
from calm_ray.actors.plan import Start, known_addresses, plan_starts, with_failure
from calm_ray.parent import end_with_parent

logger = logging.getLogger(__name__)

TURN_SECONDS = 1.0
CREATE_SECONDS = 60.0
"""From an actor's creation to its first answer. After that it is taken back, not left waiting for a place."""
LOST_NODE_SECONDS = 10.0
"""Ray itself ends the actors of a dead node; one that is still listed so long after is taken down."""
HALT_SECONDS = 30.0
KILLED_SECONDS = 5.0
"""Ray may still list an actor for so long after it was told to kill it."""
MAX_INCIDENTS = 100
MAX_FAILED_TURNS = 30
"""In a row. Ray then starts the supervisor again, with nothing in its memory that could be wrong."""
LOG_FILE, LOG_BYTES = "supervisor.log", 1 << 20


@dataclass
class Post:
    """A slot, and the actor that fills it."""

    slot: Slot
    actor: Any = None
    is_there: bool = False
    node_id: str = ""
    report: ActorReport | None = None
    """The newest of this actor."""
    told: ActorReport | None = None
    """The newest of any actor of this slot: what people know of it."""
    pending: Any = None
    """The answer that we are waiting for."""
    seen_at: float = 0.0
    """Monotonic: when this actor was made or answered last."""
    down_at: float = float("-inf")
    """Monotonic: when we took an actor of it down."""
    handover: Handover = field(default_factory=Handover)
    failures: tuple[float, ...] = ()
    """Monotonic: when an actor was lost."""

    def member(self) -> Member:
        return Member(
            name=self.slot.name, role=self.slot.role, is_there=self.is_there, node_id=self.node_id, report=self.report
        )


class Supervisor:
    """Begins by itself, for nobody else is there when Ray makes it again."""

    def __init__(self, desired_json: str) -> None:
        self._desired = Desired.model_validate_json(desired_json)
        self._log()
        end_with_parent()
        self._posts = {slot.name: Post(slot) for slot in self._desired.slots}
        self._incidents: deque[Incident] = deque(maxlen=MAX_INCIDENTS)
        self._asked_at = self._desired.asked_at
        context = ray.get_runtime_context()
        self._node_id = context.get_node_id()
        self._invites = Invites(self._desired)
        self._status = self._make_status()
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervise", daemon=True)
        # Away from home for no reason we would find no bundle: whoever made us looks, and makes us again.
        if self._node_id == self._desired.home or context.was_current_actor_reconstructed:
            self._thread.start()

    def status(self) -> str:
        """A SupervisorStatus."""
        return self._status

    def ask_again(self, asked_at: float) -> None:
        """A person has given the run's command again, and has surely mended what had parked some of its peers."""
        self._asked_at = max(self._asked_at, asked_at)

    def halt(self) -> None:
        """Do nothing more. Whoever ends the run ends the peers: see `ending.py`."""
        self._halt.set()
        if self._thread.ident is not None:
            self._thread.join(HALT_SECONDS)

    def _log(self) -> None:
        handlers: list[logging.Handler] = [logging.StreamHandler()]
        with contextlib.suppress(OSError):  # a disk that is full; Ray keeps what we print
            if self._desired.out.is_dir():
                handlers.append(RotatingFileHandler(self._desired.out / LOG_FILE, maxBytes=LOG_BYTES, backupCount=1))
        logging.raiseExceptions = False  # nor a traceback for each line that does not fit
        logging.basicConfig(
            level=logging.INFO, handlers=handlers, force=True, format="%(asctime)s %(levelname)s %(message)s"
        )
        logger.info("run=%s action=supervise pid=%d", self._desired.run_id, os.getpid())

    def _run(self) -> None:
        num_failed = 0
        while not self._halt.is_set():
            try:
                self.turn()
                num_failed = 0
            except Exception as exc:
                num_failed += 1
                is_known = isinstance(exc, ray.exceptions.RayError)  # such as a head that does not answer
                logger.error("num_failed_turns=%d why=%s", num_failed, exc, exc_info=None if is_known else exc)
                if num_failed >= MAX_FAILED_TURNS:
                    os._exit(1)
            self._halt.wait(TURN_SECONDS)

    def turn(self) -> None:
        """Look once at all that is there, and do what is due."""
        nodes = alive_nodes(home=self._desired.home)
        names = named_actors()
        alive = {node.node_id for node in nodes}
        for post in self._posts.values():
            self._observe(post, is_there=actor_name(self._desired.run_id, post.slot.name) in names, alive=alive)
        members = {name: post.member() for name, post in self._posts.items()}
        self._invites.update(members.values())
        failures = {name: post.failures for name, post in self._posts.items()}
        for start in plan_starts(
            self._desired.slots, members, nodes=nodes, has_invite=bool(self._invites.current), failures=failures,
            now=time.monotonic(),
        ):  # fmt: skip
            if not self._halt.is_set():
                self._start(start, members=members)
        self._status = self._make_status()

    # --- observing ---------------------------------------------------------------------------------------------------

    def _observe(self, post: Post, *, is_there: bool, alive: Iterable[str]) -> None:
        is_there = is_there and (post.actor is not None or time.monotonic() > post.down_at + KILLED_SECONDS)
        was_there, post.is_there = post.is_there, is_there
        is_node_alive = not post.node_id or post.node_id in alive
        if not is_there:
            if was_there:
                self._lose(post, "its Ray worker died" if is_node_alive else f"its node {post.node_id[:12]} is gone")
            return
        if post.actor is None:
            try:
                post.actor, post.seen_at = ray.get_actor(self._name(post), namespace=NAMESPACE), time.monotonic()
            except ValueError:  # it has gone since it was listed
                post.is_there = False
                return
        self._read(post)
        if not post.is_there:
            return
        waited = time.monotonic() - post.seen_at
        if post.report is None and waited > CREATE_SECONDS:
            self._take_down(post, f"no answer within {CREATE_SECONDS:.0f} s of its creation")
        elif not is_node_alive and waited > LOST_NODE_SECONDS:
            self._take_down(post, f"its node {post.node_id[:12]} is gone")

    def _read(self, post: Post) -> None:
        """Take the answer that has come, if it has, and ask again."""
        if post.pending is None:
            post.pending = post.actor.look.remote()
        ready, _ = ray.wait([post.pending], timeout=0)
        if not ready:
            return
        answer, post.pending = post.pending, None
        try:
            report = ActorReport.model_validate_json(ray.get(answer))
        except ray.exceptions.RayError:  # being started again, or dead: the list of names tells
            return
        except ValueError:
            self._take_down(post, "its actor is of another version of calm-ray")
            return
        if (runs := report.peer.config_hash) not in ("", self._desired.config_hash):
            self._take_down(post, f"it is of another config: {runs}, wanted {self._desired.config_hash}")
            return
        for text in incidents_of(post.slot.name, before=post.told, now=report, has_failed=bool(post.failures)):
            self._tell(text)
        post.report = post.told = report
        post.node_id, post.seen_at = report.node_id, time.monotonic()
        if report.asked_at < self._asked_at:
            post.actor.ask_again.remote(self._asked_at)
        if report.needs_bundle and (why := post.handover.go_on(post.actor, partial(self._parts_for, post))):
            self._tell(f"{post.slot.name}: has not got the run bundle: {why}")

    # --- acting ------------------------------------------------------------------------------------------------------

    def _start(self, start: Start, *, members: dict[str, Member]) -> None:
        post, desired = self._posts[start.name], self._desired
        is_first = post.slot.name == desired.slots[0].name
        orders = Orders(
            spec=post.slot.spec if is_first else self._invites.invited(post.slot.spec, members=members.values()),
            config_hash=desired.config_hash, num_epochs=desired.num_epochs, bundle_digest=desired.bundle_digest,
            known_addresses=known_addresses(members, besides=start.name) if is_first else (),
            asked_at=self._asked_at,
        )  # fmt: skip
        logger.info("slot=%s action=start node=%s num_failures=%d", start.name, start.node_id, len(post.failures))
        try:
            post.actor = create_peer(PeerActor, post.slot, orders, run_id=desired.run_id, node_id=start.node_id)
        except ray.exceptions.ActorAlreadyExistsError:  # as Ray has learned since we looked
            return
        post.node_id, post.is_there, post.seen_at = start.node_id, True, time.monotonic()
        post.handover = Handover()

    def _parts_for(self, post: Post) -> Any:
        """The bundle, or the promise of one of our own peers to give it; None if nobody has it."""
        folder = self._desired.out / FOLDER
        with contextlib.suppress(OSError):
            if holds_bundle(folder, digest=self._desired.bundle_digest):
                return read_bundle(folder)
        others = [p.actor for p in self._posts.values() if p.report is not None and not p.report.needs_bundle]
        return others[post.handover.num_tried % len(others)].give_bundle.remote() if others else None

    def _lose(self, post: Post, why: str) -> None:
        post.actor = post.pending = post.report = None
        post.failures = with_failure(post.failures, now=time.monotonic())
        self._tell(f"{post.slot.name}: {why}")

    def _take_down(self, post: Post, why: str) -> None:
        ray.kill(post.actor, no_restart=True)
        post.is_there, post.down_at = False, time.monotonic()
        self._lose(post, why)

    def _name(self, post: Post) -> str:
        return actor_name(self._desired.run_id, post.slot.name)

    def _tell(self, text: str) -> None:
        logger.info("incident=%s", json.dumps(text))
        self._incidents.append(Incident(at=time.time(), text=text))

    def _make_status(self) -> str:
        return SupervisorStatus(
            desired=self._desired, worker_pid=os.getpid(), node_id=self._node_id, invite=self._invites.current,
            members=tuple(post.member() for post in self._posts.values()), incidents=tuple(self._incidents),
        ).model_dump_json()  # fmt: skip
