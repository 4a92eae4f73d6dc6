"""How the answers of a running server look to people: numbers, times, tables, trees. Not a command itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

from queen.model.snapshot import SlotSnapshot, Snapshot
from queen.model.tree import Branch

COLUMNS: Final = (
    "slot", "pid", "gen", "state", "uptime", "restarts", "rss", "lag p50", "p99", "max", "conns", "flight",
    "req/s", "msg/s", "last exit",
)  # fmt: skip
RIGHT: Final = frozenset(COLUMNS) - {"state", "last exit"}

_SPANS: Final = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))


def span(seconds: float) -> str:
    """A length of time in its two greatest units, as in ``3h 12m``; parts of a second below ten."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = int(seconds)
    for (unit, name), (smaller, smaller_name) in pairwise(_SPANS):
        if whole >= unit:
            rest = whole % unit // smaller
            return f"{whole // unit}{name} {rest}{smaller_name}" if rest else f"{whole // unit}{name}"
    return f"{whole}s"


def size(count: float) -> str:
    """Bytes in the unit that leaves one to four digits."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def milliseconds(value: float) -> str:
    return f"{value:.1f}ms" if value < 100 else f"{value:.0f}ms"


def headline(server: Snapshot) -> str:
    """The server in one line."""
    restarts = f", {server.restarts} restart{'s' if server.restarts != 1 else ''}" if server.restarts else ""
    degraded = ", ".join(map(str, server.degraded_slots))
    missing = f", without a worker: slot {degraded}" if degraded else ""
    return (
        f"queen-trio {server.version} {server.state}, {server.workers_active} of {server.workers_wanted} workers"
        f"{missing}{restarts}, up {span(server.uptime_seconds)}, {server.url}, {server.database}, pid {server.pid}"
    )


def row(slot: SlotSnapshot) -> tuple[str, ...]:
    """The cells of a slot, by COLUMNS."""
    alive = slot.pid is not None
    return (
        str(slot.slot),
        str(slot.pid) if alive else "-",
        str(slot.generation),
        slot.state,
        span(slot.uptime_seconds) if alive else "-",
        str(slot.restarts),
        size(slot.rss_bytes) if alive else "-",
        milliseconds(slot.loop_lag_p50_ms),
        milliseconds(slot.loop_lag_p99_ms),
        milliseconds(slot.loop_lag_max_ms),
        str(slot.connections),
        str(slot.requests_in_flight),
        f"{slot.requests_per_second:.1f}",
        f"{slot.messages_per_second:.1f}",
        slot.last_exit or "-",
    )


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a plain table under COLUMNS."""
    everything = [COLUMNS, *rows]
    widths = [max(len(cells[index]) for cells in everything) for index in range(len(COLUMNS))]
    for cells in everything:
        placed = (
            cell.rjust(width) if name in RIGHT else cell.ljust(width)
            for name, cell, width in zip(COLUMNS, cells, widths, strict=True)
        )
        yield "  ".join(placed).rstrip()


def describe(branch: Branch) -> str:
    """A branch in one line."""
    if branch.kind == "more":
        return branch.name
    pid = f" (pid {branch.pid})" if branch.pid is not None else ""
    at = f": {branch.at}, {branch.seconds:.3f} s" if branch.at else ""
    blocked = f"; blocked by PostgreSQL pid {', '.join(map(str, branch.blocked_by))}" if branch.blocked_by else ""
    return f"{branch.kind} {branch.name}{pid}{at}{blocked}"


def draw(branch: Branch, indent: str = "") -> Iterator[str]:
    """The lines of a tree, without its root's own."""
    for position, below in enumerate(branch.branches, 1):
        last = position == len(branch.branches)
        yield f"{indent}{'└─' if last else '├─'} {describe(below)}"
        yield from draw(below, indent + ("   " if last else "│  "))
