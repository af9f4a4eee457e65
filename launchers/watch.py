"""Follow the run on the terminal: ask the monitor once a second, show the table, end at the last epoch's checkpoint."""

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.live import Live

from calm_ray.errors import CalmRayError
from calm_ray.observe.table import plain_line, render
from calm_ray.peers.status import PeerStatus
from calm_ray.summary import SwarmSummary
from launchers.crew import Crew
from launchers.organiser import OrganiserConfig

POLL_SECONDS = 1.0
ETA_EPOCHS = 10
"""The time left is judged by so many last epochs."""
_AWAY = ("restarting", "starting", "joining")


def watch(crew: Crew, *, config: OrganiserConfig) -> Path:
    """Block until the last epoch's checkpoint is written and return its path. CalmRayError if the run cannot end."""
    console = Console()
    own_peer_ids: set[str] = set()  # grows: a peer that restarts has no id for a moment
    progress_at, last_epoch = time.monotonic(), -1
    boundaries: deque[tuple[int, float]] = deque(maxlen=ETA_EPOCHS)
    before: dict[str, PeerStatus] = {}
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        while True:
            statuses = _statuses(crew)
            for name, now in statuses.items():
                if (line := incident(name, before=before.get(name), now=now)) is not None:
                    console.print(line, markup=False, highlight=False)
            before = statuses
            own_peer_ids |= {status.peer_id for status in statuses.values() if status.peer_id}
            status = next(status for status in statuses.values() if status.role == "monitor")
            if (summary := status.summary) is not None:
                is_new_epoch = summary.epoch > last_epoch
                if is_new_epoch:
                    progress_at, last_epoch = time.monotonic(), summary.epoch
                    boundaries.append((last_epoch, progress_at))
                summary = with_measured_eta(summary, boundaries)
                if console.is_terminal:
                    live.update(render(summary, run_id=config.run.run_id, own_peer_ids=frozenset(own_peer_ids)))
                elif is_new_epoch:
                    print(plain_line(summary), flush=True)
                if (checkpoint := _final_checkpoint(status, num_epochs=config.run.num_epochs)) is not None:
                    return checkpoint
            stalled_for = time.monotonic() - progress_at
            if stalled_for > config.organiser.job.stall_seconds:
                raise CalmRayError(
                    f"no epoch has completed for {stalled_for:.0f} s; logs: "
                    + ", ".join(str(member.folder / "peer.log") for member in crew.members)
                )
            time.sleep(POLL_SECONDS)


def with_measured_eta(summary: SwarmSummary, boundaries: Sequence[tuple[int, float]]) -> SwarmSummary:
    """Replace the estimate of the time left by what epochs really took: the rate knows nothing of averaging.

    `boundaries`: (epoch, when it began) of the last epochs. Unchanged until two are known.
    """
    durations = [
        (later - earlier) / (epoch - before)
        for (before, earlier), (epoch, later) in zip(boundaries, list(boundaries)[1:], strict=False)
    ]
    if not durations:
        return summary
    remaining = max(0, summary.num_epochs - summary.epoch)
    return summary.model_copy(update={"seconds_to_end": remaining * median(durations)})


def incident(name: str, *, before: PeerStatus | None, now: PeerStatus) -> str | None:
    """A line for whoever watches, once a peer of ours has failed and once it is back; None if there is no news."""
    if now.num_restarts > (before.num_restarts if before is not None else 0):
        return f"{name}: restart {now.num_restarts}: {now.detail}"
    was_away = before is not None and before.num_restarts and before.state in _AWAY
    return f"{name}: back, {now.state}" if was_away and now.state not in _AWAY else None


def _statuses(crew: Crew) -> dict[str, PeerStatus]:
    """What our own peers say, by name; CalmRayError if one has given up."""
    statuses = {}
    for member in crew.members:
        status = crew.status(member)
        if status.exit_code is not None:
            log = member.folder / "peer.log"
            raise CalmRayError(f"{member.name} left with code {status.exit_code}: {status.error or 'see'} {log}")
        statuses[member.name] = status
    return statuses


def _final_checkpoint(status: PeerStatus, *, num_epochs: int) -> Path | None:
    if not status.last_checkpoint:
        return None
    path = Path(status.last_checkpoint)
    return path if int(path.name.removeprefix("epoch-")) >= num_epochs else None
