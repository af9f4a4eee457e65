"""Follow the run on the terminal: ask its supervisor once a second, show the table, end at the last checkpoint."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.live import Live

from calm_ray.actors.desired import Incident, Member, SupervisorStatus
from calm_ray.errors import CalmRayError
from calm_ray.observe.table import plain_line, render
from calm_ray.summary import SwarmSummary
from launchers.crew import Crew
from launchers.organiser import OrganiserConfig

POLL_SECONDS = 1.0
PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
"""Lines as they are: an invite is to be copied."""
ETA_EPOCHS = 10
"""The time left is judged by so many last epochs."""
START_SECONDS = 180.0
"""Until the auxiliary peers have made an invite."""


def watch(crew: Crew, *, config: OrganiserConfig) -> Path:
    """Block until the last epoch's checkpoint is written and return its path. CalmRayError if the run cannot end."""
    console = Console()
    own_peer_ids: set[str] = set()  # grows: a peer that restarts has no id for a moment
    started_at = progress_at = time.monotonic()
    last_epoch, invite = -1, ""
    boundaries: deque[tuple[int, float]] = deque(maxlen=ETA_EPOCHS)
    told: set[Incident] = set()
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        while True:
            status = crew.status()
            for line in news(status, told=told):
                console.print(line, **PLAIN)
            if status.invite != invite:
                invite = status.invite
                console.print(_invitation(invite), **PLAIN)
            if why := dead_end(status.members, asked_at=crew.asked_at):
                raise CalmRayError(why)
            if not invite and time.monotonic() - started_at > START_SECONDS:
                raise CalmRayError(f"no auxiliary peer is up after {START_SECONDS:.0f} s; {_logs(status)}")
            own_peer_ids |= {m.peer.peer_id for m in status.members if m.peer is not None and m.peer.peer_id}
            if (summary := newest_summary(status.members)) is not None:
                is_new_epoch = summary.epoch > last_epoch
                if is_new_epoch:
                    progress_at, last_epoch = time.monotonic(), summary.epoch
                    boundaries.append((last_epoch, progress_at))
                summary = with_measured_eta(summary, boundaries)
                if console.is_terminal:
                    live.update(render(summary, run_id=config.run.run_id, own_peer_ids=frozenset(own_peer_ids)))
                elif is_new_epoch:
                    print(plain_line(summary), flush=True)
            if (checkpoint := final_checkpoint(status.members, num_epochs=config.run.num_epochs)) is not None:
                return checkpoint
            stalled_for = time.monotonic() - progress_at
            if stalled_for > config.organiser.job.stall_seconds:
                raise CalmRayError(f"no epoch has completed for {stalled_for:.0f} s; {_logs(status)}")
            time.sleep(POLL_SECONDS)


def news(status: SupervisorStatus, *, told: set[Incident]) -> Iterator[str]:
    """Each incident once, with its time of day; `told` remembers."""
    for incident in status.incidents:
        if incident not in told:
            told.add(incident)
            yield f"{time.strftime('%H:%M:%S', time.localtime(incident.at))} {incident.text}"


def dead_end(members: Sequence[Member], *, asked_at: float) -> str:
    """Why this run cannot end without somebody's help, or an empty string. `asked_at`: when we asked for it last; who
    had given up before that is tried again."""
    gone = {member.name for member in members if member.has_given_up(asked_at=asked_at)}
    for role, what in (("auxiliary", "nobody can join"), ("monitor", "nobody writes checkpoints")):
        of_role = [member for member in members if member.role == role]
        if of_role and all(member.name in gone for member in of_role):
            return f"{_given_up(of_role[0])}; without it, {what}"
    trainers = [member for member in members if member.role == "trainer"]
    summary = newest_summary(members)
    is_idle = summary is not None and not summary.peers_by_role["trainer"]
    if trainers and all(member.name in gone for member in trainers) and is_idle:
        return f"{_given_up(trainers[0])}; nobody trains"
    return ""


def _given_up(member: Member) -> str:
    return f"{member.name} has given up: {member.peer.error if member.peer is not None else ''}"


def newest_summary(members: Sequence[Member]) -> SwarmSummary | None:
    """Of the monitors'."""
    summaries = [m.peer.summary for m in members if m.peer is not None and m.peer.summary is not None]
    return max(summaries, key=lambda summary: summary.at, default=None)


def final_checkpoint(members: Sequence[Member], *, num_epochs: int) -> Path | None:
    """The last epoch's, once a monitor has written it."""
    paths = [Path(m.peer.last_checkpoint) for m in members if m.peer is not None and m.peer.last_checkpoint]
    return next((path for path in paths if int(path.name.removeprefix("epoch-")) >= num_epochs), None)


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


def _invitation(invite: str) -> str:
    told = "Invite volunteers (anyone who has this line can take part, and can change the model):"
    return f"\n{told}\n\n  calm-ray join {invite}\n"


def _logs(status: SupervisorStatus) -> str:
    return "logs: " + ", ".join(str(slot.spec.log_path) for slot in status.desired.slots)
