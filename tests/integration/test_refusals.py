"""A peer that cannot take part, or has no place to be, says why in one line, ends with the status that says so, and
keeps what there was.

Those that load torch are started together; each test then waits for its own.
"""

import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from calm_ray.errors import CheckpointRejected, ConfigError, DiskTrouble, VersionMismatch
from calm_ray.peers.endings import PARKED_LOG, last_status
from calm_ray.signing import public_bytes
from launchers.prepare import prepare
from tests.eventually import Child, Children
from tests.integration.runs import write_config
from tests.integration.test_desk import Office, files_in, office
from tests.integration.test_doctor import newer_run
from tests.integration.test_messages import SLOW_SECONDS, Answer, invite_to
from tests.shards import ROOT

__all__ = ["office"]  # the fixture

# As in test_desk.py: hivemind leaves sockets and subprocess transports to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:loop is closed:ResourceWarning"),
    pytest.mark.timeout(240),
]


class Refused:
    """Commands that run side by side, each with a file for its stderr."""

    def __init__(self, folder: Path, children: Children) -> None:
        self.folder, self._children = folder, children
        self._started: dict[str, Child] = {}

    def start(self, name: str, *argv: str | Path, before: str = "", **env: str | Path) -> None:
        """`before` is shell code that runs first, in a mount namespace of its own."""
        command = [sys.executable, "-W", "ignore", "-m", "calm_ray", *map(str, argv)]
        script = ["sh", "-c", f'{before} exec "$@" 2>"$0"', str(self.folder / f"{name}.err"), *command]
        namespace = ["unshare", "--mount"] if before else []
        home = {"PYTHONPATH": str(ROOT), "CALM_RAY_HOME": str(self.folder / "home")}
        self._started[name] = self._children.start(
            [*namespace, *script], cwd=self.folder, env={**home, **{key: str(value) for key, value in env.items()}}
        )

    def answer(self, name: str) -> Answer:
        child = self._started[name]
        exit_code = child.wait(SLOW_SECONDS)
        return Answer(exit_code=exit_code, stdout=child.output(), stderr=(self.folder / f"{name}.err").read_text())


@pytest.fixture(scope="module")
def refused(office: Office, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Refused]:
    folder = tmp_path_factory.mktemp("refused")
    with Children(folder) as children:
        found = Refused(folder, children)
        found.start("newer", "join", newer_run(office).encode(), "--folder", folder / "newer")
        stranger = public_bytes(Ed25519PrivateKey.generate())
        forged = replace(office.open_desk(office.bundle("forged")), organiser_key=stranger)
        found.start("forged", "join", forged.encode(), "--folder", folder / "forged")
        checkpoint = prepare(write_config(folder / "run.toml"), folder / "out")
        _flip_a_bit(checkpoint / "model.safetensors")
        found.start(
            "damaged", "peer", "--role", "auxiliary", "--bundle", folder / "out" / "bundle", "--resume", checkpoint,
            "--folder", folder / "damaged", "--config", folder / "run.toml",
        )  # fmt: skip
        yield found


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def was_parked(folder: Path, *, why: str, exit_code: int) -> bool:
    """At once, for it cannot get better by waiting; and its folder says what happened."""
    last = last_status(folder)
    assert last is not None
    assert (last.state, last.exit_code, last.restarts) == ("parked", exit_code, {})
    assert why in last.error
    log = (folder / PARKED_LOG).read_text()
    assert why in log
    assert "Traceback" not in log
    return True


def test_run_of_a_newer_version_is_refused_with_the_line_that_installs_it(refused: Refused) -> None:
    exit_code = VersionMismatch.exit_code
    answer = refused.answer("newer")
    why = "this run needs calm-ray 9.9, you have 0.1.0"
    assert answer.is_one_clear_line(why, "pip install calm-ray==9.9.0", exit_code=exit_code)
    assert was_parked(refused.folder / "newer", why=why, exit_code=exit_code)


def test_bundle_of_another_key_is_refused_by_whoever_joins(refused: Refused) -> None:
    answer = refused.answer("forged")
    why = "not signed by the organiser of this invite"
    assert answer.is_one_clear_line(why, "ask for a new invite", exit_code=ConfigError.exit_code)
    assert was_parked(refused.folder / "forged", why=why, exit_code=ConfigError.exit_code)
    assert not (refused.folder / "forged" / "bundle").exists()


def test_checkpoint_with_one_bit_wrong_is_refused_and_left_as_it_is(refused: Refused) -> None:
    checkpoints = refused.folder / "out" / "checkpoints"
    before = files_in(checkpoints)
    answer = refused.answer("damaged")
    exit_code = CheckpointRejected.exit_code
    assert answer.is_one_clear_line("model.safetensors", exit_code=exit_code)
    assert was_parked(refused.folder / "damaged", why="model.safetensors", exit_code=exit_code)
    assert files_in(checkpoints) == before


# --- disks, before torch is loaded -----------------------------------------------------------------------------------

MOUNT = "mount -t tmpfs -o {} none sick &&"


@pytest.mark.needs(root=True, programs=("unshare", "mount"))
@pytest.mark.parametrize(
    ("option", "told"),
    [("ro", "the disk is read-only; mount it writable"), ("nr_inodes=1", "the disk is full; delete what")],
)
def test_disk_that_takes_nothing_is_told_at_once(tmp_path: Path, children: Children, option: str, told: str) -> None:
    (tmp_path / "sick").mkdir()
    found = Refused(tmp_path, children)
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        invite, before = invite_to(somebody.getsockname()[1]), MOUNT.format(option)
        found.start("folder", "join", invite, "--folder", "sick/peer", before=before)
        found.start("sockets", "join", invite, "--folder", "well", before=before, TMPDIR=tmp_path / "sick")
        found.start("status", "status", "well", before=before, TMPDIR=tmp_path / "sick")
        folder, sockets = found.answer("folder"), found.answer("sockets")
    exit_code = DiskTrouble.exit_code
    assert folder.is_one_clear_line("sick/peer: ", told, "choose another --folder", exit_code=exit_code)
    assert sockets.is_one_clear_line(f"{tmp_path}/sick: ", told, "set TMPDIR to another folder", exit_code=exit_code)
    assert found.answer("status").is_one_clear_line("no peer runs under well", exit_code=1)
