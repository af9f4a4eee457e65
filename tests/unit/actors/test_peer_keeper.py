"""Who starts a watchdog again, how often, and when it is left alone: with a handle that only pretends."""

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from calm_ray.actors import keeper as keeping
from calm_ray.actors.desired import Orders
from calm_ray.actors.keeper import Keeper, fit, judge_end, remember_addresses
from calm_ray.errors import CalmRayError
from calm_ray.peers.budget import (
    MAX_BACKOFF_SECONDS,
    MAX_EQUAL_FAILURES,
    PARKED_SECONDS,
    Failure,
    Ledger,
    LedgerFile,
    read_ledger,
)
from calm_ray.peers.handle import KILLED_CODE
from calm_ray.peers.known import load_known
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus
from calm_ray.report import PeerReport
from tests.unit.actors.test_bundles import DIGEST, write
from tests.unit.peers.test_known import address

RUNS = PeerStatus(role="auxiliary", state="assisting", pid=1)
KILLED = RUNS.model_copy(update={"state": "left", "exit_code": KILLED_CODE})


class FakeHandle:
    """Says what it is told to; `errors` come first when it is started."""

    status_now = RUNS
    errors: list[str | Exception] = []  # noqa: RUF012  # set anew by the fixture
    num_starts = 0

    def __init__(self, spec: PeerSpec, *, environment: dict[str, str]) -> None:
        self.is_adopted, self.is_held, self.pid, self._folder = False, True, 1, spec.folder

    def start(self, *, config_hash: str) -> None:
        type(self).num_starts += 1
        self._folder.mkdir(exist_ok=True)
        if self.errors:
            error = self.errors.pop(0)
            raise CalmRayError(error) if isinstance(error, str) else error

    def status(self) -> PeerStatus:
        return type(self).status_now

    def stop(self) -> int:
        return 0


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> type[FakeHandle]:
    class Handle(FakeHandle):
        errors: list[str | Exception] = []  # noqa: RUF012

    monkeypatch.setattr(keeping, "PeerHandle", Handle)
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)  # no pauses
    return Handle


def orders(folder: Path, **values: Any) -> Orders:
    """Of the first auxiliary peer, at home."""
    (folder / "checkpoints").mkdir(exist_ok=True)
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


def test_peer_that_runs_or_is_done_is_left_alone(tmp_path: Path, handle: type[FakeHandle]) -> None:
    keeper = Keeper(orders(tmp_path))
    keeper.turn()
    done = RUNS.model_copy(update={"state": "left", "exit_code": 0, "report": PeerReport.model_construct(epoch=10)})
    for status in (RUNS, done):
        handle.status_now = status
        keeper.turn()
        keeper.turn()
        assert keeper.status == status
    assert handle.num_starts == 1
    assert judge_end(done, num_epochs=11).why == "left before the last epoch, with code 0"


def test_ledger_of_a_peer_that_fails_after_it_was_asked_for_is_kept(tmp_path: Path) -> None:
    file = LedgerFile(tmp_path)
    file.keep(Ledger().with_failure(Failure(at=100.0, cause="killed", why="", has_worked=False)))
    keeping.forgive(tmp_path, before=50.0)
    assert read_ledger(tmp_path).failures
    keeping.forgive(tmp_path, before=150.0)
    assert not read_ledger(tmp_path).failures


def test_spec_is_fitted_to_the_machine(tmp_path: Path) -> None:
    mine = write(tmp_path / "peer" / "bundle")
    known = orders(tmp_path, bundle_digest=DIGEST)
    (tmp_path / "checkpoints").rmdir()
    assert (fit(known).bundle, fit(known).resume) == (mine, None)
    (tmp_path / "checkpoints").mkdir()
    assert fit(known).resume == tmp_path / "checkpoints"


def test_addresses_of_old_orders_do_not_replace_what_the_peer_knows(tmp_path: Path) -> None:
    def known() -> tuple[str, ...]:
        return load_known(tmp_path / "peer").addresses

    remember_addresses(orders(tmp_path), is_news=True)
    assert known() == ()
    remember_addresses(orders(tmp_path, known_addresses=(address(1),)), is_news=False)
    assert known() == (address(1),), "on a blank machine, old ones are better than none"
    remember_addresses(orders(tmp_path, known_addresses=(address(2),)), is_news=False)
    assert known() == (address(1),)
    remember_addresses(orders(tmp_path, known_addresses=(address(2),)), is_news=True)
    assert known() == (address(2), address(1))


# --- parked, and tried again -----------------------------------------------------------------------------------------


class Clock:
    """The time module, set by hand."""

    def __init__(self) -> None:
        self.now = 10_000.0

    def time(self) -> float:
        return self.now

    monotonic = time

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(keeping, "time", clock)
    return clock


def park(keeper: Keeper, handle: type[FakeHandle]) -> None:
    handle.errors = ["no disk"] * MAX_EQUAL_FAILURES
    while keeper.status.state != "parked":
        keeper.turn()
    assert not handle.errors


def test_parked_peer_is_tried_again_after_half_an_hour(tmp_path: Path, handle: type[FakeHandle], clock: Clock) -> None:
    keeper = Keeper(orders(tmp_path))
    park(keeper, handle)
    clock.now += PARKED_SECONDS - 1
    keeper.turn()
    assert (keeper.status.state, handle.num_starts) == ("parked", MAX_EQUAL_FAILURES)

    other = Keeper(orders(tmp_path))  # another actor of the same slot leaves it alone for the rest of that time
    other.turn()
    assert other.status.state == "parked"
    num_revivals = keeper.num_revivals
    clock.now += 1
    for keeper_ in (keeper, other):
        keeper_.turn()
        assert (keeper_.status, keeper_.status.error) == (RUNS, "")
    assert keeper.num_revivals == num_revivals + 1

    handle.status_now = RUNS.model_copy(update={"state": "left", "exit_code": 1, "error": "no disk"})
    keeper.turn()
    assert keeper.status.state == "parked", "once more is enough: it is the same failure"


def test_peer_that_its_watchdog_parked_is_tried_again_as_well(
    tmp_path: Path, handle: type[FakeHandle], clock: Clock
) -> None:
    keeper = Keeper(orders(tmp_path))
    keeper.turn()
    handle.status_now = RUNS.model_copy(update={"state": "parked", "exit_code": 2, "error": "no key"})
    keeper.turn()
    keeper.turn()
    assert (keeper.status.state, keeper.status.error, keeper.status.exit_code) == ("parked", "no key", 2)
    handle.status_now = RUNS
    clock.now += PARKED_SECONDS
    keeper.turn()
    assert (keeper.status, handle.num_starts) == (RUNS, 2)


def test_peer_that_a_person_asks_for_again_is_tried_at_once(
    tmp_path: Path, handle: type[FakeHandle], clock: Clock
) -> None:
    keeper = Keeper(orders(tmp_path, asked_at=5.0))
    park(keeper, handle)
    keeper.ask_again(6.0)  # by a clock that is far behind ours
    assert keeper.asked_at == 5.0
    keeper.turn()
    assert (keeper.status, keeper.asked_at) == (RUNS, 6.0)
    assert not read_ledger(tmp_path / "peer").failures
    keeper.ask_again(6.0)
    handle.status_now = KILLED
    keeper.turn()
    assert read_ledger(tmp_path / "peer").failures, "what has failed since is not forgiven"


def test_peer_that_waits_to_be_started_again_starts_at_once_if_it_is_asked_for(
    tmp_path: Path, handle: type[FakeHandle], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    handle.errors = ["no memory"]
    keeper = Keeper(orders(tmp_path))
    keeper.turn()
    keeper.turn()
    assert keeper.status.state == "restarting"
    keeper.ask_again(1.0)
    keeper.turn()
    assert keeper.status == RUNS


# --- disks and bugs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_trouble_with_a_disk_is_waited_out_in_words_with_growing_pauses(
    tmp_path: Path, handle: type[FakeHandle], clock: Clock, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    monkeypatch.setattr(LedgerFile, "keep", lambda self, ledger: setattr(self, "ledger", ledger))  # nor does that
    handle.errors = [OSError(number, os.strerror(number), "x") for _ in range(8)]
    keeper = Keeper(orders(tmp_path))
    pauses = []
    while handle.errors:
        keeper.turn()
        assert keeper.status.state == "restarting"
        assert "choose another" in keeper.status.detail and "Errno" not in keeper.status.detail
        started, num_starts = clock.now, handle.num_starts
        while handle.num_starts == num_starts:
            clock.now += 1
            keeper.turn()
        pauses.append(clock.now - started)
    assert pauses == [2, 4, 8, 16, 32, *[MAX_BACKOFF_SECONDS] * 2]
    clock.now += MAX_BACKOFF_SECONDS
    keeper.turn()
    assert keeper.status == RUNS


def test_file_in_the_folders_place_is_told_and_no_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "peer").write_text("")
    keeper = Keeper(orders(tmp_path))
    for _ in range(3):
        keeper.turn()
    assert keeper.status.state == "parked"
    assert "File exists" in keeper.status.error and "choose another" in keeper.status.error
    assert not [record for record in caplog.records if record.exc_info]


def test_bug_is_told_counted_and_given_up_after_some_times(tmp_path: Path, handle: type[FakeHandle]) -> None:
    handle.errors = [KeyError("what")] * MAX_EQUAL_FAILURES
    keeper = Keeper(orders(tmp_path))
    keeper.turn()
    assert "KeyError: 'what' (this is a bug" in keeper.status.detail
    for _ in range(3 * MAX_EQUAL_FAILURES):
        keeper.turn()
    assert (keeper.status.state, handle.num_starts) == ("parked", MAX_EQUAL_FAILURES)


# --- the first auxiliary peer, away from home ------------------------------------------------------------------------


def test_run_is_not_begun_anew_on_a_machine_that_has_nothing_of_it(tmp_path: Path, handle: type[FakeHandle]) -> None:
    keeper = Keeper(orders(tmp_path))
    (tmp_path / "checkpoints").rmdir()
    keeper.turn()
    assert "this machine has no checkpoint of the run, and knows nobody" in keeper.status.detail
    assert handle.num_starts == 0
    for _ in range(9):
        keeper.turn()
    assert keeper.status.state == "restarting", "it is not given up: the disk may be mounted again"
    (tmp_path / "checkpoints").mkdir()
    keeper.turn()
    assert keeper.status == RUNS


def test_peer_that_knows_somebody_needs_no_checkpoint(tmp_path: Path, handle: type[FakeHandle]) -> None:
    keeper = Keeper(orders(tmp_path, known_addresses=(address(1),)))
    (tmp_path / "checkpoints").rmdir()
    keeper.turn()
    assert keeper.status == RUNS


# --- the end ---------------------------------------------------------------------------------------------------------


def test_stop_ends_whoever_runs_in_the_folder(
    tmp_path: Path, handle: type[FakeHandle], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    stays = [True]

    def ask(folder: Path, op: str = "status") -> PeerStatus:
        asked.append(op)
        return RUNS

    monkeypatch.setattr(keeping, "ask", ask)
    monkeypatch.setattr(keeping, "holder", lambda folder: "7" if stays[0] else "")
    monkeypatch.setattr(keeping, "STOP_SECONDS", 0.0)
    with pytest.raises(CalmRayError, match="process 7 does not leave"):
        Keeper(orders(tmp_path)).stop()
    stays[0] = False
    assert Keeper(orders(tmp_path)).stop() == 0
    assert asked == ["stop", "stop"]


def test_start_that_does_not_end_is_no_goodbye(
    tmp_path: Path, handle: type[FakeHandle], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, release = threading.Event(), threading.Event()

    def start(_: FakeHandle, *, config_hash: str) -> None:
        begun.set()
        release.wait(10)

    monkeypatch.setattr(handle, "start", start)
    monkeypatch.setattr(keeping, "START_LIMIT_SECONDS", 0.05)
    keeper = Keeper(orders(tmp_path))
    keeper.start()
    assert begun.wait(10)
    try:
        with pytest.raises(CalmRayError, match="a start that was under way has not ended"):
            keeper.stop()
    finally:
        release.set()
