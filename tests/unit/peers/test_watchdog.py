"""What a watchdog does when its child ends or cannot be started, or nobody listens to it. The child is no process."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calm_ray.errors import CalmRayError, ConfigError
from calm_ray.peers import watchdog
from calm_ray.peers.budget import MAX_EQUAL_FAILURES, MAX_PER_HOUR, LedgerFile
from calm_ray.peers.endings import PARKED_LOG, last_status
from calm_ray.peers.judge import Pulse
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus
from calm_ray.peers.watchdog import Watchdog

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Children:
    """Each says its statuses, and ends with `exit_code`."""

    def __init__(self) -> None:
        self.exit_code, self.said = 0, [PeerStatus(role="trainer", state="training")]
        self.trouble: OSError | None = None
        self.num_started = 0

    def __call__(self, *_: object, on_line: Callable[[bytes], None], on_output: Callable[[bytes], None]) -> "Children":
        if self.trouble is not None:
            raise self.trouble
        self.num_started += 1
        on_output(b"last words\n")
        for status in self.said:
            on_line(status.model_dump_json().encode())
        return self

    has_ended = True

    def reap(self) -> int:
        return self.exit_code


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Children]:
    found = Children()
    monkeypatch.setattr(watchdog, "ChildProcess", found)
    monkeypatch.setattr(Watchdog, "_pause", lambda self, seconds: None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = [signal.getsignal(number) for number in NUMBERS]
    yield found
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


def spec_in(folder: Path, **changes: Any) -> PeerSpec:
    return PeerSpec(role="trainer", folder=folder / "peer", invite="calm1-x", **changes)


def hanging(number: int, **changes: Any) -> PeerStatus:
    """A child whose threads run, publish, and do not get anywhere."""
    pulses = {
        "reports": Pulse(count=number, allowance_seconds=300),
        "micro-batches": Pulse(count=0, allowance_seconds=1),
    }
    return PeerStatus(role="trainer", state="training", error="the device hangs", pulses=pulses, **changes)


def test_peer_that_hangs_at_each_start_is_parked_though_it_published(tmp_path: Path, children: Children) -> None:
    children.exit_code, children.said = 1, [hanging(1), hanging(20)]
    dog = Watchdog(spec_in(tmp_path))
    assert dog.run() == 1
    assert children.num_started == MAX_EQUAL_FAILURES
    assert (dog.status.state, dog.status.error) == ("parked", f"the device hangs ({MAX_EQUAL_FAILURES} times in a row)")


def test_peer_that_had_a_true_round_each_time_is_given_more_chances(tmp_path: Path, children: Children) -> None:
    children.exit_code, children.said = 1, [hanging(1), hanging(20, last_success_at=1.0)]
    assert Watchdog(spec_in(tmp_path)).run() == 1
    assert children.num_started == MAX_PER_HOUR + 1


def test_machine_that_gives_no_process_is_told_in_words(tmp_path: Path, children: Children) -> None:
    children.trouble = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    dog = Watchdog(spec_in(tmp_path))
    assert dog.run() == 1
    assert "gives no new process: Resource temporarily unavailable; close other programs" in dog.status.error


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EPIPE])
def test_terminal_that_is_gone_or_a_full_log_does_not_end_the_peer(
    tmp_path: Path, children: Children, number: int
) -> None:
    def tell(status: PeerStatus) -> None:
        raise OSError(number, os.strerror(number))

    assert Watchdog(spec_in(tmp_path), on_status=tell).run() == 0
    assert children.num_started == 1


@pytest.mark.parametrize("is_ignored", [True, False])
def test_peer_under_nohup_outlives_its_terminal(tmp_path: Path, children: Children, is_ignored: bool) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    Watchdog(spec_in(tmp_path)).run()
    assert (signal.getsignal(signal.SIGHUP) is signal.SIG_IGN) is is_ignored
    assert callable(signal.getsignal(signal.SIGTERM))


def test_start_that_was_called_off_is_remembered_with_its_reason(tmp_path: Path, children: Children) -> None:
    def preflight() -> None:
        raise ConfigError("port 4001: taken; choose another")

    with pytest.raises(ConfigError):
        Watchdog(spec_in(tmp_path), preflight=preflight).run()
    last = last_status(tmp_path / "peer")
    assert last is not None
    assert (last.state, last.error, last.exit_code) == ("left", "port 4001: taken; choose another", 2)
    assert last.pid == os.getpid()
    assert not children.num_started


def test_peer_that_was_asked_to_leave_between_two_tries_has_left_in_peace(
    tmp_path: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watchdog, "_pause", lambda self, seconds: self.leave())
    children.exit_code = 1
    assert Watchdog(spec_in(tmp_path)).run() == 0
    last = last_status(tmp_path / "peer")
    assert last is not None
    assert (last.state, last.exit_code) == ("left", 0)


def test_parked_peer_that_is_started_by_nobody_in_person_keeps_what_explains_it(
    tmp_path: Path, children: Children
) -> None:
    children.exit_code = ConfigError.exit_code
    spec = spec_in(tmp_path, has_lease=True)
    assert Watchdog(spec).run() == 2
    before = last_status(spec.folder)
    assert (spec.folder / PARKED_LOG).read_text().splitlines()[-1] == "last words"
    with pytest.raises(CalmRayError, match="parked: ended with code 2"):
        Watchdog(spec).run()
    assert (spec.folder / PARKED_LOG).exists()
    assert last_status(spec.folder) == before
    assert LedgerFile(spec.folder).ledger.restarts == {}
