"""`calm-ray`: parse, import what the command needs and nothing else, run it.

`--help` must answer at once on a notebook's slow disk, so every command imports its own world inside its function.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from calm_ray import __version__
from calm_ray.errors import CalmRayError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit status. A user's mistake prints one line, never a traceback."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        return int(args.command(args))
    except CalmRayError as exc:
        print(f"calm-ray: {exc}", file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except OSError as exc:
        return _tell_disk_trouble(exc)
    finally:
        _flush()


def _tell_disk_trouble(exc: OSError) -> int:
    """A disk that is full or read-only, wherever it is met. Raises what is anything else: it is a bug of ours."""
    from calm_ray.peers.endings import disk_error, is_disk_trouble

    if not is_disk_trouble(exc):
        raise exc
    error = disk_error(exc, where=Path(exc.filename or "output"), elsewhere="write elsewhere")
    print(f"calm-ray: {error}", file=sys.stderr)
    return error.exit_code


def _flush() -> None:
    """Now, where a terminal or a pipe that is gone is no reason for a traceback; Python would tell it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="calm-ray", description="Train language models together, over the internet.")
    parser.add_argument("--version", action="version", version=f"calm-ray {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    join = commands.add_parser("join", help="join a run as a volunteer: calm-ray join INVITE")
    join.add_argument("invite", help="the line that the organiser gave you, starting with calm1-")
    join.add_argument("--config", type=Path, help="TOML file with a [peer] table for this machine")
    join.add_argument("--folder", type=Path, help="identity, log and run bundle (default: one per run, in your home)")
    join.add_argument("--name", help="how the run's page thanks you")
    reach = join.add_mutually_exclusive_group()
    reach.add_argument("--public", action="store_true", help="others can reach this machine: do not ask")
    reach.add_argument("--client-mode", action="store_true", help="never accept connections from others")
    join.set_defaults(command=_join)

    doctor = commands.add_parser("doctor", help="check this machine, and the way to a run, before joining it")
    doctor.add_argument("invite", nargs="?", help="the run to check the way to (default: only this machine)")
    doctor.add_argument("--config", type=Path, help="TOML file with a [peer] table, as for join")
    doctor.add_argument("--folder", type=Path, help="the peer's folder, as for join")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(command=_doctor)

    peer = commands.add_parser("peer", help="run one peer of any role under its watchdog")
    peer.add_argument("--spec", help="the peer as JSON (overrides everything else)")
    peer.add_argument("--role", choices=("trainer", "auxiliary", "monitor"), default="trainer")
    peer.add_argument("--folder", type=Path, help="identity, log and run bundle of this peer")
    peer.add_argument("--invite", help="join the run of this invite")
    peer.add_argument("--bundle", type=Path, help="start a new run from this bundle (first auxiliary peer)")
    peer.add_argument(
        "--resume", type=Path, help="auxiliary peer: go on from this checkpoint, or the newest in this folder of them"
    )
    peer.add_argument("--config", type=Path, help="TOML file with a [peer] table")
    peer.add_argument("--reach", choices=("auto", "client", "public"), default="auto")
    peer.set_defaults(command=_peer)

    invite = commands.add_parser("invite", help="print a run's invite and the pip line for volunteers")
    invite.add_argument("folder", type=Path, help="the run's output folder, such as out/demo")
    invite.add_argument("--wheel", help="path or URL of the wheel that volunteers install (default: this git checkout)")
    invite.set_defaults(command=_invite)

    status = commands.add_parser("status", help="what the peers on this machine, or a whole swarm, are doing")
    status.add_argument("target", nargs="?", help="a peer's folder or an invite (default: your own peers)")
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(command=_status)

    config = commands.add_parser(
        "config", help="check a config file and print [run], if it has one, and [peer] with all defaults"
    )
    config.add_argument("file", type=Path)
    config.set_defaults(command=_config)
    return parser


def _join(args: argparse.Namespace) -> int:
    from calm_ray.cli.join import join
    from calm_ray.peers.spec import Reach

    reach: Reach = "public" if args.public else "client" if args.client_mode else "auto"
    return join(args.invite, config=args.config, folder=args.folder, name=args.name, reach=reach)


def _doctor(args: argparse.Namespace) -> int:
    from calm_ray.cli.doctor import examine

    return examine(args.invite, config=args.config, folder=args.folder, as_json=args.json)


def _peer(args: argparse.Namespace) -> int:
    from calm_ray.cli.peer import run_peer

    return run_peer(args)


def _invite(args: argparse.Namespace) -> int:
    from calm_ray.cli.invite import print_invite

    return print_invite(args.folder, wheel=args.wheel)


def _status(args: argparse.Namespace) -> int:
    from calm_ray.cli.status import print_status

    return print_status(args.target, as_json=args.json)


def _config(args: argparse.Namespace) -> int:
    from calm_ray.config import load_config, load_peer_table, read_toml

    if "run" not in read_toml(args.file):  # a volunteer's file
        print(load_peer_table(args.file).model_dump_json(indent=2))
        return 0
    config = load_config(args.file)
    print(config.model_dump_json(indent=2))
    print(f"config hash: {config.run.config_hash()}", file=sys.stderr)
    return 0
