"""Whether a peer makes progress, from what its child says and when."""

import pytest

from calm_ray.peers.judge import GAP_SECONDS, JOINING_SECONDS, SILENT_SECONDS, Judge, Pulse

ALLOWANCE = 100.0


def pulses(**counts: int) -> dict[str, Pulse]:
    return {name: Pulse(count=count, allowance_seconds=ALLOWANCE) for name, count in counts.items()}


class Watch:
    """A judge, and a clock that ticks once a second."""

    def __init__(self) -> None:
        self.now = 50.0
        self.judge = Judge(now=self.now)

    def wait(self, seconds: float, **counts: int) -> str:
        """Look each second; the child says `counts` each time, if any. The first verdict that is not empty."""
        for _ in range(int(seconds)):
            self.now += 1
            if counts:
                self.judge.note(pulses(**counts), now=self.now)
            if why := self.judge.verdict(now=self.now):
                return why
        return ""


@pytest.fixture
def watch() -> Watch:
    return Watch()


def test_child_may_take_its_time_to_join(watch: Watch) -> None:
    assert watch.wait(JOINING_SECONDS) == ""
    watch.judge.note({}, now=watch.now)  # one more word of joining
    assert watch.wait(JOINING_SECONDS) == ""
    assert watch.wait(2) == f"the process has not said a word within {JOINING_SECONDS:.0f} s"


def test_child_that_counts_something_and_falls_silent_is_condemned(watch: Watch) -> None:
    assert watch.wait(1, steps=1) == ""
    assert watch.wait(SILENT_SECONDS) == ""
    assert watch.wait(2) == f"the process has not said a word within {SILENT_SECONDS:.0f} s"


def test_child_that_talks_and_does_nothing_is_condemned_by_name(watch: Watch) -> None:
    assert watch.wait(1, rounds=1, steps=1) == ""
    for number in range(2, 300):
        why = watch.wait(1, rounds=number, steps=1)
        if why:
            break
    assert why == f"no progress within {ALLOWANCE:.0f} s: steps"
    assert watch.now == pytest.approx(50 + 1 + ALLOWANCE + 1)


def test_any_change_is_progress(watch: Watch) -> None:
    for number in range(400):
        assert watch.wait(10, steps=number % 3) == ""  # an epoch may go back, after a state was loaded


def test_what_is_not_expected_for_a_while_begins_anew(watch: Watch) -> None:
    assert watch.wait(ALLOWANCE - 1, steps=1, rounds=1) == ""
    watch.judge.note(pulses(rounds=2), now=watch.now)  # waiting for others: no steps are expected
    assert watch.wait(1, rounds=3) == ""
    assert watch.wait(ALLOWANCE, steps=1, rounds=4) == ""


def test_time_in_which_nobody_watched_is_nobodys_fault(watch: Watch) -> None:
    watch.wait(SILENT_SECONDS - 1, steps=1)
    watch.now += 3600  # a laptop was closed
    assert watch.judge.verdict(now=watch.now) == ""
    assert watch.wait(SILENT_SECONDS) == ""
    assert watch.wait(GAP_SECONDS + 2) != ""
