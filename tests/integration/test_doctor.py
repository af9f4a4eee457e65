"""The doctor as a volunteer runs it: real processes, a real desk, addresses that are dead in every way there is.

All commands are started together, since each loads torch; each test then waits for its own.
"""

import asyncio
import contextlib
import fcntl
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.wrappers_pb2 import StringValue
from hivemind.p2p import P2PContext

from calm_ray.bundle import MANIFEST, SIGNATURE
from calm_ray.config import PeerTable
from calm_ray.invite import Invite
from calm_ray.peers.doctor_helper import Task, run_helper
from calm_ray.signing import public_bytes
from calm_ray.swarm.clock_offset import ask_clocks
from calm_ray.swarm.desk import Desk
from tests.eventually import Child, Children
from tests.integration.runs import write_config
from tests.integration.test_desk import LISTEN, Office, closed_port, office, stranger
from tests.shards import ROOT

__all__ = ["office"]  # the fixture

# As in test_desk.py: hivemind leaves sockets and subprocess transports to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:loop is closed:ResourceWarning"),
]

STRANGER_ID = "QmQhps72kzA2DHfBJ6SAWvnXCaBW7KkMeNwt18AxgYxann"
LIMIT_SECONDS = 60.0
"""What a volunteer is promised, whatever hangs."""


@dataclass(frozen=True)
class Answer:
    """What a doctor said by --json."""

    exit_code: int
    overall: str
    summary: str
    checks: dict[str, dict[str, str]]

    def verdicts(self, *names: str) -> list[str]:
        return [self.checks[name]["verdict"] for name in names]


class Doctors:
    """Commands that run side by side, each with a home of its own."""

    def __init__(self, folder: Path, children: Children) -> None:
        self.folder, self._children = folder, children
        self._started: dict[str, tuple[Child, float]] = {}

    def start(self, name: str, *argv: str | Path, python_path: Path = ROOT, before: tuple[str, ...] = ()) -> None:
        command = [*before, sys.executable, "-W", "ignore", "-m", "calm_ray", "doctor", *map(str, argv)]
        home = self.folder / name
        env = {"PYTHONPATH": f"{python_path}:{ROOT}", "CALM_RAY_HOME": str(home), "COLUMNS": "80"}
        self._started[name] = self._children.start(command, cwd=self.folder, env=env), time.monotonic()

    def output(self, name: str) -> tuple[int, str]:
        child, started_at = self._started[name]
        exit_code = child.wait(max(0.0, started_at + LIMIT_SECONDS - time.monotonic()))
        assert "Traceback" not in child.output(), child.output()
        return exit_code, child.output()

    def answer(self, name: str) -> Answer:
        exit_code, output = self.output(name)
        said: dict[str, Any] = json.loads(output)
        checks = {check["name"]: check for check in said["checks"]}
        return Answer(exit_code, said["overall"], said["summary"], checks)


@pytest.fixture(scope="module")
def doctors(office: Office, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doctors]:
    folder = tmp_path_factory.mktemp("doctors")
    with contextlib.ExitStack() as stack:
        started = Doctors(folder, stack.enter_context(Children(folder)))
        silent, rude = (stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2))
        threading.Thread(target=_hang_up_on_everyone, args=(rude,), daemon=True).start()
        black_hole = stack.enter_context(_black_hole())
        dead = tuple(f"/ip4/127.0.0.1/tcp/{port}/p2p/{STRANGER_ID}" for port in (closed_port(), black_hole))

        genuine = office.open_desk(office.bundle("genuine"))
        started.start("well", genuine.encode())
        other = f"{office.address.split('/p2p/')[0]}/p2p/{STRANGER_ID}"
        not_libp2p = f"/ip4/127.0.0.1/tcp/{rude.getsockname()[1]}/p2p/{STRANGER_ID}"
        nameless = f"/dns4/no-such-name.invalid/tcp/4001/p2p/{STRANGER_ID}"
        mixed = office.open_desk(office.bundle("mixed"))
        mixed = replace(mixed, addresses=(*dead, other, not_libp2p, nameless, *mixed.addresses))
        started.start("mixed", mixed.encode(), "--json")
        mute = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}/p2p/{STRANGER_ID}"
        started.start("dead", replace(mixed, addresses=(*dead, mute)).encode(), "--json")
        stranger_key = public_bytes(Ed25519PrivateKey.generate())
        started.start("forged", replace(genuine, organiser_key=stranger_key).encode(), "--json")
        started.start("no-desk", office.invite("not-served").encode(), "--json")
        started.start("late", office.open_desk(office.bundle("late"), desk_class=LateDesk).encode(), "--json")
        started.start("newer", newer_run(office).encode(), "--json")
        _start_on_a_sick_machine(started, stack)
        yield started
        silent.shutdown(socket.SHUT_RDWR)
        rude.shutdown(socket.SHUT_RDWR)


def _start_on_a_sick_machine(doctors: Doctors, stack: contextlib.ExitStack) -> None:
    folder = doctors.folder / "occupied"
    folder.mkdir()
    lock = stack.enter_context((folder / "lock").open("w"))
    lock.write("4711")
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_EX)
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    config = write_config(doctors.folder / "run.toml")
    config.write_text(config.read_text().replace("/tcp/0", f"/tcp/{server.getsockname()[1]}"))
    few_files = ("sh", "-c", 'ulimit -n 512; exec "$0" "$@"')
    doctors.start("sick", "--folder", folder, "--config", config, "--json", before=few_files)

    (doctors.folder / "damaged").mkdir()
    (doctors.folder / "damaged" / "identity.key").write_bytes(b"half a k")
    mistaken = doctors.folder / "mistaken.toml"
    mistaken.write_text('[peer]\ndevcie = "cpu"\n')
    fake = doctors.folder / "fake"
    fake.mkdir()
    (fake / "torch.py").write_text("import os\nos.kill(os.getpid(), 4)\n")
    doctors.start("broken", "--folder", "/proc/nowhere", "--config", mistaken, "--json", python_path=fake)
    doctors.start("damaged", "--folder", doctors.folder / "damaged", "--json")


class LateDesk(Desk):
    """A desk whose clock is forty seconds ahead: to the doctor, this machine is late."""

    async def rpc_time(self, request: StringValue, context: P2PContext) -> StringValue:
        return StringValue(value=f"{time.time() + 40:.3f}")


LateDesk.__name__ = Desk.__name__  # it is part of the RPC's name


def newer_run(office: Office) -> Invite:
    """A run whose organiser has a calm-ray of next year."""
    bundle = office.bundle("newer")
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    data = json.dumps({**manifest, "version": "9.9.0", "install": "pip install calm-ray==9.9.0"}).encode()
    (bundle / MANIFEST).write_bytes(data)
    (bundle / SIGNATURE).write_bytes(office.key.sign(data))
    return office.open_desk(bundle)


def _hang_up_on_everyone(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            server.accept()[0].close()


@contextlib.contextmanager
def _black_hole() -> Iterator[int]:
    """A port that answers nothing at all: its queue is full, so Linux drops who comes next."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield server.getsockname()[1]


# --- the way to a run ------------------------------------------------------------------------------------------------


def test_well_machine_is_told_that_it_is_ready_on_narrow_terminals_too(doctors: Doctors) -> None:
    exit_code, output = doctors.output("well")
    assert exit_code == 0, output
    assert "ok    bootstrap 1   127.0.0.1:" in output
    assert "serves run 'genuine'" in output
    assert "ok    reach         others can reach this machine at 127.0.0.1:" in output
    assert "ok    clock         agrees with 1 bootstrap peer within 0." in output
    assert "ok    version       you have 0.1.0, the organiser 0.1.0;" in output
    assert "ready to join, with 1 warning" in output.splitlines()[-1] or output.splitlines()[-1] == "ready to join"
    assert output.isascii()
    assert [line for line in output.splitlines() if len(line) > 80 and "/" not in line] == []


def test_each_address_gets_its_own_verdict_and_one_that_works_is_enough(doctors: Doctors) -> None:
    answer = doctors.answer("mixed")
    found = [answer.checks[f"bootstrap {number}"]["found"] for number in range(1, 7)]
    assert "refuses connections: the peer is down or listens elsewhere" in found[0]
    assert "no answer within 5 s" in found[1]
    assert "is peer ..." in found[2]
    assert "not the one that the invite names" in found[2]
    assert "is no peer that we can talk to (it hangs up)" in found[3]
    assert "no-such-name.invalid:4001: name does not resolve" in found[4]
    assert "serves run 'mixed'" in found[5]
    assert answer.verdicts(*(f"bootstrap {number}" for number in range(1, 7))) == ["warn"] * 5 + ["ok"]
    assert (answer.exit_code, answer.overall) == (0, "warn")


def test_invite_whose_addresses_are_all_dead_ends_in_time_with_what_to_do(doctors: Doctors) -> None:
    answer = doctors.answer("dead")
    assert answer.verdicts("bootstrap 1", "bootstrap 2", "bootstrap 3") == ["fail"] * 3
    assert all("ask the organiser" in answer.checks[f"bootstrap {number}"]["remedy"] for number in (1, 2, 3))
    assert "is no peer that we can talk to (no answer" in answer.checks["bootstrap 3"]["found"]
    assert "clock" not in answer.checks
    assert (answer.exit_code, answer.summary) == (1, "3 things to mend first")


def test_bundle_of_another_key_is_a_reason_not_to_join(doctors: Doctors) -> None:
    answer = doctors.answer("forged")
    check = answer.checks["bootstrap 1"]
    assert "not signed by the organiser of this invite" in check["found"]
    assert check["remedy"] == "do not join; ask for a new invite"
    assert (answer.exit_code, check["verdict"]) == (1, "fail")


def test_peer_that_does_not_serve_the_run_is_told_as_such(doctors: Doctors) -> None:
    answer = doctors.answer("no-desk")
    assert "is the right peer, but does not hand out run 'not-served'" in answer.checks["bootstrap 1"]["found"]
    assert answer.exit_code == 1


def test_clock_that_is_far_behind_is_told_with_how_to_set_it(doctors: Doctors) -> None:
    answer = doctors.answer("late")
    check = answer.checks["clock"]
    assert check["found"].startswith("40.0 s behind 1 bootstrap peer")
    assert "set it by" in check["remedy"]
    assert answer.verdicts("bootstrap 1", "version", "clock") == ["ok", "ok", "fail"]
    assert answer.exit_code == 1


def test_run_of_a_newer_version_is_told_with_the_line_that_installs_it(doctors: Doctors) -> None:
    answer = doctors.answer("newer")
    assert answer.checks["version"]["found"] == "this run needs calm-ray 9.9, you have 0.1.0"
    assert answer.checks["version"]["remedy"] == "run: pip install calm-ray==9.9.0"
    assert answer.verdicts("bootstrap 1", "version") == ["ok", "fail"]


# --- the machine -----------------------------------------------------------------------------------------------------


def test_folder_port_and_files_that_are_taken_are_told_all_at_once(doctors: Doctors) -> None:
    answer = doctors.answer("sick")
    assert "a peer already runs in this folder (process 4711)" in answer.checks["identity"]["found"]
    assert "Address already in use" in answer.checks["port"]["found"]
    assert answer.checks["port"]["remedy"].startswith("choose another port")
    assert answer.checks["open files"]["found"].startswith("a peer may open 512")
    assert answer.verdicts("identity", "port", "open files", "config") == ["fail", "fail", "fail", "ok"]
    assert (answer.exit_code, answer.summary) == (1, "3 things to mend first")


def test_torch_that_kills_its_process_is_told_and_the_other_checks_are_made(doctors: Doctors) -> None:
    answer = doctors.answer("broken")
    assert "was ended by SIGILL: this build is for a newer processor" in answer.checks["device"]["found"]
    assert "did you mean `device`?" in answer.checks["config"]["remedy"]
    assert answer.checks["folder"]["found"].startswith("/proc/nowhere: ")
    assert answer.verdicts("device", "networking", "config", "folder", "python") == ["fail"] * 4 + ["ok"]
    assert answer.exit_code == 1


def test_damaged_identity_is_told_and_left_as_it_is(doctors: Doctors) -> None:
    answer = doctors.answer("damaged")
    assert "identity.key: damaged, perhaps by a full disk" in answer.checks["identity"]["found"]
    assert "delete it" in answer.checks["identity"]["remedy"]
    assert (doctors.folder / "damaged" / "identity.key").read_bytes() == b"half a k"
    assert [path.name for path in (doctors.folder / "damaged").iterdir()] == ["identity.key"]


def test_looking_at_a_machine_leaves_nothing_in_its_home(doctors: Doctors) -> None:
    doctors.output("well")
    assert not (doctors.folder / "well").exists()


def test_helper_that_hangs_is_ended_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = tmp_path / "pids"
    (tmp_path / "torch.py").write_text(
        "import os, subprocess, time\n"
        f"grandchild = subprocess.Popen(['sleep', '60'])\nopen({str(pids)!r}, 'w').write(str(grandchild.pid))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    task = Task(peer=PeerTable(), listen=LISTEN, limit_seconds=3.0)
    doing: list[str] = []
    started = time.monotonic()
    findings = run_helper(task, on_doing=doing.append)
    assert findings.ended == "it took over 3 s"
    assert time.monotonic() - started < 6
    assert "loading torch" in doing[0]
    assert findings.device is None
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(int(pids.read_text())).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow(shard=2)
@pytest.mark.needs(root=True, programs=("unshare", "mount"))
def test_full_disk_and_read_only_tmp_are_told_with_what_to_do(children: Children, tmp_path: Path) -> None:
    """In a mount namespace, so that nothing has to be put back. hivemind's sockets are in /tmp, always."""
    script = (
        "mount -t tmpfs -o size=64k none /mnt && mount --bind /tmp /tmp && mount -o remount,ro,bind /tmp && "
        'exec "$0" "$@"'
    )
    sick = Doctors(tmp_path, children)
    sick.start("full", "--folder", "/mnt/peer", "--json", before=("unshare", "-m", "sh", "-c", script))
    answer = sick.answer("full")
    assert answer.checks["folder"]["found"] == "/mnt/peer: the disk is full"
    assert answer.checks["folder"]["remedy"] == "delete what you no longer need or choose another --folder"
    assert answer.checks["temporary"]["found"] == "/tmp: the disk is read-only"
    assert answer.verdicts("folder", "temporary", "networking", "python") == ["fail", "fail", "fail", "ok"]


# --- the clock of several desks --------------------------------------------------------------------------------------


def test_desks_that_answer_rubbish_or_nothing_give_no_clock(office: Office) -> None:
    class Rubbish(Desk):
        answers = ("", "now", "nan", "9" * 400)

        async def rpc_time(self, request: StringValue, context: P2PContext) -> StringValue:
            return StringValue(value=self.answers[int(time.monotonic() * 1e3) % len(self.answers)])

    Rubbish.__name__ = Desk.__name__
    rubbish = office.open_desk(office.bundle(), desk_class=Rubbish).run_id

    async def ask() -> list[object]:
        async with stranger(office) as p2p:
            desks = [str(office.p2p.peer_id), STRANGER_ID, "not base58 0OIl"]
            return [await ask_clocks(p2p, desks, run_id=run_id) for run_id in (rubbish, "not-served")]

    assert asyncio.run(ask()) == [None, None]


def test_genuine_desk_agrees_with_this_machine_among_dead_ones(office: Office) -> None:
    run_id = office.open_desk(office.bundle()).run_id

    async def ask() -> Any:
        async with stranger(office) as p2p:
            return await ask_clocks(p2p, [STRANGER_ID, str(office.p2p.peer_id)], run_id=run_id)

    offset = asyncio.run(ask())
    assert offset.num_desks == 1
    assert abs(offset.offset_seconds) <= offset.error_seconds + 0.001
    assert offset.error_seconds < 1
