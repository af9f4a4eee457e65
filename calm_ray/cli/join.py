"""`calm-ray join INVITE`: a volunteer's one command. Says what happens in words; the log has the rest."""

import contextlib
import sys
import time
from functools import partial
from pathlib import Path

from calm_ray import __version__
from calm_ray.config import PeerTable, load_peer_table, parse_table, state_home
from calm_ray.errors import SwarmUnreachable
from calm_ray.invite import Invite, decode_invite
from calm_ray.peers.spec import PeerSpec, Reach
from calm_ray.peers.status import PeerStatus
from calm_ray.peers.watchdog import Watchdog
from calm_ray.report import PeerReport
from calm_ray.swarm.addresses import check_listen, live_addresses

OPEN_RUN_WARNING = (
    "Note: this run is open. Anyone who has the invite can take part, and can also change the model;\n"
    "      share it only with people you trust until the run checks its members."
)


def join(invite_text: str, *, config: Path | None, folder: Path | None, name: str | None, reach: Reach) -> int:
    invite = decode_invite(invite_text)
    peer = load_peer_table(config)
    if name is not None:
        peer = parse_table(PeerTable, {**peer.model_dump(), "name": name}, where="--name")
    folder = (folder or state_home() / "peers" / invite.run_id).resolve()
    print(f"calm-ray {__version__}: joining run {invite.run_id!r}. Ctrl-C leaves, any time, without harm.")
    print(OPEN_RUN_WARNING)
    print(f"Log: {folder / 'peer.log'}", flush=True)
    spec = PeerSpec(role="trainer", folder=folder, invite=invite_text, peer=peer, reach=reach)
    narrator = Narrator(started_at=time.time())
    print("Starting; the first time, loading torch and hivemind can take half a minute.", flush=True)
    watchdog = Watchdog(spec, on_status=narrator, preflight=partial(_look_ahead, spec, invite))
    code = watchdog.run()
    with contextlib.suppress(OSError):  # the terminal may be gone by now
        if watchdog.status.error:
            print(f"calm-ray: {watchdog.status.error}", file=sys.stderr)
        elif code == 0:
            number = narrator.samples_contributed
            print(f"Left the run. You contributed {number} samples. Thank you!" if number else "Left the run.")
    return code


def _look_ahead(spec: PeerSpec, invite: Invite) -> None:
    """Say at once what would otherwise wait until torch is loaded. That nobody answers is no reason to give up."""
    check_listen(spec.peer.listen, spec.peer.announce)
    try:
        live_addresses(invite.addresses)
    except SwarmUnreachable as exc:
        print(f"calm-ray: {exc}. Trying again for some minutes; Ctrl-C gives up.", file=sys.stderr, flush=True)


class Narrator:
    """Turns statuses into a volunteer's few lines: each change of state, each epoch, the first contribution."""

    def __init__(self, *, started_at: float) -> None:
        self._started_at = started_at
        self._last: tuple[str, str] = ("", "")
        self._last_epoch = -1
        self._warnings: tuple[str, ...] = ()
        self.samples_contributed = 0

    def __call__(self, status: PeerStatus) -> None:
        now = (status.state, status.detail)
        if now != self._last and status.state != "left":
            self._last = now
            self._say(f"{status.state}{': ' + status.detail if status.detail else ''}")
        for text in [text for text in status.warnings if text not in self._warnings]:
            self._say(f"warning: {text}")
        self._warnings = status.warnings
        if status.report is not None:
            self._on_report(status.report)

    def _on_report(self, report: PeerReport) -> None:
        self.samples_contributed = max(self.samples_contributed, report.samples_contributed)
        record = report.last_epoch
        if record is not None and record.epoch > self._last_epoch:
            self._last_epoch = record.epoch
            self._say(
                f"epoch {record.epoch + 1} done, {record.num_samples} samples from you, "
                f"MLM loss {record.mlm_mean_loss:.3f}, SOP loss {record.sop_mean_loss:.3f}, "
                f"{report.samples_per_second:.1f} samples/s{_with_others(report.last_group_size)}"
            )

    def _say(self, text: str) -> None:
        print(f"[{time.time() - self._started_at:6.1f} s] {text}", flush=True)


def _with_others(group_size: int) -> str:
    return f", averaged with {group_size - 1} others" if group_size > 1 else ""
