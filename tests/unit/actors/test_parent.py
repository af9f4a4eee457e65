import signal
import subprocess
import sys

import psutil

from tests.eventually import eventually

WORKER = """
import time
from calm_ray.parent import end_with_parent
end_with_parent()
print("up", flush=True)
time.sleep(60)
"""
RAYLET = f"""
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", {WORKER!r}]).pid, flush=True)
input()
"""


def test_worker_ends_with_a_raylet_that_nobody_has_reaped() -> None:
    raylet = subprocess.Popen([sys.executable, "-c", RAYLET], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert raylet.stdout is not None
    worker = psutil.Process(int(raylet.stdout.readline()))
    assert raylet.stdout.readline() == "up\n"
    raylet.send_signal(signal.SIGKILL)
    eventually(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, 10)
    assert psutil.Process(raylet.pid).status() == psutil.STATUS_ZOMBIE
    raylet.communicate()
