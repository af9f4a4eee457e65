"""Who averages which elements of the flat vector, and how they are cut into parts. Pure integer arithmetic.

Every member computes the same layout from the group's fractions, which travel as exact 64-bit floats; no list of sizes
has to be agreed on. Fractions become whole numbers before anything is added up: a sum of floats may round
differently for someone who adds in another order, and then two members would cut the vector at different elements.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

MIN_STREAMS = 4
"""A member has about so many streams in a round. Yamux lets 256 kB of a stream be on the way, or more if it saw a long
round trip on the idle line, so that one stream alone cannot always fill a line."""
FRACTION_UNITS = 2**40
"""Fractions are rounded to multiples of 1/FRACTION_UNITS of the largest possible share: far below one element."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Contiguous slices, and their parts, numbered through from the first slice to the last.

    A reducer has one slice; or, if there are few reducers, several of about the same length, each with streams of its
    own.
    """

    bounds: tuple[int, ...]
    """Element at which each slice begins, and the length of the vector at the end; never decreasing."""
    part_elements: int
    """Elements in every part but the last of a slice, which may be shorter."""
    reducers: tuple[int, ...] = ()
    """For each slice, the number of its reducer among the group's members; empty in a layout that came from a peer."""

    @classmethod
    def from_fractions(cls, fractions: Sequence[float], *, num_elements: int, part_elements: int) -> "Layout":
        """Cut `num_elements` in proportion to `fractions`; ValueError unless they are sane and one is positive."""
        if not all(0 <= fraction <= 1 for fraction in fractions):
            raise ValueError(f"fractions {list(fractions)[:8]}: each must lie between 0 and 1")
        units = [round(fraction * FRACTION_UNITS) for fraction in fractions]
        total = sum(units)
        if not total:
            raise ValueError("no member averages anything")
        reducers = [member for member, unit in enumerate(units) if unit]
        lanes = max(1, MIN_STREAMS // len(reducers))
        ends = accumulate(units[member] for member in reducers for _ in range(lanes))
        return cls(
            bounds=(0, *(num_elements * end // (total * lanes) for end in ends)),
            part_elements=part_elements,
            reducers=tuple(member for member in reducers for _ in range(lanes)),
        )

    def __post_init__(self) -> None:
        if self.part_elements < 1 or self.bounds[:1] != (0,) or any(a > b for a, b in pairwise(self.bounds)):
            raise ValueError("bounds must begin at 0 and never decrease, and parts must have elements")

    @property
    def num_elements(self) -> int:
        return self.bounds[-1]

    @property
    def num_parts(self) -> int:
        return self._first_parts[-1]

    @property
    def slices(self) -> list[int]:
        """Numbers of the slices that have elements."""
        return [number for number, (start, stop) in enumerate(pairwise(self.bounds)) if start < stop]

    def extent(self, number: int) -> tuple[int, int]:
        """First element of a slice, and the one after its last."""
        return self.bounds[number], self.bounds[number + 1]

    def parts_of(self, number: int) -> range:
        """Numbers of the parts of a slice."""
        return range(self._first_parts[number], self._first_parts[number + 1])

    def slice_with(self, part: int) -> int:
        """The slice that holds `part`."""
        return bisect_right(self._first_parts, part) - 1

    def span(self, part: int) -> tuple[int, int]:
        """First element of a part, and the one after its last."""
        number = self.slice_with(part)
        start = self.bounds[number] + (part - self._first_parts[number]) * self.part_elements
        return start, min(start + self.part_elements, self.bounds[number + 1])

    @cached_property
    def _first_parts(self) -> tuple[int, ...]:
        counts = (-(-(stop - start) // self.part_elements) for start, stop in pairwise(self.bounds))
        return (0, *accumulate(counts))
