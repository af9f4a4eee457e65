"""A process ends with its parent, even while its main thread is in one long call, and may say goodbye first."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.eventually import eventually

CHILD = """
import sys, signal
from functools import partial
from pathlib import Path
from calm_ray.parent import end_with_parent
end_with_parent(on_death=partial(Path(sys.argv[1]).write_text, "goodbye"))
signal.signal(signal.SIGTERM, lambda *_: None)
print("up", flush=True)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
signal.sigwait([signal.SIGUSR1])
"""
PARENT = f"""
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", {CHILD!r}, sys.argv[1]]).pid, flush=True)
input()
"""


def test_child_that_hears_no_signal_ends_with_its_parent(tmp_path: Path) -> None:
    goodbye = tmp_path / "goodbye"
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(goodbye)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert parent.stdout.readline() == "up\n"
        parent.kill()
    eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 10)
    assert goodbye.read_text() == "goodbye"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
def test_death_signal_ends_a_child_that_knows_nothing_of_us() -> None:
    script = (
        "import subprocess\nfrom calm_ray.parent import death_signal\n"
        "print(subprocess.Popen(['sleep', '60'], preexec_fn=death_signal()).pid, flush=True)\ninput()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 5)
