"""`calm-ray doctor`, but for its printing: look at everything at once, judge, and end in time whatever hangs.

Two stages. What needs nothing but this machine, and TCP to each address, run side by side in threads that are left
behind if they hang: a resolver or a network disk can take minutes. Then one helper process loads torch and hivemind. A
pool of threads was rejected, for Python waits at its end for every one of them.
"""

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from calm_ray import __version__
from calm_ray.config import PeerTable, load_peer_table
from calm_ray.errors import CalmRayError, ConfigError
from calm_ray.invite import Invite
from calm_ray.peers import doctor_look as look
from calm_ray.peers import doctor_machine as machine
from calm_ray.peers.doctor_checks import Check, crashed, from_error, words_of, worst
from calm_ray.peers.doctor_helper import Findings, Task, run_helper
from calm_ray.peers.doctor_peer import judge_device, judge_identity, judge_networking, judge_port, nothing_said
from calm_ray.peers.doctor_swarm import judge_addresses, judge_clock, judge_reach, judge_version
from calm_ray.peers.spec import IDENTITY_FILE
from calm_ray.swarm.addresses import check_listen, parse_address
from calm_ray.swarm.probing import AddressFacts, knock, place_of

TOTAL_SECONDS = 55.0
LOOK_SECONDS = 8.0
"""For each look at this machine and each address by TCP; they run side by side."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is examined."""

    folder: Path
    config: Path | None = None
    invite: Invite | None = None


class Examination:
    """One run of the doctor's. `on_check` gets each check as soon as it is made, `on_doing` what takes time now."""

    def __init__(
        self,
        subject: Subject,
        *,
        on_check: Callable[[Check], None],
        on_doing: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._subject, self._on_check, self._on_doing = subject, on_check, on_doing
        self._checks: list[Check] = []
        self._system = look.look_at_system()
        self._peer = PeerTable()
        self._free_bytes: int | None = None

    def run(self) -> tuple[Check, ...]:
        """All checks. Takes TOTAL_SECONDS at most, and raises nothing that this machine or a stranger can cause."""
        self._started_at = time.monotonic()
        self._add(machine.judge_system(self._system))
        if self._checks[0].verdict == "fail" and not self._system.platform.startswith("linux"):
            return tuple(self._checks)  # the rest would fail for the same reason, in words that nobody understands
        self._on_doing("looking at this machine")
        config_check = self._read_config()
        looks = [(name, _start(glance), judge) for name, glance, judge in self._looks()]
        self._folder = _start(partial(look.look_at_folder, self._subject.folder))
        knocks = {text: _start(partial(knock, text)) for text in self._bootstrap()}
        for name, future, judge in looks:
            self._add(self._settle(name, future, judge))
        self._add(config_check)
        addresses = tuple(self._knocked(text, future) for text, future in knocks.items())
        findings = self._ask_helper(addresses)
        self._add_what_needs_torch(findings)
        if addresses:
            self._add_what_needs_the_run(findings, addresses)
        return tuple(self._checks)

    # --- this machine ------------------------------------------------------------------------------------------------

    def _looks(self) -> list[tuple[str, Callable[[], Any], Callable[[Any], Check]]]:
        """(name, look, judge) of what needs no torch."""
        subject, listen = self._subject, self._listen()
        return [
            ("python", lambda: sys.version_info[:3], machine.judge_python),
            ("packages", look.look_at_packages, partial(machine.judge_packages, own=__version__)),
            ("memory", look.look_at_memory, machine.judge_memory),
            ("folder", partial(look.look_at_space, subject.folder), self._judge_folder),
            ("temporary", lambda: [look.look_at_space(f) for f in look.temporary_folders()], _judge_temporary),
            ("control", partial(look.look_at_control, subject.folder), _judge_control),
            ("open files", look.look_at_open_files, machine.judge_open_files),
            ("port", partial(_check_port, listen, self._peer.announce), judge_port),
        ]

    def _read_config(self) -> Check:
        try:
            self._peer = load_peer_table(self._subject.config)
        except ConfigError as exc:
            return from_error("config", exc, remedy="edit the file; `calm-ray config FILE` checks it")
        found = (
            f"{self._subject.config}: [peer] is fine"
            if self._subject.config
            else "the defaults, as no --config is given"
        )
        return Check(name="config", verdict="ok", found=found)

    def _judge_folder(self, facts: machine.SpaceFacts) -> Check:
        self._free_bytes = facts.free_bytes
        return machine.judge_space(facts, name="folder", elsewhere="choose another --folder")

    def _listen(self) -> str:
        """As a peer does it: not open to others if the whole swarm is on this machine."""
        addresses = self._bootstrap()
        if addresses and all(parse_address(text).is_loopback for text in addresses):
            return self._peer.listen.replace("/ip4/0.0.0.0/", "/ip4/127.0.0.1/")
        return self._peer.listen

    def _bootstrap(self) -> tuple[str, ...]:
        return self._subject.invite.addresses if self._subject.invite else ()

    def _settle(self, name: str, future: "Future[Any]", judge: Callable[[Any], Check]) -> Check:
        """Wait for a look, within LOOK_SECONDS of the start, and judge it. One that crashes is a check that failed."""
        try:
            if not self._is_done(future):
                return crashed(name, f"it took over {LOOK_SECONDS:.0f} s")
            return judge(future.result())
        except CalmRayError as exc:
            return from_error(name, exc)
        except Exception as exc:  # noqa: BLE001  the boundary: no check may end the others
            return crashed(name, words_of(exc))

    def _is_done(self, future: "Future[Any]") -> bool:
        wait([future], timeout=max(0.0, self._started_at + LOOK_SECONDS - time.monotonic()))
        return future.done()

    # --- what a helper process finds ---------------------------------------------------------------------------------

    def _ask_helper(self, addresses: tuple[AddressFacts, ...]) -> Findings:
        is_port_free = any(check.name == "port" and check.verdict == "ok" for check in self._checks)
        subject, has_identity = self._subject, False
        if self._is_done(self._folder) and self._folder.exception() is None:
            has_identity = self._folder.result().has_identity
        task = Task(
            peer=self._peer, identity=subject.folder / IDENTITY_FILE if has_identity else None,
            listen=self._listen() if is_port_free else "/ip4/127.0.0.1/tcp/0", should_dial_back=is_port_free,
            invite=subject.invite.encode() if subject.invite else None,
            addresses=tuple(facts for facts in addresses if not facts.problem),
            limit_seconds=self._started_at + TOTAL_SECONDS - time.monotonic(),
        )  # fmt: skip
        try:
            return run_helper(task, on_doing=self._on_doing)
        except OSError as exc:  # no process, no pipe: the machine is at its end
            return Findings(ended=words_of(exc))

    def _add_what_needs_torch(self, findings: Findings) -> None:
        damage = findings.identity_problem or ""
        self._add(self._settle("identity", self._folder, partial(judge_identity, damage=damage)))
        device, networking, ended = findings.device, findings.networking, findings.ended or "nothing was told"
        self._add(judge_device(device, wanted=self._peer.device) if device else nothing_said("device", ended))
        if networking is None:
            self._add(nothing_said("networking", ended))
        else:
            self._add(judge_networking(networking.problem, start_seconds=networking.start_seconds))

    # --- the run -----------------------------------------------------------------------------------------------------

    def _knocked(self, text: str, future: "Future[AddressFacts]") -> AddressFacts:
        if not self._is_done(future):
            problem = f"no answer within {LOOK_SECONDS:.0f} s"
            return AddressFacts(text=text, place=place_of(text), step="tcp", problem=problem)
        try:
            return future.result()
        except Exception as exc:  # noqa: BLE001  the boundary, as above
            return AddressFacts(text=text, place=place_of(text), step="tcp", problem=words_of(exc))

    def _add_what_needs_the_run(self, findings: Findings, addresses: tuple[AddressFacts, ...]) -> None:
        assert self._subject.invite is not None
        addresses = tuple(findings.addresses.get(facts.text, facts) for facts in addresses)
        for check in judge_addresses(addresses, run_id=self._subject.invite.run_id):
            self._add(check)
        if not any(facts.step == "done" for facts in addresses):
            return
        if version := judge_version(addresses, own=__version__, free_bytes=self._free_bytes):
            self._add(version)
        self._add(judge_clock(findings.clock, system=self._system))
        if not any(check.name == "port" and check.verdict == "fail" for check in self._checks):
            self._add(judge_reach(findings.reach))

    def _add(self, check: Check) -> None:
        self._checks.append(check)
        self._on_check(check)


def _start(function: Callable[[], Any]) -> "Future[Any]":
    """Run it in a thread that nobody waits for at the end."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as exc:  # noqa: BLE001  whoever asks for the result gets it
            future.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return future


def _judge_temporary(folders: list[machine.SpaceFacts]) -> Check:
    checks = []
    for facts in folders:
        elsewhere = (
            "let everybody write to /tmp (chmod 1777)" if facts.path == "/tmp" else "set TMPDIR to another folder"
        )
        checks.append(
            machine.judge_space(
                facts, name="temporary", elsewhere=elsewhere, least_bytes=machine.LEAST_TEMPORARY_BYTES, little_bytes=0
            )
        )
    return worst(checks)


def _judge_control(folder: str) -> Check:
    return Check(name="control", verdict="ok", found=f"`calm-ray status` can reach the peer ({folder})")


def _check_port(listen: str, announce: tuple[str, ...]) -> str:
    check_listen(listen, announce)
    return listen
