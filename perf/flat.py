"""Whether what was sampled over a long run stays where it is: a straight line through it, by least squares. No I/O.

A figure is flat when the line, over the whole window that was looked at, rises by no more than it may, or when the
rise is within what the scatter of the samples could make. What it may rise by does not depend on how long the window
is: a leak that is too slow for a quarter of an hour shows in a run of hours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Line(NamedTuple):
    """``value = start + slope * (t - t0)``; ``error``: the standard error of the slope."""

    slope: float  # per second
    error: float
    start: float
    mean: float
    seconds: float

    @property
    def growth(self) -> float:
        """Over the window."""
        return self.slope * self.seconds


class Allowance(NamedTuple):
    """What a figure may grow by over a window: the larger of an amount and a part of its mean. ``falls``: it is judged
    by how much it falls instead, like a rate."""

    amount: float
    part: float = 0.0
    falls: bool = False


def fit(samples: Sequence[tuple[float, float]]) -> Line:
    """The line through (seconds, value); needs two samples at different times, else it is level and knows nothing."""
    count = len(samples)
    if count == 0:
        return Line(0.0, math.inf, 0.0, 0.0, 0.0)
    mean_t = sum(t for t, _ in samples) / count
    mean = sum(value for _, value in samples) / count
    spread = sum((t - mean_t) ** 2 for t, _ in samples)
    seconds = samples[-1][0] - samples[0][0]
    if spread == 0:
        return Line(0.0, math.inf, mean, mean, seconds)
    slope = sum((t - mean_t) * (value - mean) for t, value in samples) / spread
    start = mean + slope * (samples[0][0] - mean_t)
    rest = sum((value - mean - slope * (t - mean_t)) ** 2 for t, value in samples)
    error = math.sqrt(rest / (count - 2) / spread) if count > 2 else math.inf
    return Line(slope, error, start, mean, seconds)


def is_flat(line: Line, allowance: Allowance) -> bool:
    """See above. Three standard errors are what scatter makes in one case of four hundred."""
    growth = -line.growth if allowance.falls else line.growth
    return growth <= max(allowance.amount, allowance.part * abs(line.mean)) or abs(line.slope) <= 3 * line.error
