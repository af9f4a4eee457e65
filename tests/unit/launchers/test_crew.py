"""The driver and the supervisor of its run: found, followed, another's, of another version, or on no cluster at all."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calm_ray.actors.desired import SUPERVISOR, SupervisorStatus, actor_name
from calm_ray.code import code_hash
from calm_ray.errors import CalmRayError, ConfigError
from launchers import crew as crews
from launchers.crew import Crew, connected, require_answer, slots_of
from launchers.organiser import OrganiserConfig, load_organiser
from tests.integration.runs import write_config
from tests.unit.actors.fake_ray import FakeActor, FakeRay


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(crews, "ray", fake)
    return fake


@pytest.fixture
def config(tmp_path: Path) -> OrganiserConfig:
    return load_organiser(write_config(tmp_path / "run.toml", run_id="run"))


def supervise(fake: FakeRay, config: OrganiserConfig, out: Path, **other: Any) -> FakeActor:
    desired = {
        "run_id": "run", "config_hash": config.run.config_hash(), "code_hash": code_hash(), "num_epochs": 1,
        "home": "a", "out": out, "bundle_digest": "", "organiser_key": "", "slots": slots_of(config, out=out),
        "asked_at": 1.0,
    }  # fmt: skip
    status = SupervisorStatus.model_validate({"desired": desired | other, "worker_pid": 1, "node_id": "a"})
    answers: dict[str, Callable[..., Any]] = {"status": status.model_dump_json, "ask_again": lambda asked_at: None}
    actor = fake.actors[actor_name("run", SUPERVISOR)] = FakeActor(answers=answers)
    return actor


def test_driver_that_follows_a_run_asks_for_what_has_given_up(
    fake: FakeRay, config: OrganiserConfig, tmp_path: Path
) -> None:
    actor, crew = supervise(fake, config, tmp_path), Crew("run")
    assert crew.find()
    crew.follow(config, out=tmp_path)
    assert actor.called("ask_again") == [(crew.asked_at,)]
    assert crew.asked_at > 1.0


def test_run_of_another_folder_config_or_version_is_refused_in_a_line(
    fake: FakeRay, config: OrganiserConfig, tmp_path: Path
) -> None:
    crew = Crew("run")
    actor = supervise(fake, config, tmp_path, code_hash="old")
    crew.find()
    with pytest.raises(ConfigError, match="it runs other code: old"):
        crew.follow(config, out=tmp_path)
    actor.answers["status"] = lambda: '{"strange": 1}'
    with pytest.raises(ConfigError, match=r"run 'run' is up, with another version .* --down"):
        crew.follow(config, out=tmp_path)
    assert actor.called("ask_again") == []


def test_driver_that_comes_second_follows_the_first(
    fake: FakeRay, config: OrganiserConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(_class: type, _desired: object) -> None:
        raise CalmRayError("its name is taken")

    monkeypatch.setattr(crews, "create_supervisor", create)
    crew = Crew("run")
    assert not crew.find()
    with pytest.raises(CalmRayError, match="its name is taken"):
        crew.start(config, out=tmp_path)
    actor = supervise(fake, config, tmp_path)
    crew.start(config, out=tmp_path)
    assert crew.status().desired.out == tmp_path
    assert actor.called("ask_again") == [(crew.asked_at,)]
    supervise(fake, config, tmp_path / "other")
    with pytest.raises(ConfigError, match=f"it writes to {tmp_path / 'other'}"):
        crew.start(config, out=tmp_path)


def test_supervisor_that_is_gone_is_told(fake: FakeRay, config: OrganiserConfig, tmp_path: Path) -> None:
    actor, crew = supervise(fake, config, tmp_path), Crew("run")
    crew.find()

    def die() -> str:
        raise fake.exceptions.RayActorError(error_msg="killed")

    actor.answers["status"] = die
    fake.actors.clear()
    with pytest.raises(CalmRayError, match="the run's supervisor is gone"):
        crew.status()
    assert crew.is_gone


def test_gpus_that_ray_cannot_share_out_are_refused(tmp_path: Path) -> None:
    for number, is_good in ((0.5, True), (1, True), (2, True), (1.5, False)):
        more = f"[organiser.job]\nnum_gpus_per_trainer = {number}\n"
        path = write_config(tmp_path / "run.toml", run_id="run", more=more)
        if is_good:
            assert load_organiser(path).organiser.job.num_gpus_per_trainer == number
        else:
            with pytest.raises(ConfigError, match=r"num_gpus_per_trainer.*whole"):
                load_organiser(path)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_cluster_that_is_gone_is_told_at_once(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
        require_answer(address)
    started = time.monotonic()
    told = f"no Ray cluster answers at RAY_ADDRESS={address}: .*refused; start it"
    with pytest.raises(CalmRayError, match=told), connected(address):
        pass
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("address", ["local", "auto", "127.0.0.1:x"])
def test_what_is_no_address_is_left_to_ray(address: str) -> None:
    require_answer(address)
