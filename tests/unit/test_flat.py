"""The judge of a soak: it finds what grows, and does not take scatter for growth."""

from __future__ import annotations

import math
import random

from perf.flat import Allowance, fit, is_flat

MINUTES = [5.0 * at for at in range(180)]  # a sample each five seconds


def noise(seed: int, size: float) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(0, size) for _ in MINUTES]


def test_the_line_of_a_straight_line_is_itself() -> None:
    line = fit([(t, 3.0 + 0.5 * t) for t in MINUTES])

    assert math.isclose(line.slope, 0.5)
    assert math.isclose(line.start, 3.0)
    assert math.isclose(line.growth, 0.5 * MINUTES[-1])
    assert line.error < 1e-9


def test_a_leak_below_the_scatter_of_single_samples_is_found() -> None:
    leaking = [(t, 50.0 + 6.0 * t / MINUTES[-1] + off) for t, off in zip(MINUTES, noise(1, 2.0), strict=True)]

    assert not is_flat(fit(leaking), Allowance(3.0))
    assert is_flat(fit(leaking), Allowance(8.0))


def test_scatter_alone_is_flat() -> None:
    for seed in range(20):
        level = [(t, 50.0 + off) for t, off in zip(MINUTES, noise(seed, 2.0), strict=True)]

        assert is_flat(fit(level), Allowance(1.0))


def test_a_rate_is_judged_by_its_fall() -> None:
    falling = fit([(t, 1000.0 - 0.5 * t) for t in MINUTES])
    rising = fit([(t, 1000.0 + 0.5 * t) for t in MINUTES])

    assert not is_flat(falling, Allowance(0.0, 0.1, falls=True))
    assert is_flat(rising, Allowance(0.0, 0.1, falls=True))


def test_too_few_samples_say_nothing() -> None:
    assert is_flat(fit([]), Allowance(0.0))
    assert is_flat(fit([(0.0, 1.0)]), Allowance(0.0))
    assert is_flat(fit([(0.0, 1.0), (1.0, 9.0)]), Allowance(0.0))
