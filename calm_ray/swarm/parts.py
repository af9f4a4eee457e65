"""Who averages which parts of the flat vector. Pure integer arithmetic.

The vector is cut into parts of equal length, and these are dealt out to the reducers like cards, each getting as many
of the next ones as its fraction says. So all reducers work their way from the vector's beginning to its end side by
side, and whatever must be done in order, above all hashing, can be done while the rest is still on its way. Contiguous
slices, as in hivemind, leave all of that for after the round.

Every member computes the same layout from the group's fractions, which travel as exact 64-bit floats. They become whole
numbers before anything is added up: a sum of floats may round differently for who adds in another order.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

MIN_STREAMS = 4
"""A member has about so many streams in a round. Yamux lets 256 kB of a stream be on the way, or more if it saw a long
round trip on the idle line, so that one stream alone cannot always fill a line."""
FRACTION_UNITS = 2**40
"""Fractions are rounded to multiples of 1/FRACTION_UNITS: far below one element."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Parts of a vector, numbered from its beginning, and the slices that they are dealt to.

    A slice is what one stream carries. A reducer has one; or, if there are few reducers, several of the same size.
    """

    num_elements: int
    part_elements: int
    """Elements in every part but the last, which may be shorter."""
    reducers: tuple[int, ...] = ()
    """For each slice, the number of its reducer among the group's members. None in a layout that came from a peer."""
    units: tuple[int, ...] = ()
    """For each slice, its share of the parts, in whole numbers."""

    @classmethod
    def from_fractions(cls, fractions: Sequence[float], *, num_elements: int, part_elements: int) -> "Layout":
        """Deal in proportion to `fractions`, one for each member; ValueError unless they are sane, and not all 0."""
        if not all(0 <= fraction <= 1 for fraction in fractions):
            raise ValueError(f"fractions {list(fractions)[:8]}: each must lie between 0 and 1")
        rounded = [round(fraction * FRACTION_UNITS) for fraction in fractions]
        units = {member: number for member, number in enumerate(rounded) if number}
        if not units:
            raise ValueError("no member averages anything")
        lanes = max(1, MIN_STREAMS // len(units))
        reducers = tuple(member for member in units for _ in range(lanes))
        return cls(
            num_elements=num_elements,
            part_elements=part_elements,
            reducers=reducers,
            units=tuple(units[member] for member in reducers),
        )

    @property
    def num_parts(self) -> int:
        return -(-self.num_elements // self.part_elements)

    @property
    def slices(self) -> list[int]:
        """Numbers of the slices that have parts."""
        return [number for number, parts in enumerate(self._dealt) if parts]

    def span(self, part: int) -> tuple[int, int]:
        """First element of a part, and the one after its last."""
        start = part * self.part_elements
        return start, min(start + self.part_elements, self.num_elements)

    def parts_of(self, number: int) -> tuple[int, ...]:
        """The parts of a slice, ascending."""
        return self._dealt[number]

    @cached_property
    def _dealt(self) -> tuple[tuple[int, ...], ...]:
        """The k-th part of a slice is due at (k + 1/2) / units, and parts go in order of that; ties go by number."""
        hands: list[list[int]] = [[] for _ in self.units]
        scale = 2 * sum(self.units)
        due = [(scale // (2 * units), number) for number, units in enumerate(self.units)]
        heapq.heapify(due)
        for part in range(self.num_parts if due else 0):
            _, number = due[0]
            hands[number].append(part)
            heapq.heapreplace(due, (scale * (2 * len(hands[number]) + 1) // (2 * self.units[number]), number))
        return tuple(map(tuple, hands))
