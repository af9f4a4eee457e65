"""The organiser's job end to end on a local Ray, with a volunteer from outside: what `make demo` does, small."""

import re
import signal
import sys
from pathlib import Path

import psutil
import pytest
from transformers import AlbertForPreTraining, AutoTokenizer

from calm_ray.checkpoint.manifest import folder_name
from calm_ray.checkpoint.verify import verify_checkpoint
from launchers.output import newest_epoch
from tests.eventually import Child, Children, eventually
from tests.integration.runs import write_config

RUN_SECONDS = 240.0
ORGANISER = """
[organiser.job]
num_trainers = 2
num_auxiliary = 1

[organiser.checkpoint]
every_epochs = 4
keep_last = 2
"""


def _job(children: Children, config: Path, out: Path, *options: str) -> Child:
    return children.start([sys.executable, "-m", "launchers.job", config, "--out", out, *options])


def _ours(out: Path) -> list[psutil.Process]:
    """Processes that belong to the run in `out`: peers name their folder on the command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(out) in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.timeout(400)
def test_job_with_a_volunteer_ends_with_a_checkpoint_that_loads_and_nothing_left(
    tmp_path: Path, children: Children
) -> None:
    # Some seventy seconds of work for two trainers: a volunteer who begins now must not come too late.
    config = write_config(
        tmp_path / "run.toml", run_id="job", num_epochs=40, target_batch_size=6000, micro_batch_size=24, more=ORGANISER
    )
    out = tmp_path / "out"
    job = _job(children, config, out)
    job.says("calm-ray join calm1-", timeout=90)
    invite = (out / "invite.txt").read_text().strip()
    volunteer = children.start(
        [sys.executable, "-m", "calm_ray", "join", invite, "--folder", tmp_path / "volunteer", "--name", "Amina"]
    )
    job.says("trainers=3", timeout=RUN_SECONDS)
    volunteer.says("the first gradient from here is in the model", timeout=RUN_SECONDS)

    assert job.wait(RUN_SECONDS) == 0, job.tail()
    assert "MLM has gone" in job.output()
    checkpoint = out / "checkpoints" / "epoch-00000040"
    assert AlbertForPreTraining.from_pretrained(checkpoint).num_parameters() > 0
    assert len(AutoTokenizer.from_pretrained(checkpoint)) > 200

    assert volunteer.wait(60) == 0, volunteer.tail()
    assert "Thank you!" in volunteer.output()
    assert "Traceback" not in job.output() + volunteer.output()
    eventually(lambda: not _ours(out), 15, lambda: f"left: {_ours(out)}")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_job_that_ends_early_takes_its_peers_with_it(tmp_path: Path, children: Children, number: int) -> None:
    config = write_config(tmp_path / "run.toml", run_id="ended", more=ORGANISER)
    out = tmp_path / "out"
    job = _job(children, config, out)
    job.says("calm-ray join calm1-", timeout=90)
    eventually(lambda: len(_ours(out)) > 8, 60, lambda: f"peers: {_ours(out)}")
    job.process.send_signal(number)
    job.wait(40)
    eventually(lambda: not _ours(out), 30, lambda: f"left: {_ours(out)}")
    assert "Traceback" not in job.output()


@pytest.mark.slow(shard=2)
@pytest.mark.timeout(600)
def test_job_that_was_killed_goes_on_only_when_told_and_ends_its_run(tmp_path: Path, children: Children) -> None:
    config = write_config(tmp_path / "run.toml", run_id="resumed", num_epochs=40, more=ORGANISER)
    out = tmp_path / "out"
    job = _job(children, config, out)
    eventually(lambda: newest_epoch(out) >= 4, RUN_SECONDS, job.tail)
    job.signal_group(signal.SIGKILL)
    assert job.wait(40) == -signal.SIGKILL

    untold = _job(children, config, out)
    assert untold.wait(60) == 2
    assert "go on from there with --resume, or begin anew with --fresh" in untold.tail(1)

    resumed = _job(children, config, out, "--resume")  # at once: peers of the first job may still be leaving
    assert resumed.wait(RUN_SECONDS) == 0, resumed.tail()
    told = re.search(r"Going on from the checkpoint of epoch (\d+)", resumed.output())
    assert told and int(told[1]) >= 4
    assert f"checkpoint={out / 'checkpoints' / folder_name(int(told[1]))}" in (
        out / "peers" / "auxiliary-0" / "peer.log"
    ).read_text(errors="replace")
    verify_checkpoint(out / "checkpoints" / folder_name(40))

    finished = _job(children, config, out, "--resume")
    assert finished.wait(60) == 2
    assert "epoch 40 is the run's last; raise num_epochs" in finished.tail(1)
    eventually(lambda: not _ours(out), 15, lambda: f"left: {_ours(out)}")
