"""What a fork shares stays shared, in a process of its own: freezing is for good."""

import json
import subprocess
import sys

import pytest

_FORKED = """
import gc, json, os, sys
import psutil
from calm_ray.swarm.hygiene import share_memory_with_children

loaded = [[] for _ in range(400_000)]
if sys.argv[1] == "shared":
    share_memory_with_children()
reader, writer = os.pipe()
if os.fork() == 0:
    own = [psutil.Process().memory_full_info().uss]
    gc.collect()
    own.append(psutil.Process().memory_full_info().uss)
    os.write(writer, json.dumps(own).encode())
    os._exit(0)
os.wait()
print(os.read(reader, 1000).decode())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts memory as Linux does")
@pytest.mark.parametrize(("way", "copies"), [("stock", True), ("shared", False)])
def test_garbage_collection_copies_no_memory_that_a_fork_shares(way: str, copies: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FORKED, way], capture_output=True, text=True, timeout=60, check=True
    )  # fmt: skip
    before, after = json.loads(done.stdout)
    assert (after - before > 20e6) == copies
