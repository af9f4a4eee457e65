"""The Ray job: the organiser's composition root.

    python -m launchers.job runs/demo.toml             bring up the run's own peers and watch them until its last epoch
    python -m launchers.job runs/demo.toml --resume    go on from the newest checkpoint
    python -m launchers.job config runs/demo.toml      check all three tables and print them

On a laptop it starts a Ray of its own; under `ray job submit` it uses the cluster it was submitted to.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from calm_ray.checkpoint.manifest import read_manifest
from calm_ray.cli.invite import INVITE_FILE, install_line
from calm_ray.errors import CalmRayError, ConfigError
from launchers.organiser import OrganiserConfig, load_organiser
from launchers.output import BUNDLE, CHECKPOINTS, Start, claim_output, newest_epoch


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; the process's exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["config"]:
            return _print_config(arguments[1:])
        return _run_job(arguments)
    except CalmRayError as exc:
        print(f"job: {exc}", file=sys.stderr)
        return exc.exit_code
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("job: interrupted; all peers have left", file=sys.stderr)
        return 130


def _print_config(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="launchers.job config")
    parser.add_argument("file", type=Path)
    config = load_organiser(parser.parse_args(argv).file)
    print(config.model_dump_json(indent=2), flush=True)
    return 0


def _run_job(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="launchers.job", description="Bring up a run's own peers and watch them.")
    parser.add_argument("config", type=Path, help="a run's TOML file, such as runs/demo.toml")
    parser.add_argument("--out", type=Path, help="output folder (default: out/RUN_ID)")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in the output folder, if there is one"
    )
    begin.add_argument("--fresh", action="store_true", help="begin anew, and move what is there to OUT.previous")
    args = parser.parse_args(argv)
    start: Start = "resume" if args.resume else "fresh" if args.fresh else "new"
    config = load_organiser(args.config)
    out = (args.out or Path("out") / config.run.run_id).resolve()
    _say_hello(config, out)
    with claim_output(out, start=start) as moved_to:
        if moved_to is not None:
            print(f"What was there is now in {_short(moved_to)}; the next --fresh deletes it.", flush=True)
        return _train_and_judge(config, out, begin=_prepare(args.config, out, start=start))


def _say_hello(config: OrganiserConfig, out: Path) -> None:
    job, run = config.organiser.job, config.run
    print(f"Run {run.run_id!r}: {run.num_epochs} epochs of {run.target_batch_size} samples.")
    print(
        f"Own peers: {job.num_auxiliary} auxiliary, {job.num_monitors} monitor, {job.num_trainers} trainer. "
        f"Everything goes to {_short(out)}",
        flush=True,
    )


def _prepare(config_path: Path, out: Path, *, start: Start) -> Path:
    """The checkpoint to begin with. In a process of its own: the driver stays free of torch."""
    try:
        install = install_line(None)
    except ConfigError:
        install = ""
    resume = ["--resume"] if start == "resume" else []
    done = subprocess.run(
        [sys.executable, "-m", "launchers.prepare", str(config_path), str(out), f"--install={install}", *resume],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["launchers.prepare failed and said nothing"]
        raise (ConfigError if done.returncode == ConfigError.exit_code else CalmRayError)(lines[-1])
    begin = Path(done.stdout.splitlines()[-1])
    epoch, newest = read_manifest(begin).epoch, newest_epoch(out)
    if epoch == 0:
        print("Tokenizer made, run bundle sealed, initial checkpoint written.", flush=True)
    else:
        damaged = f" That of epoch {newest} is damaged." if newest > epoch else ""
        print(f"Going on from the checkpoint of epoch {epoch}: {_short(begin)}.{damaged}", flush=True)
    return begin


def _train_and_judge(config: OrganiserConfig, out: Path, *, begin: Path) -> int:
    import ray

    from launchers.crew import Crew
    from launchers.verdict import evaluate, print_verdict
    from launchers.watch import watch

    before = evaluate(begin, out / BUNDLE)
    for number in (signal.SIGTERM, signal.SIGHUP):  # SIGHUP: the terminal was closed
        signal.signal(number, _as_interrupt)
    address = os.environ.get("RAY_ADDRESS")
    ray.init(
        address=address or "local", namespace="calm-ray", log_to_driver=False, logging_level=logging.ERROR,
        include_dashboard=None if address else False,
    )  # fmt: skip
    try:
        crew = Crew(config, out=out, resume=out / CHECKPOINTS if read_manifest(begin).epoch else None)
        try:
            invite = crew.start_auxiliaries().encode()
            (out / INVITE_FILE).write_text(invite + "\n")
            print("\nInvite volunteers (anyone who has this line can take part, and can change the model):\n")
            print(f"  calm-ray join {invite}\n", flush=True)
            crew.start_others()
            checkpoint = watch(crew, config=config)
        finally:
            crew.stop()
    finally:
        ray.shutdown()
    after = evaluate(checkpoint, out / BUNDLE)
    print_verdict(before=before, after=after, checkpoint=checkpoint)
    return 0


def _as_interrupt(_signum: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main())
