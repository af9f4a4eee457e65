"""When a peer is started again, how soon, and when it is parked."""

from pathlib import Path
from typing import get_args

import pytest

from calm_ray.peers.budget import (
    FILE_NAME,
    HOUR_SECONDS,
    MAX_BACKOFF_SECONDS,
    MAX_EQUAL_FAILURES,
    MAX_KEPT,
    MAX_PER_HOUR,
    MAX_WHY,
    PARKED_SECONDS,
    PATIENT,
    Cause,
    Failure,
    Ledger,
    LedgerFile,
    decide,
)

NOW = 1_000_000.0


def failure(why: str = "boom", *, cause: Cause = "crashed", at: float = NOW, has_worked: bool = False) -> Failure:
    return Failure(at=at, cause=cause, why=why, has_worked=has_worked)


@pytest.mark.parametrize("cause", [cause for cause in get_args(Cause) if cause not in PATIENT and cause != "mistake"])
def test_equal_failures_in_a_row_park(cause: Cause) -> None:
    failures = [failure(cause=cause)] * MAX_EQUAL_FAILURES
    assert not decide(failures[1:], now=NOW).park
    assert decide(failures, now=NOW).park == f"boom ({MAX_EQUAL_FAILURES} times in a row)"


def test_failures_that_differ_or_come_after_work_do_not_park() -> None:
    assert not decide([failure(str(number)) for number in range(MAX_EQUAL_FAILURES)], now=NOW).park
    worked = [failure(), failure(), failure(has_worked=True)]
    assert not decide(worked, now=NOW).park
    assert not decide([*worked, failure(), failure()], now=NOW).park
    assert decide([*worked, failure(), failure(), failure()], now=NOW).park


def test_too_many_failures_within_an_hour_park_whatever_was_done_between() -> None:
    failures = [failure(str(n), at=NOW - 60 * n, has_worked=True) for n in range(MAX_PER_HOUR + 1)][::-1]
    assert decide(failures, now=NOW).park == f"{MAX_PER_HOUR + 1} failures within an hour, the last: 0"
    assert not decide(failures[1:], now=NOW).park
    assert not decide(failures, now=failures[0].at + HOUR_SECONDS).park


def test_waiting_for_others_goes_on_for_ever_and_counts_as_nothing() -> None:
    failures = [failure("nobody answers", cause="unreachable", at=NOW - n) for n in range(200)][::-1]
    assert decide(failures, now=NOW).pause_seconds == MAX_BACKOFF_SECONDS
    assert not decide([*failures, failure()], now=NOW).park


def test_mistake_parks_at_once() -> None:
    assert decide([failure("edit it", cause="mistake")], now=NOW).park == "edit it"


def test_pauses_double_and_who_had_worked_is_back_at_once() -> None:
    failures = [failure(str(number), cause="unreachable") for number in range(8)]
    pauses = [decide(failures[: number + 1], now=NOW).pause_seconds for number in range(8)]
    assert pauses == [2, 4, 8, 16, 32, 60, 60, 60]
    assert decide([*failures, failure(has_worked=True)], now=NOW).pause_seconds == 0.5


def test_clock_that_was_set_back_parks_nobody_by_itself() -> None:
    assert not decide([failure(at=NOW + 1e6)], now=NOW).park
    assert not Ledger().parked("x", now=NOW + 1e6).is_parked(now=NOW)


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_ledger_is_found_again_and_is_bounded(tmp_path: Path) -> None:
    file = LedgerFile(tmp_path)
    for number in range(3 * MAX_KEPT):
        file.keep(file.ledger.with_failure(failure("x" * 10 * MAX_WHY + str(number))).with_restart("crashed"))
    again = LedgerFile(tmp_path).ledger
    assert again == file.ledger
    assert (len(again.failures), again.restarts) == (MAX_KEPT, {"crashed": 3 * MAX_KEPT})
    assert (tmp_path / FILE_NAME).stat().st_size < 2 * MAX_KEPT * MAX_WHY


def test_failure_is_recorded_with_what_became_of_the_peer(tmp_path: Path) -> None:
    file = LedgerFile(tmp_path)
    for number in range(1, MAX_EQUAL_FAILURES):
        assert file.record(failure(), now=NOW).pause_seconds > 0
        assert LedgerFile(tmp_path).ledger.restarts == {"crashed": number}
    decision = file.record(failure(), now=NOW)
    ledger = LedgerFile(tmp_path).ledger
    assert decision.park == ledger.parked_why
    assert ledger.is_parked(now=NOW)
    assert ledger.restarts == {"crashed": MAX_EQUAL_FAILURES - 1}, "it is not started again"
    assert len(ledger.failures) == MAX_EQUAL_FAILURES


def test_ledger_remembers_for_how_long_a_peer_is_parked_and_a_person_pardons(tmp_path: Path) -> None:
    file = LedgerFile(tmp_path)
    file.keep(file.ledger.with_failure(failure()).with_restart("crashed").parked("boom", now=NOW))
    ledger = LedgerFile(tmp_path).ledger
    assert ledger.is_parked(now=NOW + PARKED_SECONDS - 1)
    assert not ledger.is_parked(now=NOW + PARKED_SECONDS)
    pardoned = ledger.pardoned()
    assert not pardoned.is_parked(now=NOW)
    assert (pardoned.failures, pardoned.restarts) == ((), {"crashed": 1})


@pytest.mark.parametrize("content", [b"", b"{", b'{"failures": 1}', b"\xff\xfe", b'{"restarts": {"no-cause": 1}}'])
def test_damaged_ledger_is_an_empty_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    assert LedgerFile(tmp_path).ledger == Ledger()


def test_disk_that_takes_nothing_costs_only_the_memory(tmp_path: Path) -> None:
    file = LedgerFile(tmp_path / "gone")
    file.keep(file.ledger.with_restart("killed"))
    assert file.ledger.restarts == {"killed": 1}
