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
from calm_ray.peers.control import ControlClient
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
        print(f"{folder}: {status.role} of {status.run_id or '?'}: {status.state}{_numbers(status)}  {status.detail}")
    if not statuses:
        raise CalmRayError(f"no peer runs under {root}; start one with `calm-ray join INVITE`")
    return 0


def _numbers(status: PeerStatus) -> str:
    """What the peer's last report says of its work; a monitor has none."""
    report = status.report
    if report is None:
        return ""
    parts = [f"epoch {report.epoch}"]
    if report.role == "trainer":
        parts.append(f"{report.samples_per_second:.1f} samples/s")
    if report.role != "monitor":
        parts.append(f"rounds: {rounds_text(report.rounds)}")
    return "  " + ", ".join(parts)


def _ask(folder: Path) -> PeerStatus | None:
    try:
        client = ControlClient(folder)
    except OSError:
        return None
    try:
        return client.call("status")
    except OSError:
        return None
    finally:
        client.close()


def _print_swarm(invite_text: str, *, as_json: bool) -> int:
    """Join as a client for a moment, read all reports, leave. Imports hivemind: a few seconds."""
    from rich.console import Console

    from calm_ray.observe.table import render
    from calm_ray.summary import SummaryLimits, summarise
    from calm_ray.swarm.node import NodeOptions, Swarm
    from calm_ray.swarm.reception import receive

    invite = decode_invite(invite_text)
    with tempfile.TemporaryDirectory() as temporary:
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
