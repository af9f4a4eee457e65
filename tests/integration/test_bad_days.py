"""Days on which a machine, its clock, its disk or its line goes wrong: what is said, what is kept, how it goes on.

One swarm of two trainers, an auxiliary peer and a monitor, for all tests; each leaves it as it found it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from calm_ray.errors import CalmRayError
from calm_ray.observe.feed import FeedReader
from calm_ray.peers.handle import PeerHandle
from calm_ray.peers.status import PeerStatus
from calm_ray.peers.vitals import members
from calm_ray.report import PeerReport
from tests.eventually import eventually
from tests.integration.runs import TinySwarm, quiet_swarm
from tests.shards import ROOT

pytestmark = [pytest.mark.slow(shard=3), pytest.mark.timeout(420)]

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
CLOCK_ERROR_SECONDS = 10
DISK_BYTES = 90 << 20
"""A peer warns below 64 MB."""
EPOCHS_IN_STEP = 2


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file whose content is added to one trainer's clock."""
    path = tmp_path_factory.mktemp("clock") / "offset"
    path.write_text("+0\n")
    return path


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory, clock: Path) -> Iterator[TinySwarm]:
    with quiet_swarm(tmp_path_factory.mktemp("bad"), run_id="bad", target_batch_size=2000) as found:
        found.start("t0", role="trainer", reach="public", wait_for="training")
        found.start("t1", role="trainer", reach="public", wait_for="training", environment={
            "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_NO_CACHE": "1", "DONT_FAKE_MONOTONIC": "1",
        })  # fmt: skip
        found.start("monitor", role="monitor", wait_for="watching")
        yield found


def report_of(swarm: TinySwarm, name: str) -> PeerReport:
    report = swarm.handles[name].status().report
    assert report is not None
    return report


def all_in_step(swarm: TinySwarm, *names: str) -> None:
    """Wait until all hold one epoch, some further than now, and have averaged together."""
    target = max(report_of(swarm, name).epoch for name in names) + EPOCHS_IN_STEP
    for name in names:
        swarm.wait_for_epoch(name, target, 120)
        swarm.wait(name, lambda status: _has_averaged(status, num_peers=len(names)), 120)


def _has_averaged(status: PeerStatus, *, num_peers: int) -> bool:
    report = status.report
    is_true = report is not None and report.last_round is not None and report.last_round.outcome == "averaged"
    return is_true and report is not None and report.last_group_size >= num_peers


def says(swarm: TinySwarm, name: str, words: str, timeout: float) -> PeerStatus:
    """Wait until `name` says `words` in its state or its warnings."""

    def does(status: PeerStatus) -> bool:
        return any(words in text for text in (*status.warnings, status.detail, status.error, status.doing))

    return swarm.wait(name, does, timeout)


def shown(swarm: TinySwarm, name: str, *options: str) -> str:
    """What `calm-ray status` prints of `name`."""
    argv = [sys.executable, "-m", "calm_ray", "status", str(swarm.folder / name), *options]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def is_well(status: PeerStatus) -> bool:
    return not status.warnings


@contextmanager
def stopped(handle: PeerHandle, *, seconds: float, until: Callable[[], object] = lambda: False) -> Iterator[None]:
    """SIGSTOP for all of a peer's processes but its watchdog."""
    (child,) = [p for p in psutil.Process(handle.pid).children() if "calm_ray.peers.child" in p.cmdline()]
    session = members(child.pid)
    for process in session:
        process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + seconds
    try:
        eventually(lambda: until() or time.monotonic() > deadline, seconds + 5, interval=0.5)
        yield
    finally:
        for process in session:
            if process.is_running():
                process.send_signal(signal.SIGCONT)


def test_trainer_that_stood_still_for_a_while_goes_on_by_itself(swarm: TinySwarm) -> None:
    all_in_step(swarm, "t0", "t1", "auxiliary")
    before = swarm.handles["t0"].status()
    with stopped(swarm.handles["t0"], seconds=15):
        pass
    all_in_step(swarm, "t0", "t1", "auxiliary")
    after = swarm.handles["t0"].status()
    assert after.restarts == before.restarts
    assert after.report is not None
    assert before.report is not None
    assert after.report.boot_id == before.report.boot_id


def test_trainer_that_stands_still_for_a_minute_is_called_stalled_and_is_back_in_step(swarm: TinySwarm) -> None:
    def is_stalled() -> bool:
        status = swarm.handles["t0"].status()
        return status.state == "stalled" and "has not said a word within" in status.detail

    with stopped(swarm.handles["t0"], seconds=60, until=is_stalled):
        assert is_stalled()
        assert "the process has not said a word within 45 s" in shown(swarm, "t0")
    swarm.wait("t0", lambda s: s.restarts.get("stalled") == 1 and s.state == "training", 90)
    all_in_step(swarm, "t0", "t1", "auxiliary")
    assert "restarts: 1 stalled" in shown(swarm, "t0")


@pytest.mark.needs(root=False, programs=("faketime",))
def test_clock_that_is_off_is_told_and_costs_no_round(swarm: TinySwarm, clock: Path) -> None:
    all_in_step(swarm, "t0", "t1", "auxiliary")
    before = swarm.handles["t1"].status()
    for offset, words in ((CLOCK_ERROR_SECONDS, "ahead of"), (-CLOCK_ERROR_SECONDS, "behind")):
        clock.write_text(f"{offset:+d}\n")
        says(swarm, "t1", f"s {words} the swarm's; set it by the network", 60)
        all_in_step(swarm, "t0", "t1", "auxiliary")
        clock.write_text("+0\n")
        swarm.wait("t1", is_well, 60)
    all_in_step(swarm, "t0", "t1", "auxiliary")
    after = swarm.handles["t1"].status()
    assert after.restarts == before.restarts
    assert after.report is not None
    assert before.report is not None
    assert after.report.rounds.alone == before.report.rounds.alone, "it never took itself for the whole swarm"


def test_identity_that_is_used_twice_is_told_and_one_gives_way(swarm: TinySwarm) -> None:
    copy = swarm.folder / "copy"
    copy.mkdir()
    shutil.copy(swarm.folder / "t0" / "identity.key", copy)
    swarm.start("copy", role="trainer", reach="public")

    def told() -> str:
        """Whichever comes first: it is not let in, or it is, and finds the other's reports under its name."""
        statuses = [swarm.handles[name].status() for name in ("t0", "copy")]
        texts = [text for status in statuses for text in (status.error, status.detail, *status.warnings)]
        return next((text for text in texts if "identity" in text), "")

    # Two processes under one libp2p identity take each other's connections: some of what they look for times out.
    words = eventually(told, 240, lambda: f"{swarm.log('copy')[-2000:]}\n{swarm.log('t0')[-2000:]}")
    assert "its identity is in use by another process" in words or "another process that uses its identity" in words
    for name in ("copy", "t0"):
        swarm.handles.pop(name).stop()
    (swarm.folder / "t0" / "restarts.json").unlink(missing_ok=True)  # if it gave way, it is parked
    swarm.start("t0", role="trainer", reach="public", wait_for="training")
    all_in_step(swarm, "t0", "t1", "auxiliary")


@pytest.mark.needs(root=True, programs=("mount",))
def test_full_disk_costs_the_monitor_nothing_but_time(swarm: TinySwarm) -> None:
    swarm.handles.pop("monitor").stop()
    folder = swarm.folder / "full"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", folder], check=True)
    try:
        swarm.start("full", role="monitor", wait_for="watching")
        first = swarm.wait("full", lambda s: s.report is not None and s.report.epoch > 0, 60).report
        assert first is not None
        with pytest.raises(OSError, match="No space left"):
            _fill(folder / "ballast")
        says(swarm, "full", "rows wait for the feed", 60)
        says(swarm, "full", "less than 64 MB free: make room", 60)
        assert "warning: " in shown(swarm, "full")
        during = report_of(swarm, "full").epoch
        swarm.wait_for_epoch("full", during + EPOCHS_IN_STEP, 120)
        (folder / "ballast").unlink()
        swarm.wait("full", is_well, 60)
        last = report_of(swarm, "full").epoch
        swarm.wait_for_epoch("full", last + EPOCHS_IN_STEP, 120)
        with FeedReader(swarm.folder / "full" / "feed.sqlite") as feed:
            epochs = [int(event.key) for event in feed.events() if event.kind == "epoch"]
        assert set(range(during, last)) <= set(epochs), "what happened meanwhile is there, each epoch once"
        assert len(epochs) == len(set(epochs))
        assert swarm.handles["full"].status().restarts == {}
    finally:
        swarm.handles.pop("full").stop()
        subprocess.run(["umount", folder], check=True)
        swarm.start("monitor", role="monitor", wait_for="watching")


def test_peer_that_may_use_too_little_memory_is_parked_with_the_reason(swarm: TinySwarm) -> None:
    small = swarm.config.peer.model_copy(update={"memory_limit_gb": 0.05})
    swarm.start("small", role="trainer", reach="public", peer=small)
    handle = swarm.handles["small"]
    status = eventually(
        lambda: handle.status() if handle.status().exit_code is not None else None, 200, swarm.log("small")[-3000:]
    )
    assert status is not None
    assert status.state == "parked"
    assert "uses more than the 0.05 GB of memory that it may" in status.error
    assert (swarm.folder / "small" / "parked.log").read_text().count("watchdog: memory: uses") >= 3
    with pytest.raises(CalmRayError, match="parked: uses"):
        PeerHandle(handle.spec).start()
    assert "parked: uses more than the 0.05 GB of memory" in shown(swarm, "small")
    (told,) = json.loads(shown(swarm, "small", "--json")).values()
    assert (told["state"], told["exit_code"], told["restarts"]) == ("parked", 1, {"memory": 2})
    swarm.handles.pop("small").stop()


ORDERED = """
import re, sys, threading, time
from pathlib import Path

def obey():
    folder = Path(__file__).parent
    while True:
        time.sleep(0.5)  # sleep: until a test puts a file there
        if (folder / "grow").exists():
            (folder / "grow").unlink()
            sys.ballast = b"x" * 1_600_000_000
        if (folder / "hang").exists():
            (folder / "hang").unlink()
            re.match("(a+)+$", "a" * 60 + "b")  # for centuries, and the interpreter's lock is held all the while

if "calm_ray.peers.child" in sys.orig_argv:
    threading.Thread(target=obey, daemon=True).start()
"""


@pytest.fixture(scope="module")
def orders(swarm: TinySwarm) -> Path:
    """A trainer, called `ordered`, that begins to grow or hangs when a file of that name is made here."""
    stub = swarm.folder / "stub"
    stub.mkdir()
    (stub / "sitecustomize.py").write_text(ORDERED)
    peer = swarm.config.peer.model_copy(update={"memory_limit_gb": 1.6})
    swarm.start("ordered", role="trainer", reach="public", peer=peer, wait_for="training", environment={
        "PYTHONPATH": f"{stub}:{ROOT}",
    })  # fmt: skip
    return stub


def test_peer_that_grows_too_large_is_started_anew_in_time(swarm: TinySwarm, orders: Path) -> None:
    """Before the kernel ends it, or another program: it says goodbye, and trains again."""
    all_in_step(swarm, "ordered", "t0")
    (orders / "grow").touch()
    swarm.wait("ordered", lambda s: s.restarts == {"memory": 1} and s.state == "training", 120)
    assert "watchdog: memory: uses more than the 1.6 GB of memory that it may" in swarm.log("ordered")
    all_in_step(swarm, "ordered", "t0")


def test_peer_whose_interpreter_hangs_shows_its_stacks_and_is_started_anew(swarm: TinySwarm, orders: Path) -> None:
    all_in_step(swarm, "ordered", "t0")
    (orders / "hang").touch()
    swarm.wait("ordered", lambda s: s.restarts.get("stalled") == 1 and s.state == "training", 180)
    log = swarm.log("ordered")
    stacks = log[log.index("watchdog: stalled: the process has not said a word within 45 s") :]
    assert "sitecustomize.py" in stacks, "the thread that hangs is shown"
    all_in_step(swarm, "ordered", "t0")


def test_trainer_that_is_told_to_go_amid_a_round_is_out_of_it_in_time(swarm: TinySwarm) -> None:
    handle = swarm.start("hasty", role="trainer", reach="public", wait_for="training")
    all_in_step(swarm, "hasty", "t0", "t1")
    peer_id = handle.status().peer_id
    amid = ("finding the others to average with", "averaging")
    eventually(lambda: handle.status().doing in amid, 60, lambda: handle.status().doing, interval=0.02)
    watch = time.monotonic()
    os.kill(handle.pid, signal.SIGTERM)
    eventually(lambda: handle.status().exit_code == 0, 12, lambda: handle.status().model_dump_json())
    assert time.monotonic() - watch < 10
    del swarm.handles["hasty"]

    def is_gone(status: PeerStatus) -> bool:
        return status.summary is not None and peer_id not in {peer.peer_id for peer in status.summary.peers}

    swarm.wait("monitor", is_gone, 30)
    all_in_step(swarm, "t0", "t1", "auxiliary")


def test_peers_come_back_when_every_address_of_the_invite_is_dead(swarm: TinySwarm) -> None:
    """The bootstrap peer has gone for good; those who are left know each other."""
    all_in_step(swarm, "t0", "t1", "auxiliary")
    for name in ("t0", "t1"):
        eventually(partial(_knows_somebody, swarm.folder / name), 60)
    swarm.handles.pop("auxiliary").stop()
    all_in_step(swarm, "t0", "t1")
    handle = swarm.handles["t1"]
    (child,) = [p for p in psutil.Process(handle.pid).children() if "calm_ray.peers.child" in p.cmdline()]
    child.kill()
    swarm.wait("t1", lambda s: s.restarts.get("killed", 0) >= 1 and s.state == "training" and s.report, 120)
    assert "going to peers that we knew" in swarm.log("t1")
    all_in_step(swarm, "t0", "t1")


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass


def _knows_somebody(folder: Path) -> bool:
    path = folder / "known-peers.json"
    return path.exists() and bool(json.loads(path.read_text())["addresses"])
