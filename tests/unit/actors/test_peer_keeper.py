"""Who starts a watchdog again, how often, and when it is left alone: with a handle that only pretends."""

import fcntl
import time
from pathlib import Path
from typing import Any

import pytest

from calm_ray.actors import keeper as keeping
from calm_ray.actors.desired import Orders, bundle_digest
from calm_ray.actors.keeper import KNOWN_FILE, Keeper, find_bundle, fit, is_taken, judge_end, remember_addresses
from calm_ray.errors import CalmRayError
from calm_ray.peers.budget import MAX_EQUAL_FAILURES, Failure, Ledger, LedgerFile, read_ledger
from calm_ray.peers.handle import KILLED_CODE
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus
from calm_ray.report import PeerReport

RUNS = PeerStatus(role="auxiliary", state="assisting", pid=1)
KILLED = RUNS.model_copy(update={"state": "left", "exit_code": KILLED_CODE})


class FakeHandle:
    """Says what it is told to; `errors` come first when it is started."""

    status_now = RUNS
    errors: list[str] = []  # noqa: RUF012  # set anew by the fixture
    num_starts = 0

    def __init__(self, spec: PeerSpec, *, environment: dict[str, str]) -> None:
        self.is_adopted, self.is_held, self.pid, self._folder = False, True, 1, spec.folder

    def start(self, *, config_hash: str) -> None:
        type(self).num_starts += 1
        self._folder.mkdir(exist_ok=True)
        if self.errors:
            raise CalmRayError(self.errors.pop(0))

    def status(self) -> PeerStatus:
        return type(self).status_now

    def stop(self) -> int:
        return 0


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> type[FakeHandle]:
    class Handle(FakeHandle):
        errors: list[str] = []  # noqa: RUF012

    monkeypatch.setattr(keeping, "PeerHandle", Handle)
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)  # no pauses
    return Handle


def orders(folder: Path, **values: Any) -> Orders:
    spec = PeerSpec(role="auxiliary", folder=folder / "peer", bundle=folder / "bundle", resume=folder / "checkpoints")
    return Orders(spec=spec, config_hash="a", num_epochs=10, **values)


def test_killed_watchdog_is_started_again(tmp_path: Path, handle: type[FakeHandle]) -> None:
    keeper = Keeper(orders(tmp_path))
    keeper.turn()
    handle.status_now = KILLED
    keeper.turn()
    assert (keeper.status.state, keeper.status.exit_code, keeper.num_revivals) == ("restarting", None, 1)
    assert "its watchdog was killed; trying again in 0 s" in keeper.status.detail
    handle.status_now = RUNS
    keeper.turn()
    assert (keeper.status, handle.num_starts) == (RUNS, 2)
    assert read_ledger(tmp_path / "peer").restarts == {"killed": 1}


def test_watchdog_that_is_killed_in_vain_is_parked_and_stays_so(tmp_path: Path, handle: type[FakeHandle]) -> None:
    keeper = Keeper(orders(tmp_path))
    handle.status_now = KILLED
    for _ in range(4 * MAX_EQUAL_FAILURES):
        keeper.turn()
    assert keeper.status.state == "parked"
    assert keeper.status.error == f"its watchdog was killed ({MAX_EQUAL_FAILURES} times in a row)"
    assert handle.num_starts == MAX_EQUAL_FAILURES

    again = Keeper(orders(tmp_path))  # another actor of the same slot
    again.turn()
    assert again.status.state == "parked"
    assert handle.num_starts == MAX_EQUAL_FAILURES

    handle.status_now = RUNS
    asked = Keeper(orders(tmp_path, asked_at=time.time() + 1))  # a person asks for it
    asked.turn()
    assert asked.status == RUNS


def test_start_that_fails_is_tried_again(tmp_path: Path, handle: type[FakeHandle]) -> None:
    handle.errors = ["no memory"]
    keeper = Keeper(orders(tmp_path))
    keeper.turn()
    assert "no memory; trying again" in keeper.status.detail
    keeper.turn()
    assert keeper.status == RUNS


@pytest.mark.parametrize(
    ("status", "cause"),
    [
        (RUNS, None),
        (KILLED, "killed"),
        (RUNS.model_copy(update={"state": "parked", "exit_code": 2}), None),
        (RUNS.model_copy(update={"state": "left", "exit_code": 0}), "crashed"),
    ],
)
def test_end_of_a_peer_is_judged(status: PeerStatus, cause: str | None) -> None:
    assert judge_end(status, num_epochs=10).cause == cause


def test_peer_that_left_after_the_last_epoch_is_done() -> None:
    report = PeerReport.model_construct(epoch=10)
    left = PeerStatus.model_construct(**{**RUNS.model_dump(), "state": "left", "exit_code": 0, "report": report})
    assert judge_end(left, num_epochs=10).cause is None
    assert judge_end(left, num_epochs=11).cause == "crashed"


def test_folder_is_taken_while_its_lock_is_held(tmp_path: Path) -> None:
    assert not is_taken(tmp_path)
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert is_taken(tmp_path)
    assert not is_taken(tmp_path)


def test_ledger_of_a_peer_that_fails_after_it_was_asked_for_is_kept(tmp_path: Path) -> None:
    file = LedgerFile(tmp_path)
    file.keep(Ledger().with_failure(Failure(at=100.0, cause="killed", why="", has_worked=False)))
    keeping.forgive(tmp_path, before=50.0)
    assert read_ledger(tmp_path).failures
    keeping.forgive(tmp_path, before=150.0)
    assert not read_ledger(tmp_path).failures


def test_spec_is_fitted_to_the_machine(tmp_path: Path) -> None:
    mine = tmp_path / "peer" / "bundle"
    mine.mkdir(parents=True)
    (mine / "manifest.json").write_text("{}")
    known = orders(tmp_path, bundle_digest=bundle_digest(mine))
    assert find_bundle(orders(tmp_path, bundle_digest="other")) is None
    assert (fit(known).bundle, fit(known).resume) == (mine, None)
    (tmp_path / "checkpoints").mkdir()
    assert fit(known).resume == tmp_path / "checkpoints"


def test_addresses_are_told_on_a_blank_machine_only(tmp_path: Path) -> None:
    path = tmp_path / "peer" / KNOWN_FILE
    remember_addresses(orders(tmp_path))
    assert not path.exists()
    remember_addresses(orders(tmp_path, known_addresses=("/one",)))
    assert path.read_text() == '{"addresses": ["/one"]}'
    remember_addresses(orders(tmp_path, known_addresses=("/two",)))
    assert path.read_text() == '{"addresses": ["/one"]}'
