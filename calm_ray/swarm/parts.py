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

FRACTION_UNITS = 2**40
"""Fractions are rounded to multiples of 1/FRACTION_UNITS of the largest possible share: far below one element."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Slices, one per member and contiguous, and their parts, numbered through from the first slice to the last."""

    bounds: tuple[int, ...]
    """Element at which each member's slice begins, and the length of the vector at the end; never decreasing."""
    part_elements: int
    """Elements in every part but the last of a slice, which may be shorter."""

    @classmethod
    def from_fractions(cls, fractions: Sequence[float], *, num_elements: int, part_elements: int) -> "Layout":
        """Cut `num_elements` in proportion to `fractions`; ValueError unless they are sane and one is positive."""
        if not all(0 <= fraction <= 1 for fraction in fractions):
            raise ValueError(f"fractions {list(fractions)[:8]}: each must lie between 0 and 1")
        units = [round(fraction * FRACTION_UNITS) for fraction in fractions]
        total = sum(units)
        if not total:
            raise ValueError("no member averages anything")
        bounds = [0, *(num_elements * so_far // total for so_far in accumulate(units))]
        return cls(bounds=tuple(bounds), part_elements=part_elements)

    def __post_init__(self) -> None:
        if self.part_elements < 1 or self.bounds[:1] != (0,) or any(a > b for a, b in pairwise(self.bounds)):
            raise ValueError("bounds must begin at 0 and never decrease, and parts must have elements")

    @property
    def num_elements(self) -> int:
        return self.bounds[-1]

    @property
    def num_parts(self) -> int:
        return self._first_parts[-1]

    def slice_of(self, member: int) -> tuple[int, int]:
        """First element of a member's slice, and the one after its last."""
        return self.bounds[member], self.bounds[member + 1]

    def parts_of(self, member: int) -> range:
        """Numbers of the parts of a member's slice."""
        return range(self._first_parts[member], self._first_parts[member + 1])

    def owner_of(self, part: int) -> int:
        """The member whose slice holds `part`."""
        return bisect_right(self._first_parts, part) - 1

    def span(self, part: int) -> tuple[int, int]:
        """First element of a part, and the one after its last."""
        owner = self.owner_of(part)
        start = self.bounds[owner] + (part - self._first_parts[owner]) * self.part_elements
        return start, min(start + self.part_elements, self.bounds[owner + 1])

    @cached_property
    def _first_parts(self) -> tuple[int, ...]:
        counts = (-(-(stop - start) // self.part_elements) for start, stop in pairwise(self.bounds))
        return (0, *accumulate(counts))
