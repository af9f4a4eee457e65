"""The organiser's job end to end on a local Ray, with a volunteer from outside: what `make demo` does, small."""

import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from transformers import AlbertForPreTraining, AutoTokenizer

from calm_ray.checkpoint.manifest import folder_name
from calm_ray.checkpoint.verify import verify_checkpoint
from launchers.output import live_peers, newest_epoch
from tests.eventually import Child, Children, eventually
from tests.integration.runs import write_config

RUN_SECONDS = 240.0
ORGANISER = """
[organiser.job]
num_trainers = 2
num_auxiliary = 1
adoption_seconds = 120

[organiser.checkpoint]
every_epochs = 4
keep_last = 2
"""


def _job(children: Children, config: Path, out: Path, *options: str) -> Child:
    return children.start([sys.executable, "-m", "launchers.job", config, "--out", out, *options])


def ours(out: Path) -> list[psutil.Process]:
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
    eventually(lambda: not ours(out), 15, lambda: f"left: {ours(out)}")


def pids(out: Path) -> dict[str, int]:
    """Name -> process of the watchdog that runs in its folder."""
    return {name: status.pid for name, status in live_peers(out).items()}


def epoch_of(out: Path) -> int:
    """Of the state that the first auxiliary peer holds."""
    status = live_peers(out).get("auxiliary-0")
    return status.report.epoch if status is not None and status.report is not None else -1


@pytest.mark.timeout(240)
def test_job_that_is_told_to_end_takes_its_peers_with_it(tmp_path: Path, children: Children) -> None:
    config = write_config(tmp_path / "run.toml", run_id="ended", more=ORGANISER)
    out = tmp_path / "out"
    job = _job(children, config, out)
    job.says("calm-ray join calm1-", timeout=90)
    eventually(lambda: len(pids(out)) == 4, 60, job.tail)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(60) == 130
    eventually(lambda: not ours(out), 10, lambda: f"left: {ours(out)}")
    assert "Traceback" not in job.output()


@pytest.mark.slow(shard=2)
@pytest.mark.timeout(400)
def test_job_that_was_killed_is_adopted_by_the_same_command(tmp_path: Path, children: Children) -> None:
    config = write_config(tmp_path / "run.toml", run_id="adopted", target_batch_size=4000, more=ORGANISER)
    out = tmp_path / "out"
    job = _job(children, config, out)
    job.says("trainers=2", timeout=120)
    eventually(lambda: epoch_of(out) >= 3, 90, job.tail)
    epoch, before, bundle = epoch_of(out), pids(out), _bytes_of(out / "bundle")
    invite = (out / "invite.txt").read_text()
    job.process.kill()
    killed_at = time.monotonic()
    eventually(lambda: not [name for name in pids(out) if name.startswith("trainer")], 10, lambda: f"{pids(out)}")
    trainers = [before[name] for name in before if name.startswith("trainer")]
    eventually(lambda: not any(psutil.pid_exists(pid) for pid in trainers), 2)
    print(f"trainers gone after {time.monotonic() - killed_at:.1f} s")
    assert pids(out) == {name: pid for name, pid in before.items() if not name.startswith("trainer")}

    text = config.read_text()
    config.write_text(text.replace("learning_rate = 1e-2", "learning_rate = 2e-2"))
    refused = _job(children, config, out)
    assert refused.wait(60) == 2
    assert "optimizer.learning_rate was 0.01, is 0.02" in refused.tail(1)
    config.write_text(text)

    again = _job(children, config, out)
    again.says("Adopting what an earlier job has left running: auxiliary-0", timeout=60)
    again.says("trainers=2", timeout=120)
    now = pids(out)
    assert [now[name] for name in ("auxiliary-0", "monitor-0")] == [
        before[name] for name in ("auxiliary-0", "monitor-0")
    ]
    assert epoch_of(out) >= epoch - 1
    assert (_bytes_of(out / "bundle"), (out / "invite.txt").read_text()) == (bundle, invite)
    again.process.send_signal(signal.SIGINT)
    assert again.wait(60) == 130
    eventually(lambda: not ours(out), 10, lambda: f"left: {ours(out)}")


@pytest.mark.slow(shard=2)
@pytest.mark.timeout(600)
def test_job_whose_peers_were_all_killed_goes_on_from_its_checkpoint_and_ends_its_run(
    tmp_path: Path, children: Children
) -> None:
    config = write_config(tmp_path / "run.toml", run_id="resumed", num_epochs=40, more=ORGANISER)
    out = tmp_path / "out"
    job = _job(children, config, out)
    eventually(lambda: newest_epoch(out) >= 4, RUN_SECONDS, job.tail)
    job.signal_group(signal.SIGKILL)
    assert job.wait(40) == -signal.SIGKILL
    for process in ours(out):
        process.kill()
    eventually(lambda: not ours(out), 15, lambda: f"left: {ours(out)}")
    bundle = _bytes_of(out / "bundle")

    resumed = _job(children, config, out)
    assert resumed.wait(RUN_SECONDS) == 0, resumed.tail()
    told = re.search(r"Going on from the checkpoint of epoch (\d+)", resumed.output())
    assert told and int(told[1]) >= 4
    assert _bytes_of(out / "bundle") == bundle
    assert f"checkpoint={out / 'checkpoints' / folder_name(int(told[1]))}" in (
        out / "peers" / "auxiliary-0" / "peer.log"
    ).read_text(errors="replace")
    verify_checkpoint(out / "checkpoints" / folder_name(40))

    for options in ((), ("--resume",)):
        finished = _job(children, config, out, *options)
        assert finished.wait(60) == 2
        assert "epoch 40 is the run's last: finished; --fresh begins anew, raise num_epochs" in finished.tail(1)
    eventually(lambda: not ours(out), 15, lambda: f"left: {ours(out)}")


def _bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
