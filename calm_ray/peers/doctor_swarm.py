"""The doctor's judgement of the way to a run: its bootstrap peers, its version, the clock, who can reach us. Pure."""

from collections.abc import Sequence

from calm_ray.peers.doctor_checks import Check, from_error, size
from calm_ray.peers.doctor_machine import SystemFacts
from calm_ray.swarm.clock_offset import MAX_OFFSET_SECONDS, ClockOffset, how_to_sync
from calm_ray.swarm.probing import AddressFacts, ReachFacts

SOME_OFFSET_SECONDS = 1.0
"""A clock that is so far off today will be beyond the limit some day."""
REFUSED_SECONDS = 30.0
"""`vigil.MAX_CLOCK_SECONDS`, from which on `join` refuses; its module would load hivemind."""
ASK = "ask the organiser whether the run is up or has a newer invite"


def judge_addresses(addresses: Sequence[AddressFacts], *, run_id: str) -> tuple[Check, ...]:
    """One check each. As long as one serves the run, those that are dead only warn; a forged bundle always fails."""
    is_one_fine = any(facts.step == "done" and not facts.problem for facts in addresses)
    return tuple(
        _judge_address(facts, name=f"bootstrap {number}", run_id=run_id, is_another_fine=is_one_fine)
        for number, facts in enumerate(addresses, 1)
    )


def _judge_address(facts: AddressFacts, *, name: str, run_id: str, is_another_fine: bool) -> Check:
    if facts.step == "done" and not facts.problem:
        took = [
            f"{1000 * seconds:.0f} ms by {how}"
            for how, seconds in (("TCP", facts.tcp_seconds), ("libp2p", facts.libp2p_seconds))
            if seconds is not None
        ]
        return Check(name=name, verdict="ok", found=f"{facts.place} serves run {run_id!r}; {', '.join(took)}")
    found, remedy = _trouble(facts, run_id)
    if is_another_fine and facts.step != "bundle":
        return Check(name=name, verdict="warn", found=found, remedy="nothing to do now: another bootstrap peer is fine")
    return Check(name=name, verdict="fail", found=found, remedy=remedy)


def _trouble(facts: AddressFacts, run_id: str) -> tuple[str, str]:
    """What is wrong at one address, and what to do if there is no other."""
    match facts.step:
        case "name":
            return f"{facts.place}: {facts.problem}", f"check that this machine is online; if it is, {ASK}"
        case "tcp" if not facts.problem:
            found = f"{facts.place} accepts connections; who answers could not be checked"
            return found, "mend what failed above, if anything did, and run `calm-ray doctor` again"
        case "tcp" if "no answer" in facts.problem or "unreachable" in facts.problem:
            remedy = f"check that you are online; a firewall here may block this port: try another network, or {ASK}"
            return f"{facts.place}: {facts.problem}", remedy
        case "tcp":
            return f"{facts.place} {facts.problem}", f"check that this machine is online; if it is, {ASK}"
        case "libp2p":
            found = f"{facts.place} accepts connections, but is no peer that we can talk to ({facts.problem})"
            return found, f"somebody else may have this address by now, or a firewall interferes: {ASK}"
        case "peer":
            found = f"{facts.place} is peer {_short(facts.peer_id)} and not the one that the invite names"
            return found, "do not join: the address has another owner by now; ask the organiser for a newer invite"
        case "desk":
            found = f"{facts.place} is the right peer, but does not hand out run {run_id!r} ({facts.problem})"
            return found, f"wait a minute and try again; if it stays, {ASK}"
        case _:
            found, _, told = facts.problem.partition("; ")
            return f"{facts.place}: {found}", f"do not join; {told or 'ask the organiser for a new invite'}"


def _short(peer_id: str) -> str:
    return f"...{peer_id[-6:]}"


def judge_version(addresses: Sequence[AddressFacts], *, own: str, free_bytes: int | None) -> Check | None:
    """What the organiser's manifest wants of us; None if nobody showed one. `free_bytes` of the peer's folder."""
    for facts in addresses:
        if facts.mismatch:
            return from_error("version", ValueError(facts.mismatch))
    fitting = [facts for facts in addresses if facts.version]
    if not fitting:
        return None
    facts = fitting[0]
    bundle = f"its bundle, which you will download, has {_bundle_size(facts.bundle_bytes)}"
    if free_bytes is not None and free_bytes < facts.bundle_bytes:
        return Check(
            name="version", verdict="fail", found=f"{bundle}, and the disk has room for {size(free_bytes)}",
            remedy="delete what you no longer need or choose another --folder",
        )  # fmt: skip
    return Check(name="version", verdict="ok", found=f"you have {own}, the organiser {facts.version}; {bundle}")


def _bundle_size(num_bytes: int) -> str:
    return size(num_bytes) if num_bytes >= 2**20 else f"{max(1, round(num_bytes / 1024))} kB"


def judge_clock(offset: ClockOffset | None, *, system: SystemFacts) -> Check:
    if offset is None:
        return Check(
            name="clock", verdict="warn", found="no bootstrap peer told its time",
            remedy="compare this machine's clock with a phone's; they should agree to the second",
        )  # fmt: skip
    seconds, peers = offset.offset_seconds, "peer" if offset.num_desks == 1 else "peers"
    if abs(seconds) <= max(0.1, offset.error_seconds):
        within = max(0.01, abs(seconds) + offset.error_seconds)
        found = f"agrees with {offset.num_desks} bootstrap {peers} within {within:.2f} s"
    else:
        margin = f", give or take {offset.error_seconds:.1f} s" if offset.error_seconds >= 0.1 else ""
        direction = "ahead of" if seconds > 0 else "behind"
        found = f"{abs(seconds):.1f} s {direction} {offset.num_desks} bootstrap {peers}{margin}"
    remedy = how_to_sync(platform=system.platform, is_wsl=system.is_wsl)
    if offset.exceeds(REFUSED_SECONDS) and offset.is_agreed:
        found += f"; from {REFUSED_SECONDS:.0f} s on nobody can take part"
        return Check(name="clock", verdict="fail", found=found, remedy=remedy)
    if not offset.is_agreed:
        remedy = "compare this machine's clock with a phone's; if it is right, tell the organiser"
        found = "the bootstrap peers do not agree with each other on the time"
        return Check(name="clock", verdict="warn", found=found, remedy=remedy)
    if offset.exceeds(MAX_OFFSET_SECONDS):
        found += f"; a swarm's clocks should agree within {MAX_OFFSET_SECONDS:.0f} s"
    if offset.exceeds(SOME_OFFSET_SECONDS):
        return Check(name="clock", verdict="warn", found=found, remedy=remedy)
    return Check(name="clock", verdict="ok", found=found)


def judge_reach(reach: ReachFacts | None) -> Check:
    if reach is None or not reach.is_known:
        why = reach.problem if reach is not None else "no time left"
        remedy = "nothing to do: `calm-ray join` asks again"
        return Check(name="reach", verdict="warn", found=f"not known ({why})", remedy=remedy)
    if reach.is_reachable:
        return Check(name="reach", verdict="ok", found=f"others can reach this machine at {reach.place}: full peer")
    found = f"others cannot reach this machine ({reach.problem}): client mode, which is fine"
    return Check(name="reach", verdict="ok", found=found)
