"""What is to be reached on two cores, and how far a result is from it. Nothing is measured here.

A goal is about one figure of one row: a cell, a verb, a field. The least rates (floors) are to be exceeded, the goals
reached or their gap explained. Rates were written down for a machine like the one of docs/discussion/performance.md and
do not travel; the others do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

Figures = Mapping[str, object]


class Goal(NamedTuple):
    """``floor`` None: only the goal counts. ``least``: the figure is to be small."""

    cell: str
    verb: str
    field: str
    floor: float | None
    goal: float
    least: bool = False


GOALS = (
    Goal("push-1", "push", "rate", 3_200, 8_000),
    Goal("push-1-c200", "push", "rate", 4_800, 16_000),
    Goal("push-10", "push", "rate", 30_000, 80_000),
    Goal("push-100", "push", "rate", 150_000, 250_000),
    Goal("push-1000", "push", "rate", 400_000, 600_000),
    Goal("push-1000", "push", "total_us", None, 4.0, least=True),
    Goal("push-100-spread", "push", "rate", 100_000, 200_000),
    Goal("pop-100", "pop", "rate", 150_000, 300_000),
    Goal("pop-1000", "pop", "rate", 500_000, 1_200_000),
    Goal("mixed-100", "push", "rate", 60_000, 120_000),
    Goal("mixed-100", "pop", "rate", 60_000, 120_000),
    Goal("loop-1-c200", "push", "rate", None, 4_000),
    Goal("loop-1-c200", "pop+ack", "rate", None, 4_000),
    Goal("loop-1-c200", "pop+ack", "p99_ms", None, 100.0, least=True),
    Goal("loop-1", "pop+ack", "write_transactions", None, 0.2, least=True),
    Goal("push-100-256B", "push", "wal_bytes", None, 1.3 * 256, least=True),
    Goal("parked-10000", "parked", "cores", None, 0.15, least=True),
    Goal("parked-10000", "parked", "server_rss_mb", None, 400, least=True),
    Goal("groups-10", "deliver", "deliveries_per_push", None, 9.5),
    Goal("groups-10", "push, 10 groups", "over_base", None, 1.27, least=True),  # 3 % for each of nine more
    Goal("partitions-1M", "push of 1M", "over_base", None, 1.1, least=True),
    Goal("partitions-1M", "pop of 1M", "over_base", None, 1.1, least=True),
    Goal("partitions-1M", "idle", "cores", None, 0.02, least=True),
    Goal("partitions-1M", "idle", "bytes_per_partition", None, 350, least=True),
)


def judged(summary: list[dict[str, object]]) -> list[str]:
    """A line for every goal of which there is a row: the figure, what it should be, and the gap."""
    lines = []
    for goal in GOALS:
        for row in summary:
            value = row.get(goal.field)
            if (row["cell"], row["verb"]) != (goal.cell, goal.verb) or not isinstance(value, int | float):
                continue
            ratio = goal.goal / value if goal.least and value else value / goal.goal
            verdict = "reached" if ratio >= 1 else f"{(1 / ratio - 1) * 100:.0f} % away"
            if goal.floor is not None and value < goal.floor:
                verdict = "BELOW THE FLOOR"
            floor = "-" if goal.floor is None else f"{goal.floor:,.0f}"
            what = f"{goal.cell:<16}{goal.verb:<16}{row['workers']:>3} {goal.field:<20}"
            lines.append(f"{what}{value:>14,.2f}{floor:>10}{'≤' if goal.least else '≥'}{goal.goal:>13,.2f}  {verdict}")
    return lines
