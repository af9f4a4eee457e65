"""The Ray job: the organiser's composition root.

    python -m launchers.job runs/demo.toml             bring up the run's own peers and follow them to the last epoch;
                                                       the same again adopts what lives, or goes on from a checkpoint
    python -m launchers.job runs/demo.toml --down      end them
    python -m launchers.job config runs/demo.toml      check all three tables and print them

On a laptop it starts a Ray of its own, which ends with it. With RAY_ADDRESS, as under `ray job submit`, it uses that
cluster, and the run's supervisor there goes on when this process dies.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from calm_ray.checkpoint.manifest import folders, read_manifest
from calm_ray.cli.invite import install_line
from calm_ray.code import code_hash
from calm_ray.errors import CalmRayError, ConfigError
from calm_ray.peers.budget import write_atomically
from calm_ray.peers.endings import ending_of
from launchers.begin import Found, Start, choose
from launchers.organiser import OrganiserConfig, load_organiser
from launchers.output import BUNDLE, CHECKPOINTS, disk_trouble, end_peers, lock_output, newest_epoch, set_aside, survey
from launchers.voice import spoken

if TYPE_CHECKING:
    from launchers.crew import Crew

BEGIN_FILE = "begin.json"
"""How good the first checkpoint was; an adopted run is compared with it."""
STOPPING = (signal.SIGTERM, signal.SIGHUP)
"""Like Ctrl-C. SIGHUP: the terminal was closed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; the process's exit status."""
    with spoken():
        return _main(list(sys.argv[1:] if argv is None else argv))


def _main(arguments: Sequence[str]) -> int:
    try:
        if arguments[:1] == ["config"]:
            return _print_config(arguments[1:])
        return _run_job(arguments)
    except CalmRayError as exc:
        print(f"job: {exc}", file=sys.stderr)
        return exc.exit_code
    except BrokenPipeError:  # `| head` has seen enough
        return 141
    except OSError as exc:
        error = disk_trouble(exc)
        print(f"job: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("job: interrupted", file=sys.stderr)
        return 130


def _print_config(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="launchers.job config")
    parser.add_argument("file", type=Path)
    config = load_organiser(parser.parse_args(argv).file)
    print(config.model_dump_json(indent=2), flush=True)
    return 0


def _run_job(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="launchers.job", description="Bring up a run's own peers and follow them; again: adopt them, or go on."
    )
    parser.add_argument("config", type=Path, help="a run's TOML file, such as runs/demo.toml")
    parser.add_argument("--out", type=Path, help="output folder (default: out/RUN_ID)")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="fail if there is nothing to go on from")
    begin.add_argument("--fresh", action="store_true", help="begin anew, and move what is there to OUT.previous")
    begin.add_argument("--down", action="store_true", help="end the run's own peers, and leave nothing running")
    args = parser.parse_args(argv)
    config = load_organiser(args.config)
    out = (args.out or Path("out") / config.run.run_id).resolve()
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup: it outlives its terminal
            signal.signal(number, _as_interrupt)
    if args.down:
        return _down(config.run.run_id, out)
    start: Start = "resume" if args.resume else "fresh" if args.fresh else "go-on"
    _say_hello(config, out)
    with lock_output(out):
        return _train_and_judge(config, args.config, out, start=start)


def _say_hello(config: OrganiserConfig, out: Path) -> None:
    job, run = config.organiser.job, config.run
    print(f"Run {run.run_id!r}: {run.num_epochs} epochs of {run.target_batch_size} samples.")
    print(
        f"Own peers: {job.num_auxiliary} auxiliary, {job.num_monitors} monitor, {job.num_trainers} trainer. "
        f"Everything goes to {_short(out)}",
        flush=True,
    )


def _down(run_id: str, out: Path) -> int:
    """End what lives of this run: on its cluster, and on this machine by the control sockets in `out`."""
    silent: list[str] = []
    is_heard = True
    with contextlib.ExitStack() as stack:
        if address := os.environ.get("RAY_ADDRESS"):
            from launchers.crew import Crew, connected

            try:
                with connected(address):
                    silent = Crew(run_id).end()
            except CalmRayError as exc:
                is_heard = False
                print(f"{exc}\nEnding what is on this machine.", flush=True)
        else:
            stack.enter_context(lock_output(out))  # a job that holds it has a Ray of its own, and ends by Ctrl-C
        left = end_peers(out)
    _tell(silent, left)
    if is_heard and not silent and not left:
        print("Nothing is left.", flush=True)
        return 0
    if not left:
        print(
            "Nothing is left on this machine. On others of the cluster, trainers leave once it is gone, and all the "
            "rest after [organiser.job] adoption_seconds.", flush=True,
        )  # fmt: skip
    return 1


def _tell(silent: Sequence[str], left: Sequence[str]) -> None:
    """Of peers that do not leave: what the cluster says, and what is on this machine."""
    for line in (*silent, *(f"Still there: {line}" for line in left)):
        print(line, flush=True)


def _train_and_judge(config: OrganiserConfig, config_path: Path, out: Path, *, start: Start) -> int:
    from launchers.crew import LOCAL, Crew, connected
    from launchers.verdict import evaluate, print_verdict
    from launchers.watch import watch

    address = os.environ.get("RAY_ADDRESS")
    crew = Crew(config.run.run_id)
    with contextlib.ExitStack() as stack:
        if address:
            stack.enter_context(connected(address))
            if start == "fresh" and (left := crew.end()):
                raise CalmRayError(f"{left[0]}; end it first")
        if address and crew.find():
            crew.follow(config, out=out)
            print("The run is up: following it.", flush=True)
            begin = None
        else:
            begin = _begin(config, config_path, out, start=start)
        before = _first_evaluation(out, begin=begin)
        if not address:
            stack.enter_context(connected(LOCAL))
        is_done = False
        try:
            if not crew.find():
                crew.start(config, out=out)
            checkpoint = watch(crew, config=config)
            is_done = True
        finally:
            if is_done or not address:
                _end(crew, out)
            elif not crew.is_gone:
                print("The swarm trains on; run the same command to follow it again; --down ends it.", flush=True)
    print_verdict(before=before, after=evaluate(checkpoint, out / BUNDLE), checkpoint=checkpoint)
    return 0


def _begin(config: OrganiserConfig, config_path: Path, out: Path, *, start: Start) -> Path | None:
    """Make `out` what the peers start from; the checkpoint to begin with, or None if peers that live are adopted."""
    if start == "fresh" and (left := end_peers(out)):
        raise ConfigError(f"{left[0]}: a peer of an earlier job does not leave; end it first")
    found = survey(out) if start != "fresh" else Found()
    try:
        way = choose(found, run=config.run, code_hash=code_hash(), start=start)
    except ConfigError as exc:
        raise ConfigError(f"{out}: {exc}") from None
    if way == "adopt":
        who = ", ".join(f"{name} (process {status.pid})" for name, status in found.live.items())
        print(f"Adopting what an earlier job has left running: {who}.", flush=True)
        return None
    if way == "new" and (moved_to := set_aside(out)) is not None:
        print(f"What was there is now in {_short(moved_to)}; the next --fresh deletes it.", flush=True)
    return _prepare(config_path, out, should_resume=way != "new")


def _prepare(config_path: Path, out: Path, *, should_resume: bool) -> Path:
    """The checkpoint to begin with. In a process of its own: the driver stays free of torch."""
    try:
        install = install_line(None)
    except ConfigError:
        install = ""
    resume = ["--resume"] if should_resume else []
    done = subprocess.run(
        [sys.executable, "-m", "launchers.prepare", str(config_path), str(out), f"--install={install}", *resume],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [""])[-1]
        ending = ending_of(done.returncode, error=said, verdict=None, num_oom_kills=0)
        error = CalmRayError(said if said and ending.cause != "killed" else f"launchers.prepare: {ending.why}")
        error.exit_code = ending.exit_code
        raise error
    begin = Path(done.stdout.splitlines()[-1])
    epoch, newest = read_manifest(begin).epoch, newest_epoch(out)
    if epoch == 0:
        print("Tokenizer made, run bundle sealed, initial checkpoint written.", flush=True)
    else:
        damaged = f" That of epoch {newest} is damaged." if newest > epoch else ""
        print(f"Going on from the checkpoint of epoch {epoch}: {_short(begin)}.{damaged}", flush=True)
    return begin


def _first_evaluation(out: Path, *, begin: Path | None) -> dict[str, Any] | None:
    """How good the model was when this run's peers started. Written down, for a driver that adopts them. None if it
    cannot be told: a run that is up is followed all the same."""
    from launchers.verdict import evaluate

    path = out / BEGIN_FILE
    if begin is not None:
        before = evaluate(begin, out / BUNDLE)
        write_atomically(path, json.dumps(before))
        return before
    try:
        written: dict[str, Any] = json.loads(path.read_text())
        return written
    except (OSError, ValueError):
        found = folders(out / CHECKPOINTS)
    try:
        return evaluate(found[0][1], out / BUNDLE) if found else None
    except CalmRayError as exc:
        print(f"How good the model is now is not known: {exc}", flush=True)
        return None


def _end(crew: "Crew", out: Path) -> None:
    """All own peers leave. It takes ten seconds; being asked again does not make it faster."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *STOPPING)}
    silent: list[str] = []
    try:
        silent = crew.end()
    finally:
        _tell(silent, end_peers(out))
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _as_interrupt(_signum: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main())
