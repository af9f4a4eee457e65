"""Who averages how much, from what each member's line can carry. Pure.

DeDLOC (Diskin et al. 2021, section 3.2) poses it as a linear program: minimise the time of the slowest member, over the
shares. Ours has other traffic than theirs: readers send nothing, all members get the average, a reducer's own slice
does not travel, and a line carries as much in one direction as in the other at the same time. hivemind counts both
directions as one, takes readers for senders, and solves it by scipy's removed "interior-point".

The minimum is not unique: if a slow member's own vector takes longest, whatever the others do, the program does not
care about them. So those members are set aside with a share of 0, and the rest is balanced by the same program again,
until every share that is left matters. Two trainers are as fast with any split: then shares go by rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

MAX_REDUCERS = 32
"""Each costs every member a stream. Beyond this, more of them save little: each has 3 % of the vector."""
MIN_SHARE = 0.01
"""Of an equal share. Less is not worth a stream from everyone."""
SLACK = 1e-3
"""Relative difference of times that counts as none; above what TIE_BREAK costs."""
TIE_BREAK = 1e-4
"""Weight of the largest share beside the time: enough to choose among splits that are equally fast."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one member's line carries, in vectors: `fixed + share * per_share`, for each direction."""

    up: float
    up_per_share: float
    down: float
    down_per_share: float

    def at(self, share: float) -> float:
        """Vectors in the busier direction."""
        return max(self.up + share * self.up_per_share, self.down + share * self.down_per_share)


def load_of(*, is_sender: bool, num_members: int, num_senders: int) -> Load:
    """A member gets all but its own slice, and brings all but that; its slice comes from every other sender, and its
    average goes to every other member."""
    brings = float(is_sender)
    return Load(
        up=brings,
        up_per_share=num_members - 1 - brings,
        down=1.0,
        down_per_share=num_senders - brings - 1,
    )


def balance(
    bandwidths: Sequence[float | None],
    *,
    is_sender: Sequence[bool],
    can_reduce: Sequence[bool],
    max_reducers: int = MAX_REDUCERS,
) -> list[float]:
    """Shares that make the slowest member as fast as can be; they add up to 1, or are all 0 if nobody can reduce.

    `bandwidths`: bytes/s of each member, the same up and down; None is taken for the mean of the known ones, as in
    hivemind. If none is known, all who can reduce get equal shares.
    """
    reducers = [member for member, can in enumerate(can_reduce) if can and bandwidths[member] != 0]
    shares = [0.0] * len(bandwidths)
    if not reducers:
        return shares
    known = [bandwidth for bandwidth in bandwidths if bandwidth]
    rates = np.array([bandwidth or np.mean(known or [1.0]) for bandwidth in bandwidths])
    reducers = sorted(reducers, key=lambda member: (-rates[member], member))[:max_reducers]
    if not known:
        found = {member: 1 / len(reducers) for member in reducers}
    else:
        loads = {
            member: load_of(is_sender=is_sender[member], num_members=len(bandwidths), num_senders=sum(is_sender))
            for member in reducers
        }
        found = _solve(loads, rates)
    least = MIN_SHARE / len(reducers)
    kept = {member: share for member, share in found.items() if share >= least}
    total = sum(kept.values())
    for member, share in kept.items():
        shares[member] = share / total
    return shares


def seconds_on_the_wire(
    shares: Sequence[float], *, vector_bytes: float, bandwidths: Sequence[float], is_sender: Sequence[bool]
) -> float:
    """What the busiest line needs at least, for a split of the vector. No round is faster."""
    counts = {"num_members": len(shares), "num_senders": sum(is_sender)}
    return max(
        vector_bytes * load_of(is_sender=sends, **counts).at(share) / bandwidth
        for share, bandwidth, sends in zip(shares, bandwidths, is_sender, strict=True)
    )


def _solve(loads: dict[int, Load], rates: NDArray[np.float64]) -> dict[int, float]:
    """Balance; set aside those who bound the time even without a share; balance the rest."""
    active, found = dict(loads), dict.fromkeys(loads, 0.0)
    while True:
        shares, seconds = _minimise(active, rates)
        bound = [
            member
            for member, load in active.items()
            if load.at(1) > load.at(0) >= seconds * (1 - SLACK) * rates[member]
        ]
        rest = {member: load for member, load in active.items() if member not in bound}
        if not bound or not rest:
            return found | shares
        active = rest


def _minimise(loads: dict[int, Load], rates: NDArray[np.float64]) -> tuple[dict[int, float], float]:
    """The linear program: shares that add up to 1, and the least time in which every line carries its load.

    Variables are the shares, the time, and the largest share for its rate, which breaks ties. Everything is scaled to
    about one, whatever the rates are.
    """
    size, mean = len(loads), float(rates[list(loads)].mean())
    rows, limits = [], []
    for index, (member, load) in enumerate(loads.items()):
        rate = rates[member] / mean
        for fixed, per_share, variable in (
            (load.up, load.up_per_share, size),
            (load.down, load.down_per_share, size),
            (0.0, 1.0, size + 1),
        ):
            row = np.zeros(size + 2)
            row[index], row[variable] = per_share / rate, -1.0
            rows.append(row)
            limits.append(-fixed / rate)
    solution = linprog(
        np.array([*[0.0] * size, 1.0, TIE_BREAK]),
        A_ub=np.array(rows),
        b_ub=np.array(limits),
        A_eq=np.array([[*[1.0] * size, 0.0, 0.0]]),
        b_eq=[1.0],
        bounds=[*[(0.0, 1.0)] * size, (0.0, None), (0.0, None)],
        method="highs",
    )
    if not solution.success:  # it cannot be infeasible; but a solver's failure must not stop the swarm
        return dict.fromkeys(loads, 1 / size), 0.0
    return dict(zip(loads, map(float, solution.x[:size]), strict=True)), float(solution.x[size]) / mean
