"""The doctor's helper: `python -m calm_ray.peers.doctor_child FD TASK_JSON`. Loads torch and hivemind, looks, tells.

Whatever fails is told as a finding and the next thing is looked at: this process has no right to a traceback. It ends,
with the daemons that it started, when the doctor does.
"""

import asyncio
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from calm_ray.errors import CalmRayError
from calm_ray.invite import Invite, decode_invite
from calm_ray.parent import death_signal
from calm_ray.peers.doctor_checks import REINSTALL, words_of
from calm_ray.peers.doctor_helper import Line, Networking, Task
from calm_ray.peers.doctor_peer import DeviceFacts
from calm_ray.swarm.probing import AddressFacts

DEVICE_SECONDS = 25.0
ANY_SEQUENCE_LENGTH = 512
"""Only the micro-batch depends on it, which is not told."""


class Teller:
    """Writes lines to the doctor, from any thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._lock = descriptor, threading.Lock()

    def __call__(self, line: Line) -> None:
        with self._lock:
            os.write(self._descriptor, line.model_dump_json(exclude_defaults=True).encode() + b"\n")


def main(descriptor: int, task: Task) -> None:
    tell = Teller(descriptor)
    tell(Line(doing="loading torch and hivemind; the first time this can take half a minute"))
    try:
        import torch  # noqa: F401  here, so that the thread below and hivemind do not load it at once
    except Exception as exc:  # noqa: BLE001  any: a broken library raises what it likes
        problem = f"torch cannot be loaded ({words_of(exc)}); {REINSTALL}"
        tell(Line(device=DeviceFacts(problem=problem), networking=Networking(problem=problem)))
        return
    device = threading.Thread(target=lambda: tell(Line(device=look_at_device(task))), daemon=True)
    device.start()
    _look_at_networking(task, tell)
    device.join(DEVICE_SECONDS)


def look_at_device(task: Task) -> DeviceFacts:
    """What training would run on, tried with a few numbers: a GPU can be there and too old for this torch."""
    import torch

    from calm_ray.training.compute import choose_compute, describe_device

    try:
        found = describe_device(task.peer.device)
        compute = choose_compute(found, peer=task.peer, sequence_length=ANY_SEQUENCE_LENGTH)
        torch.ones(8, device=found.name).mul_(2).sum().item()
        free, total = torch.cuda.mem_get_info(found.name) if found.kind == "cuda" else (0, 0)
        return DeviceFacts(
            kind=found.kind, title=torch.cuda.get_device_name(found.name) if found.kind == "cuda" else "",
            total_bytes=total, free_bytes=free, precision=compute.precision,
            num_threads=task.peer.num_threads or torch.get_num_threads(),
            has_nvidia_driver=shutil.which("nvidia-smi") is not None,
        )  # fmt: skip
    except CalmRayError as exc:
        return DeviceFacts(problem=str(exc))
    except Exception as exc:  # noqa: BLE001  any: drivers raise what they like
        return DeviceFacts(problem=f"it does not compute ({words_of(exc)})")


def _look_at_networking(task: Task, tell: Teller) -> None:
    try:
        from calm_ray.swarm.hygiene import bind_children_to_parent
        from calm_ray.swarm.transport import bound_messages

        bind_children_to_parent()
        bound_messages()
        if task.identity is not None:
            tell(Line(identity_problem=_problem_of_identity(task.identity)))
        asyncio.run(_look_at_swarm(task, tell))
    except CalmRayError as exc:
        tell(Line(networking=Networking(problem=str(exc))))
    except Exception as exc:  # noqa: BLE001  any: a check that crashes is a check that failed
        tell(Line(networking=Networking(problem=words_of(exc))))


def _problem_of_identity(path: Path) -> str:
    from calm_ray.swarm.node import ensure_identity

    try:
        ensure_identity(path)
    except (CalmRayError, OSError) as exc:
        return str(exc)
    return ""


async def _look_at_swarm(task: Task, tell: Teller) -> None:
    from calm_ray.swarm.diagnose import daemon

    tell(Line(doing="starting libp2p"))
    started = time.monotonic()
    async with daemon(task.listen) as p2p:
        tell(Line(networking=Networking(start_seconds=time.monotonic() - started)))
        if task.invite is None or not task.addresses:
            return
        invite = decode_invite(task.invite)
        good = await _try_addresses(task, invite, tell)
        if good:
            await _ask_the_desks(p2p, good, task, invite, tell)


async def _try_addresses(task: Task, invite: Invite, tell: Teller) -> list[AddressFacts]:
    from calm_ray.swarm.diagnose import try_addresses

    tell(Line(doing=f"talking to {len(task.addresses)} bootstrap addresses"))
    good = []
    async for facts in try_addresses(task.addresses, invite):
        tell(Line(address=facts))
        if facts.step == "done":
            good.append(facts)
    return good


async def _ask_the_desks(p2p: Any, good: list[AddressFacts], task: Task, invite: Invite, tell: Teller) -> None:
    from calm_ray.swarm.clock_offset import ask_clocks
    from calm_ray.swarm.diagnose import ask_for_dial_back, connect

    await asyncio.gather(*(connect(p2p, facts.text) for facts in good))
    desks = list(dict.fromkeys(facts.peer_id for facts in good))
    tell(Line(doing="comparing clocks"))
    tell(Line(clock=await ask_clocks(p2p, desks, run_id=invite.run_id)))
    if task.should_dial_back:
        tell(Line(doing="asking whether others can reach this machine"))
        tell(Line(reach=await ask_for_dial_back(p2p, desks, run_id=invite.run_id)))


def _end_with_the_doctor(limit_seconds: float) -> None:
    """Our process group, which we lead, ends when the doctor dies, or soon after it has given up on us."""

    def end(*_: object) -> None:
        os.killpg(0, signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, end)
    signal.setitimer(signal.ITIMER_REAL, limit_seconds + 5)
    death_signal()()


if __name__ == "__main__":
    task = Task.model_validate_json(sys.argv[2])
    _end_with_the_doctor(task.limit_seconds)
    main(int(sys.argv[1]), task)
    os._exit(0)  # a thread that a GPU driver holds must not hold the process
