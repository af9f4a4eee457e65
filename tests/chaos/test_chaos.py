"""`make chaos`, short: six faults in six epochs, everything real; then everybody is there and nothing is left."""

import sys
from pathlib import Path

import pytest

from tests.eventually import Children


@pytest.mark.slow(shard=3)
@pytest.mark.timeout(600)
def test_swarm_under_faults_ends_whole_and_leaves_nothing(tmp_path: Path, children: Children) -> None:
    chaos = children.start(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.chaos", "--quick", "--folder", tmp_path / "run"]
    )
    code = chaos.wait(580)
    assert code == 0, chaos.output()[-6000:]
    assert "- yes all trainers alive and in step, the feed has every epoch once, nothing is left" in chaos.output()
    print(chaos.output()[-3000:])
