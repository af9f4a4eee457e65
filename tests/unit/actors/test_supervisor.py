"""What the supervisor makes of actors that come, go, and say things: with a Ray that only pretends."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calm_ray.actors import handover, supervisor
from calm_ray.actors.desired import ActorReport, Desired, Member, Orders, Slot, SupervisorStatus, actor_name
from calm_ray.actors.plan import NodeView
from calm_ray.actors.supervisor import KILLED_SECONDS, LOG_FILE, Supervisor
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus
from calm_ray.report import Role
from tests.unit.actors.fake_ray import FakeActor, FakeRay
from tests.unit.actors.test_bundles import DIGEST, PARTS, write

RUN = "run"
ADDRESS = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


def slot(role: Role, out: Path) -> Slot:
    name = f"{role}-0"
    return Slot(name=name, spec=PeerSpec(role=role, folder=out / "peers" / name, bundle=out / "bundle"))


class Clock:
    """The time module, with a monotonic clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return time.time()


class Scene:
    """A supervisor of an auxiliary peer and a trainer; `turn()` once for each of its looks."""

    def __init__(self, out: Path, fake: FakeRay, clock: Clock) -> None:
        self.out, self.ray, self.clock, self.orders = out, fake, clock, list[Orders]()
        self.is_free = True
        desired = Desired(
            run_id=RUN, config_hash="c", code_hash="", num_epochs=9, home="home", out=out, bundle_digest=DIGEST,
            organiser_key=bytes(32).hex(), slots=(slot("auxiliary", out), slot("trainer", out)), asked_at=100.0,
        )  # fmt: skip
        self.supervisor = Supervisor(desired.model_dump_json())

    def put(self, name: str, **report: Any) -> FakeActor:
        """An actor that says so."""
        actor = self.ray.actors[actor_name(RUN, name)] = FakeActor()
        self.says(name, **report)
        return actor

    def says(self, name: str, *, state: str = "assisting", **report: Any) -> None:
        role: Any = name.partition("-")[0]
        peer = PeerStatus(
            role=role, state=state, addresses=(ADDRESS,),
            config_hash=report.pop("config_hash", ""), error="no disk" if state == "parked" else "",
        )  # fmt: skip
        report.setdefault("asked_at", 100.0)
        text = ActorReport(peer=peer, node_id="home", **report).model_dump_json()
        self.ray.actors[actor_name(RUN, name)].answers["look"] = lambda: text

    def create_peer(self, _class: type, slot: Slot, orders: Orders, *, run_id: str, node_id: str) -> FakeActor:
        if not self.is_free:
            raise self.ray.exceptions.ActorAlreadyExistsError("that name is taken")
        self.orders.append(orders)
        actor = self.ray.actors[actor_name(run_id, slot.name)] = FakeActor()
        return actor

    def turn(self, *, seconds: float = 1.0) -> SupervisorStatus:
        self.clock.now += seconds
        self.supervisor.turn()
        return SupervisorStatus.model_validate_json(self.supervisor.status())

    def member(self, name: str) -> Member:
        return next(m for m in self.turn().members if m.name == name)

    def told(self) -> list[str]:
        return [incident.text for incident in self.turn().incidents]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Scene]]:
    fake, clock = FakeRay(), Clock()
    handlers: list[logging.Handler] = []
    for module in (supervisor, handover):
        monkeypatch.setattr(module, "ray", fake)
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(supervisor, "named_actors", fake.named_actors)
    monkeypatch.setattr(supervisor, "alive_nodes", lambda *, home: [NodeView(node_id="home", is_home=True)])
    monkeypatch.setattr(supervisor, "end_with_parent", lambda: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **values: handlers.extend(values["handlers"]))
    monkeypatch.setattr(logging, "raiseExceptions", True)

    def make() -> Scene:
        scene = Scene(tmp_path, fake, clock)
        monkeypatch.setattr(supervisor, "create_peer", scene.create_peer)
        return scene

    yield make
    for handler in handlers:
        handler.close()


@pytest.fixture
def scene(make: Callable[[], Scene]) -> Scene:
    return make()


def test_actor_that_is_not_born_yet_is_not_taken_for_the_one_before(scene: Scene) -> None:
    scene.put("trainer-0", state="training")
    scene.put("auxiliary-0")
    assert scene.member("auxiliary-0").is_up
    del scene.ray.actors[actor_name(RUN, "auxiliary-0")]
    scene.turn()
    scene.turn(seconds=60)
    scene.turn()
    member = scene.member("auxiliary-0")
    assert (len(scene.orders), member.is_there, member.report, member.is_up) == (1, True, None, False)
    scene.says("auxiliary-0", worker_pid=2)
    assert scene.member("auxiliary-0").is_up


def test_first_peer_waits_until_it_is_known_whom_it_can_go_to(scene: Scene) -> None:
    scene.ray.actors[actor_name(RUN, "trainer-0")] = FakeActor()
    scene.turn()
    assert scene.orders == []
    scene.says("trainer-0", state="training")
    scene.turn()
    assert [orders.known_addresses for orders in scene.orders] == [(ADDRESS,)]


def test_same_command_again_reaches_every_actor_until_it_is_heeded(scene: Scene) -> None:
    actor = scene.put("auxiliary-0", state="parked")
    scene.turn()
    assert actor.called("ask_again") == []
    scene.supervisor.ask_again(200.0)
    scene.supervisor.ask_again(150.0)  # another driver, with another clock
    scene.turn()
    assert scene.member("auxiliary-0").has_given_up(asked_at=150.0) is False
    assert set(actor.called("ask_again")) == {(200.0,)}
    scene.says("auxiliary-0", state="parked", asked_at=200.0)
    assert scene.member("auxiliary-0").has_given_up(asked_at=200.0)
    num_asked = len(actor.called("ask_again"))
    scene.turn()
    assert len(actor.called("ask_again")) == num_asked

    del scene.ray.actors[actor_name(RUN, "auxiliary-0")]
    scene.turn()
    scene.turn(seconds=60)
    assert scene.orders[-1].asked_at == 200.0


@pytest.mark.parametrize(
    ("answer", "told"),
    [('{"strange": 1}', "is of another version"), (None, "it is of another config: other, wanted c")],
)
def test_actor_of_another_version_or_config_is_taken_down_once(scene: Scene, answer: str | None, told: str) -> None:
    actor = scene.put("trainer-0", config_hash="other")
    if answer is not None:
        actor.answers["look"] = lambda: answer
    scene.ray.lingers = True
    incidents = scene.told()
    assert len(incidents) == 1 and told in incidents[0]
    scene.turn(seconds=KILLED_SECONDS / 2)
    assert scene.ray.killed == [actor]
    assert len(scene.told()) == 1, "it is listed for a while yet, and is no new one"


def test_name_that_is_taken_or_gone_is_looked_at_again(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.is_free = False
    scene.turn()
    assert not scene.member("auxiliary-0").is_there
    monkeypatch.setattr(supervisor, "named_actors", lambda: {actor_name(RUN, "trainer-0")})  # and dies meanwhile
    assert not scene.member("trainer-0").is_there
    assert scene.told() == []


def test_bundle_that_did_not_arrive_is_sent_again(scene: Scene) -> None:
    write(scene.out / "bundle")
    actor = scene.put("auxiliary-0", state="starting", needs_bundle=True)
    actor.answers["take_bundle"] = lambda parts: "the disk is full"
    for _ in range(4):
        scene.turn()
    assert [text for text in scene.told() if "bundle" in text] == [
        "auxiliary-0: has not got the run bundle: the disk is full"
    ]
    scene.turn(seconds=handover.RETRY_SECONDS)
    scene.turn()
    assert actor.called("take_bundle") == [(PARTS,), (PARTS,)]
    actor.answers["take_bundle"] = lambda parts: ""
    scene.turn(seconds=handover.RETRY_SECONDS)
    scene.turn(seconds=handover.RETRY_SECONDS)
    scene.says("auxiliary-0")
    scene.turn()
    assert len(scene.told()) == 1


def test_bundle_is_lost_with_a_worker_and_sent_again(scene: Scene) -> None:
    write(scene.out / "bundle")
    actor = scene.put("auxiliary-0", state="starting", needs_bundle=True)

    def die(_: object) -> str:
        raise scene.ray.exceptions.RayActorError(error_msg="it is being restarted")

    actor.answers["take_bundle"] = die
    scene.turn()
    scene.turn()
    scene.turn(seconds=handover.RETRY_SECONDS)
    assert len(actor.called("take_bundle")) == 2


def test_away_from_a_dead_home_the_bundle_comes_from_a_peer_that_has_it(scene: Scene) -> None:
    first = scene.put("auxiliary-0", state="starting", needs_bundle=True)
    scene.turn()
    assert first.called("take_bundle") == []
    assert "nobody who is up has it" in scene.told()[0]
    trainer = scene.put("trainer-0", state="training")
    scene.turn(seconds=handover.RETRY_SECONDS)
    scene.turn(seconds=handover.RETRY_SECONDS)
    assert len(trainer.called("give_bundle")) == len(first.called("take_bundle")) == 1


def test_disk_that_takes_no_log_is_no_reason_not_to_supervise(make: Callable[[], Scene], tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).mkdir()  # nothing can be appended to that
    make().turn()
    assert logging.raiseExceptions is False


def test_invite_is_written_when_the_disk_has_room_again(scene: Scene) -> None:
    path = scene.out / "invite.txt"
    path.mkdir()
    scene.put("auxiliary-0")
    invite = scene.turn().invite
    assert invite
    path.rmdir()
    scene.turn()
    assert path.read_text().strip() == invite
