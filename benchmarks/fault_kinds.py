"""What can go wrong in a chaos run, and when: kinds of faults, and a schedule that follows from a seed. Pure.

The shape is fixed: three trainers, two auxiliary peers, a monitor. A fault is declared, not programmed: `fault_inject`
knows how each `how` is done to our peers and to bare hivemind's, and `fault_rig` waits for what is to be back.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

TRAINERS = ("trainer-0", "trainer-1", "trainer-2")
BOOTSTRAP = "auxiliary-0"
AUXILIARY = "auxiliary-1"
MONITOR = "monitor-0"
FULL_PEERS = (*TRAINERS, BOOTSTRAP, AUXILIARY)
EVERYONE = (*FULL_PEERS, MONITOR)
NODE = "worker-node"
STOP_SECONDS = 15.0
NODE_SECONDS = 10.0
"""Until somebody has started the worker node again. Nobody waits for it: peers move to the head."""

How = Literal["child", "watchdog", "whole", "p2pd", "dht", "worker", "raylet", "stop"]
"""SIGKILL to: the process that does the work; its watchdog; both and all below them; libp2p's daemon; hivemind's DHT
process; the Ray worker that holds the peer's actor; the worker node's raylet. `stop`: SIGSTOP, and SIGCONT later."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One way to go wrong."""

    name: str
    how: How
    targets: tuple[str, ...]
    """Slots that it may hit."""
    held_seconds: float = 0.0
    """The schedule itself holds the target down for so long; whatever comes on top is the system's own."""
    mend_seconds: float = 0.0
    """Undone after so long: SIGCONT, a new node."""
    returns: str
    """What must be there again afterwards, for people."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One line of a schedule. `at`: seconds after its beginning."""

    at: float
    kind: Kind
    target: str

    def __str__(self) -> str:
        return f"{self.at:7.1f} s  {self.kind.name}: {self.target}"


KINDS: tuple[Kind, ...] = (
    Kind(name="trainer's child", how="child", targets=TRAINERS, returns="a new child of the same watchdog trains"),
    Kind(name="trainer's watchdog", how="watchdog", targets=TRAINERS, returns="its actor starts a new watchdog"),
    Kind(name="auxiliary peer's child", how="child", targets=(AUXILIARY,), returns="a new child holds the state"),
    Kind(name="monitor's child", how="child", targets=(MONITOR,), returns="a new child reads, no epoch is missed"),
    Kind(name="bootstrap peer, whole", how="whole", targets=(BOOTSTRAP,), returns="it is back at the same address"),
    Kind(name="p2pd", how="p2pd", targets=FULL_PEERS, returns="its peer noticed, and joined again"),
    Kind(name="DHT process", how="dht", targets=FULL_PEERS, returns="its peer noticed, and joined again"),
    Kind(
        name="Ray worker process", how="worker", targets=EVERYONE,
        returns="trainer: starts again by the supervisor; others: adopted, same process",
    ),
    Kind(
        name="worker node's raylet", how="raylet", targets=(NODE,), mend_seconds=NODE_SECONDS,
        returns="whoever lived there lives on the head",
    ),
    Kind(
        name="SIGSTOP of a trainer, 15 s", how="stop", targets=TRAINERS, held_seconds=STOP_SECONDS,
        mend_seconds=STOP_SECONDS, returns="the same process is in step",
    ),
)  # fmt: skip


def schedule(kinds: Sequence[Kind], *, number: int, seed: int, duration: float) -> tuple[Fault, ...]:
    """`number` faults over `duration` seconds, ordered by time; the same for the same arguments.

    Each kind comes `number // len(kinds)` times at least, each of its targets as often as the others, so that no peer
    has more failures than its budget of restarts allows. One fault falls into each `duration / number` seconds,
    anywhere in them: two may follow at once, as on a bad day, but a whole run has no quiet half. None at all may be
    asked for: an undisturbed run, to compare with.
    """
    if 0 < number < len(kinds):
        raise ValueError(f"{number} faults cannot show {len(kinds)} kinds")
    rng = random.Random(f"calm-ray chaos {seed}")
    drawn: list[Kind] = [kind for kind in kinds for _ in range(number // len(kinds))]
    drawn += rng.sample(list(kinds), number - len(drawn))
    targets = {kind.name: _in_turn(kind.targets, rng) for kind in kinds}
    rng.shuffle(drawn)
    step, found = duration / max(1, number), []
    for index, kind in enumerate(drawn):
        queue = targets[kind.name]
        target = queue.pop(0)
        queue.append(target)
        found.append(Fault(at=(index + rng.random()) * step, kind=kind, target=target))
    return tuple(found)


def in_turn(kinds: Sequence[Kind]) -> tuple[Fault, ...]:
    """Each kind once for each role that it can hit, one after the other: for measuring, so `at` means nothing."""
    found = []
    for kind in kinds:
        roles: dict[str, str] = {}
        for target in kind.targets:
            roles.setdefault(target.rsplit("-", 1)[0], target)
        # A trainer that others do not join by: in a bare swarm, trainer-0 is the bootstrap peer.
        found += [
            Fault(at=0.0, kind=kind, target=TRAINERS[1] if role == "trainer" else target)
            for role, target in roles.items()
        ]
    return tuple(found)


def bare_target(fault: Fault) -> str | None:
    """Whom the same fault hits in a swarm of three bare trainers; None: there is nothing there that could break."""
    if fault.target in TRAINERS:
        return fault.target
    if fault.target == BOOTSTRAP:
        return TRAINERS[0]  # the others join by its address
    return TRAINERS[2] if fault.target == NODE else None


def _in_turn(targets: Sequence[str], rng: random.Random) -> list[str]:
    return rng.sample(list(targets), len(targets))
