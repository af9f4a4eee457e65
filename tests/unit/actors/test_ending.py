"""`--down`: in order, and nobody is said to have left who has not said so."""

from typing import Any

import pytest
import ray

from calm_ray.actors import ending
from calm_ray.actors.desired import SUPERVISOR, actor_name
from calm_ray.actors.ending import end_run
from calm_ray.actors.keeper import LEAVE_SECONDS
from calm_ray.errors import CalmRayError
from tests.unit.actors.fake_ray import FakeActor, FakeRay

RUN = "run"


class Clock:
    """The time module; whoever sleeps or waits makes it go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 0.5
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(ending, "ray", fake)
    monkeypatch.setattr(ending, "time", Clock())
    monkeypatch.setattr(ending, "named_actors", fake.named_actors)
    return fake


def put(fake: FakeRay, name: str, **answers: Any) -> FakeActor:
    actor = fake.actors[actor_name(RUN, name)] = FakeActor(answers=answers)
    return actor


def test_all_leave_trainers_first_and_the_supervisor_before_everybody(fake: FakeRay) -> None:
    order: list[str] = []

    def leave(name: str) -> Any:
        return lambda: order.append(name)

    for name in ("auxiliary-0", "monitor-0", "trainer-0"):
        put(fake, name, stop=leave(name))
    put(fake, SUPERVISOR, halt=leave(SUPERVISOR))
    other = fake.actors["another/trainer-0"] = FakeActor()
    assert end_run(RUN) == []
    assert order == [SUPERVISOR, "trainer-0", "monitor-0", "auxiliary-0"]
    assert list(fake.actors.values()) == [other]
    assert end_run(RUN) == [], "a second time, there is nothing to do"


def test_peer_that_does_not_say_that_it_left_is_named(fake: FakeRay) -> None:
    def fail() -> int:
        raise CalmRayError("its start has not ended")

    put(fake, "auxiliary-0")  # never answers: it hangs, or has no place
    put(fake, "trainer-0", stop=lambda: 0)
    put(fake, "trainer-1", stop=crossing(fail))
    left = end_run(RUN)
    assert left[0] == "trainer-1 has not said that it left: its start has not ended"
    assert left[1].startswith("auxiliary-0 has not said that it left: no answer in ")
    assert len(left) == 2
    assert ending.STOP_SECONDS > LEAVE_SECONDS, "a peer may need that long, and is not killed before"
    assert not fake.actors


def test_actor_that_ray_makes_again_is_asked_again(fake: FakeRay) -> None:
    answers = [fake.exceptions.RayActorError(error_msg="it is being restarted"), None]

    def stop() -> int:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return 0

    actor = put(fake, "auxiliary-0", stop=stop)
    assert end_run(RUN) == []
    assert len(actor.called("stop")) == 2


def test_actor_that_somebody_else_ends_at_the_same_time_is_no_trouble(fake: FakeRay) -> None:
    def stop() -> int:
        fake.actors.clear()
        raise fake.exceptions.RayActorError(error_msg="it was killed")

    put(fake, "auxiliary-0", stop=stop)
    assert end_run(RUN) == []


def crossing(fails: Any) -> Any:
    """As an exception of an actor's method crosses to whoever called it."""

    def call() -> int:
        try:
            return int(fails())
        except CalmRayError as exc:
            raise ray.exceptions.RayTaskError("stop", "Traceback (most recent call last):\n  ...", exc) from None

    return call
