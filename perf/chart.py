"""A chart of a result against its floors and goals, as SVG, and its tables in Markdown. Nothing is measured here.

python -m perf.chart perf/results/0.1.0.json docs/discussion/performance.svg

One bar a goal: the measured figure as a share of the goal, on a logarithmic scale, with a mark where the floor is.
Where the figure is to be small, the share is turned round, so that longer is better everywhere.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import NamedTuple

from perf.goals import GOALS, Goal

WIDTH, LABELS, RIGHT, ROW, TOP = 900, 300, 150, 24, 62
LEAST, MOST = 0.1, 4.0  # shares of the goal at both ends of the scale
REACHED, SHORT, BELOW, INK, FAINT = "#2f7d4f", "#c98a1b", "#b3362b", "#222222", "#cccccc"
FIGURES = {
    "rate": "msg/s",
    "total_us": "CPU-µs/msg",
    "p99_ms": "ms p99",
    "write_transactions": "commits/msg",
    "wal_bytes": "B WAL/msg",
    "cores": "cores",
    "server_rss_mb": "MB",
    "deliveries_per_push": "deliveries/push",
    "over_base": "x the base",
    "bytes_per_partition": "B/partition",
}


class Bar(NamedTuple):
    label: str
    share: float  # of the goal; 1 and more: reached
    floor: float | None  # as a share
    value: str


def bars(summary: list[Mapping[str, object]], workers: int) -> list[Bar]:
    """A bar for every goal of which there is a row."""
    found = []
    for goal in GOALS:
        for row in summary:
            value = row.get(goal.field)
            if (row["cell"], row["verb"], row["workers"]) == (goal.cell, goal.verb, workers) and isinstance(
                value, int | float
            ):
                found.append(_bar(goal, float(value)))
    return found


def _bar(goal: Goal, value: float) -> Bar:
    share = goal.goal / value if goal.least and value else value / goal.goal
    floor = None if goal.floor is None else goal.floor / goal.goal
    figure = FIGURES.get(goal.field, goal.field)
    return Bar(f"{goal.cell}: {goal.verb}", share, floor, f"{_number(value)} {figure}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def goals_table(summary: list[Mapping[str, object]], workers: int) -> str:
    """Every goal of which there is a row."""
    lines = ["| cell | verb | measured | floor | goal | |", "|---|---|---|---|---|---|"]
    for goal in GOALS:
        for row in summary:
            value = row.get(goal.field)
            if (row["cell"], row["verb"], row["workers"]) != (goal.cell, goal.verb, workers) or not isinstance(
                value, int | float
            ):
                continue
            bar = _bar(goal, float(value))
            verdict = "reached" if bar.share >= 1 else f"{(1 / bar.share - 1) * 100:.0f} % away"
            if bar.floor is not None and bar.share < bar.floor:
                verdict = "below the floor"
            floor = "" if goal.floor is None else f"{goal.floor:,.0f}"
            sign = "≤ " if goal.least else ""
            lines.append(
                f"| {goal.cell} | {goal.verb} | {bar.value} | {floor} | {sign}{_number(goal.goal)} | {verdict} |"
            )
    return "\n".join(lines)


def cells_table(summary: list[Mapping[str, object]]) -> str:
    """Every row. CPU is that of server, PostgreSQL and generator."""
    lines = [
        "| cell | verb | workers | msg/s | least, most | p50 / p99 ms | CPU-µs/msg | WAL B | commits | others |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        cpu = [row.get(name) for name in ("server_us", "postgres_us", "generator_us")]
        costs = " + ".join(f"{value:,.2f}" for value in cpu if isinstance(value, float))
        wal, commits, others = (row.get(name) for name in ("wal_bytes", "write_transactions", "others_percent"))
        lines.append(
            f"| {row['cell']} | {row['verb']} | {row['workers']} | {row['rate']:,.0f} | {row['rate_min']:,.0f},"
            f" {row['rate_max']:,.0f} | {row['p50_ms']:.1f} / {row['p99_ms']:.1f} | {costs}"
            f" | {'' if wal is None else f'{wal:,.1f}'} | {'' if commits is None else f'{commits:.4f}'}"
            f" | {'' if others is None else f'{others:.0f} %'} |"
        )
    return "\n".join(lines)


def place(share: float) -> float:
    """Where a share lies on the scale, in pixels."""
    part = (math.log(min(max(share, LEAST), MOST)) - math.log(LEAST)) / (math.log(MOST) - math.log(LEAST))
    return LABELS + part * (WIDTH - LABELS - RIGHT)


def svg(found: list[Bar], title: str) -> str:
    """The chart."""
    height = TOP + ROW * len(found) + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"',
        '  font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="15" fill="{INK}">{escape(title)}</text>',
    ]
    for share, name in ((0.1, "0.1"), (0.25, "0.25"), (0.5, "0.5"), (1.0, "goal"), (2.0, "2"), (4.0, "4 times")):
        x = place(share)
        parts.append(f'<text x="{x:.1f}" y="{TOP - 14}" text-anchor="middle" fill="{INK}">{name}</text>')
        colour = INK if share == 1 else FAINT
        parts.append(f'<line x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{height - 10}" stroke="{colour}"/>')
    for number, bar in enumerate(found):
        y = TOP + ROW * number
        colour = REACHED if bar.share >= 1 else SHORT
        if bar.floor is not None and bar.share < bar.floor:
            colour = BELOW
        left, right = place(LEAST), place(bar.share)
        parts.append(f'<text x="{LABELS - 10}" y="{y + 14}" text-anchor="end" fill="{INK}">{escape(bar.label)}</text>')
        parts.append(
            f'<rect x="{left:.1f}" y="{y + 3}" width="{max(right - left, 1):.1f}" height="{ROW - 9}" fill="{colour}"/>'
        )
        if bar.floor is not None:
            x = place(bar.floor)
            parts.append(
                f'<line x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{y + ROW - 3}" stroke="{INK}" stroke-width="2"/>'
            )
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{y + 14}" fill="{INK}">{escape(bar.value)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="perf.chart", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("chart", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    document = json.loads(arguments.result.read_text())
    meta = document["meta"]
    machine = f"{arguments.workers} workers on {meta['machine']['cores']} cores"
    title = f"queen-trio {meta['version']}, {machine}: share of each goal (black marks: floors)"
    print(goals_table(document["summary"], arguments.workers), cells_table(document["summary"]), sep="\n\n")
    arguments.chart.write_text(svg(bars(document["summary"], arguments.workers), title))


if __name__ == "__main__":
    main()
