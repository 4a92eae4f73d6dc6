"""The window of time that a page of series looks at."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

from queen.model.metrics import Window
from queen.routes.wire.body import format_time
from queen.routes.wire.query import read_time

_MINUTES: Final = ((timedelta(hours=1), 1), (timedelta(hours=6), 5), (timedelta(hours=24), 15), (timedelta(days=7), 60))
"""Minutes of a point by the longest window they serve (contract/http-admin.md §6); longer ones have 360."""

_INTERVALS: Final = {"minute": 1, "hour": 60, "day": 1440}
_LONGEST: Final = timedelta(days=400)


def read_window(query: Mapping[str, str]) -> Window:
    """``from`` and ``to``, the last hour unless they say otherwise. A window that ends before it begins is empty."""
    start, end = _read_range(query, timedelta(hours=1))
    minutes = next((minutes for longest, minutes in _MINUTES if end - start <= longest), 360)
    return Window(start, end, minutes)


def read_interval(query: Mapping[str, str]) -> tuple[str, Window]:
    """The same with the points asked for by name, of the last day unless they say otherwise."""
    start, end = _read_range(query, timedelta(hours=24))
    name = query.get("interval", "hour")
    if name not in _INTERVALS:
        name = "hour"
    return name, Window(start, end, _INTERVALS[name])


def _read_range(query: Mapping[str, str], default: timedelta) -> tuple[datetime, datetime]:
    end = read_time(query.get("to", "")) or datetime.now(UTC)
    start = read_time(query.get("from", ""))
    if start is None:
        start = end - default if end - datetime.min.replace(tzinfo=UTC) > default else end
    return max(start, end - _LONGEST) if end - datetime.min.replace(tzinfo=UTC) > _LONGEST else start, end


def time_range(window: Window) -> dict[str, str]:
    return {"from": format_time(window.start), "to": format_time(window.end)}
