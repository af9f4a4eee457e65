"""A writer that dies anywhere leaves a whole checkpoint behind, and the next writer cleans up."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calm_ray.checkpoint.read import latest, read_checkpoint

Write = Callable[..., Path]


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it, so nothing is tidied up on the way out."""


def dies_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[str]:
    """Raise at the `step`-th fsync or rename; returns the list that collects the steps taken."""
    taken: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if len(taken) == step:
                raise Killed(name)
            taken.append(name)
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, counted(name))
    return taken


def num_steps(write: Write, epoch: int) -> int:
    with pytest.MonkeyPatch.context() as monkeypatch:
        taken = dies_at(monkeypatch, -1)
        write(epoch)
    return len(taken)


@pytest.mark.parametrize("keep_last", [1, 3])
def test_writer_killed_at_any_step_leaves_a_checkpoint_that_verifies(
    write: Write, tmp_path: Path, keep_last: int
) -> None:
    out = tmp_path / "out"
    write(1)
    total = num_steps(write, 2)
    assert total >= 10
    for step in range(total):
        before = latest(out)
        assert before is not None
        with pytest.MonkeyPatch.context() as monkeypatch:
            dies_at(monkeypatch, step)
            with pytest.raises(Killed):
                write(3 + step, keep_last=keep_last)
        after = latest(out)
        assert after is not None
        assert after in (before, out / f"epoch-{3 + step:08d}")
    last = write(1000, keep_last=1)
    assert {path.name for path in out.iterdir()} == {".lock", "latest.json", last.name}


def test_writer_killed_while_replacing_the_only_checkpoint_leaves_one_of_the_two(write: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(5, facts={"try": 0})
    num_tries = num_steps(write, 5)
    write(5, facts={"try": 0})
    seen = 0
    for step in range(num_tries):
        with pytest.MonkeyPatch.context() as monkeypatch:
            dies_at(monkeypatch, step)
            with pytest.raises(Killed):
                write(5, facts={"try": step + 1})
        found = latest(out)
        assert found is not None
        facts = read_checkpoint(found).facts["try"]
        assert facts in (seen, step + 1)
        seen = facts
    assert seen > 0
    assert read_checkpoint(write(5, facts={"try": 999})).facts == {"try": 999}
    assert {path.name for path in out.iterdir()} == {".lock", "latest.json", "epoch-00000005"}


SCRIPT = """
import os, sys, signal
from pathlib import Path
import torch
from calm_ray.checkpoint import files, write
real = files.write_tensors
def torn(path, tensors):
    real(path, tensors)
    os.truncate(path, path.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)
files.write_tensors = torn
write.write_checkpoint(
    Path(sys.argv[1]), epoch=2, run_id="demo", config_hash="ab", named_parameters={"w": torch.zeros(1000)},
    optimizer_tensors=[], optimizer_metadata=[], model_config={}, tokenizer_dir=Path(sys.argv[2]), keep_last=1,
)
"""


def test_writer_process_killed_in_the_middle_of_a_file_leaves_the_one_before(
    write: Write, tmp_path: Path, tokenizer_dir: Path
) -> None:
    out = tmp_path / "out"
    before = write(1)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(out), str(tokenizer_dir)], check=False, timeout=90)
    assert done.returncode == -signal.SIGKILL
    assert any(path.name.startswith(".tmp-") for path in out.iterdir())
    assert latest(out) == before
    assert latest(out) != write(2)
    assert not any(path.name.startswith(".tmp-") for path in out.iterdir())
