"""`calm-ray status`: the peers on this machine by their control sockets, or a whole swarm by an invite."""

import json
import tempfile
import time
from pathlib import Path

from calm_ray.bundle import open_bundle
from calm_ray.config import state_home
from calm_ray.errors import CalmRayError, ConfigError
from calm_ray.invite import PREFIX, decode_invite
from calm_ray.observe.table import rounds_text
from calm_ray.peers.control import ask, temporary_folder
from calm_ray.peers.endings import last_status
from calm_ray.peers.status import PeerStatus


def print_status(target: str | None, *, as_json: bool) -> int:
    if target is not None and target.startswith(PREFIX):
        return _print_swarm(target, as_json=as_json)
    root = Path(target) if target else state_home() / "peers"
    folders = [root] if (root / "lock").exists() else sorted(lock.parent for lock in root.rglob("lock"))
    statuses = {str(folder): status for folder in folders if (status := _ask(folder)) is not None}
    if as_json:
        print(json.dumps({folder: s.model_dump(mode="json") for folder, s in statuses.items()}, indent=2))
    for folder, status in statuses.items() if not as_json else ():
        print("\n    ".join([f"{folder}: {headline(status)}", *details(status, now=time.time())]))
    if not statuses:
        raise CalmRayError(f"no peer runs under {root}; start one with `calm-ray join INVITE`")
    return 0


def headline(status: PeerStatus) -> str:
    """What a peer is, and what it is doing now."""
    what = f"{status.role} of {status.run_id}" if status.run_id else status.role
    if status.is_other_version:
        what = f"{what}, of another version of calm-ray"
    doing = status.error if status.state == "parked" else status.doing or status.detail
    return f"{what}: {status.state}{': ' + doing if doing else ''}"


def details(status: PeerStatus, *, now: float) -> list[str]:
    """A line each for its work, its last success, its failures, and what is wrong at this moment."""
    lines = []
    if (report := status.report) is not None:
        parts = [f"epoch {report.epoch}"]
        if report.role == "trainer":
            parts += [f"{report.samples_per_second:.1f} samples/s", f"{report.samples_contributed:,} contributed"]
        if report.role != "monitor":
            parts.append(f"rounds: {rounds_text(report.rounds)}")
        if report.num_resyncs:
            parts.append(f"{report.num_resyncs} re-syncs")
        lines.append(", ".join(parts))
    if status.last_success_at is not None:
        what = "reading" if status.role == "monitor" else "true round"
        lines.append(f"last {what} {max(0.0, now - status.last_success_at):.0f} s ago")
    if status.restarts:
        lines.append("restarts: " + ", ".join(f"{number} {cause}" for cause, number in sorted(status.restarts.items())))
    lines += [f"warning: {text}" for text in status.warnings]
    if status.state == "parked":
        lines.append("not started again by itself; its last lines are in parked.log, and a new start by you tries anew")
    return lines


def _ask(folder: Path) -> PeerStatus | None:
    """What the peer there says; of one that has given up, what it said last."""
    if (status := ask(folder)) is not None:
        return status
    last = last_status(folder)
    return last if last is not None and last.state == "parked" else None


def _print_swarm(invite_text: str, *, as_json: bool) -> int:
    """Join as a client for a moment, read all reports, leave. Imports hivemind: a few seconds."""
    from rich.console import Console

    from calm_ray.observe.table import render
    from calm_ray.summary import SummaryLimits, summarise
    from calm_ray.swarm.node import NodeOptions, Swarm
    from calm_ray.swarm.reception import receive

    invite = decode_invite(invite_text)
    with tempfile.TemporaryDirectory(dir=temporary_folder()) as temporary:
        folder = Path(temporary)
        listen = "/ip4/127.0.0.1/tcp/0"  # nobody will call us
        reception = receive(
            invite, folder=folder / "bundle", listen=listen, identity_path=folder / "id", should_dial_back=False
        )
        _, run = open_bundle(reception.bundle)
        options = NodeOptions(is_client_mode=True, listen=listen, identity_path=folder / "id")
        swarm = Swarm.join(run.run_id, initial_peers=invite.addresses, options=options)
        try:
            reports = swarm.snapshot()
        finally:
            swarm.close()
    if not reports:
        raise ConfigError(f"run {run.run_id!r}: the bootstrap peers answer, but nobody has reported yet")
    limits = SummaryLimits(
        config_hash=run.config_hash(), num_epochs=run.num_epochs, target_batch_size=run.target_batch_size,
        max_age_seconds=run.report_lifetime_seconds,
    )  # fmt: skip
    summary = summarise(reports, now=time.time(), limits=limits)
    if as_json:
        print(summary.model_dump_json(indent=2))
    else:
        Console().print(render(summary, run_id=run.run_id))
    return 0
