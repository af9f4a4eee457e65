"""Does it level off? A robust line through the second half of what was sampled. Pure.

Theil and Sen's estimator: the median of the slopes between all pairs of points, which a spike, a restart's first
minutes or a log that was rotated do not move (Sen, 1968). Rejected: least squares, of which one spike at the end is
half the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

HOUR_SECONDS = 3600.0
MAX_POINTS = 200
"""Pairs grow with the square: of more points, every n-th is taken."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Of one quantity of one process."""

    per_hour: float
    """Slope of the second half."""
    last: float
    """The line at the end."""
    num_points: int
    does_level_off: bool


def fit(points: Sequence[tuple[float, float]], *, tolerated_share: float, tolerated: float) -> Fit:
    """`points`: (seconds, value), ordered. Levels off: in an hour it would grow by no more than `tolerated`, or than
    `tolerated_share` of what it is, whichever is more. ValueError for fewer than four points."""
    if len(points) < 4:
        raise ValueError(f"{len(points)} points: sample for longer")
    middle = (points[0][0] + points[-1][0]) / 2
    half = [point for point in points if point[0] >= middle]
    half = half[:: max(1, len(half) // MAX_POINTS)]
    slope = median(
        (y1 - y0) / (x1 - x0) for i, (x0, y0) in enumerate(half) for x1, y1 in half[i + 1 :] if x1 > x0
    )  # fmt: skip
    offset = median(y - slope * x for x, y in half)
    last = offset + slope * half[-1][0]
    per_hour = slope * HOUR_SECONDS
    return Fit(
        per_hour=per_hour, last=last, num_points=len(half),
        does_level_off=per_hour <= max(tolerated, tolerated_share * abs(last)),
    )  # fmt: skip
