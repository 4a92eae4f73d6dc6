"""The window of time that a page of series looks at."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final, Literal, TypedDict

import msgspec
from msgspec import Meta, field

from queen.model.metrics import Window
from queen.routes.wire.body import (
    TimeText,
    format_time,
)
from queen.routes.wire.query import When, read_query

_MINUTES: Final = ((timedelta(hours=1), 1), (timedelta(hours=6), 5), (timedelta(hours=24), 15), (timedelta(days=7), 60))
"""Minutes of a point by the longest window they serve (contract/http-admin.md §6); longer ones have 360."""

_INTERVALS: Final = {"minute": 1, "hour": 60, "day": 1440}
_LONGEST: Final = timedelta(days=400)


IntervalName = Literal["minute", "hour", "day"]

TimeRange = TypedDict("TimeRange", {"from": TimeText, "to": TimeText})


class WindowQuery(msgspec.Struct, frozen=True, kw_only=True):
    """A window of time, the last hour unless it says otherwise."""

    start: Annotated[When | None, Meta(description="The beginning; an hour before the end by default.")] = field(
        name="from", default=None
    )
    end: Annotated[When | None, Meta(description="The end; now by default.")] = field(name="to", default=None)


class QueueWindowQuery(WindowQuery, frozen=True, kw_only=True):
    """A window of time, of one queue or of all."""

    queue: str | None = None


class IntervalQuery(WindowQuery, frozen=True, kw_only=True):
    """A window of time, the last day unless it says otherwise, and the length of its steps."""

    interval: IntervalName = "hour"


def read_window(query: Mapping[str, str]) -> Window:
    """``from`` and ``to``, the last hour unless they say otherwise. A window that ends before it begins is empty."""
    return window_of(read_query(query, WindowQuery))


def window_of(asked: WindowQuery) -> Window:
    """The window, with steps that fit its length."""
    start, end = _range(asked, timedelta(hours=1))
    minutes = next((minutes for longest, minutes in _MINUTES if end - start <= longest), 360)
    return Window(start, end, minutes)


def read_interval(query: Mapping[str, str]) -> tuple[IntervalName, Window]:
    """The same with the points asked for by name, of the last day unless they say otherwise."""
    asked = read_query(query, IntervalQuery)
    start, end = _range(asked, timedelta(hours=24))
    return asked.interval, Window(start, end, _INTERVALS[asked.interval])


def _range(asked: WindowQuery, default: timedelta) -> tuple[datetime, datetime]:
    end = asked.end or datetime.now(UTC)
    start = asked.start
    if start is None:
        start = end - default if end - datetime.min.replace(tzinfo=UTC) > default else end
    return max(start, end - _LONGEST) if end - datetime.min.replace(tzinfo=UTC) > _LONGEST else start, end


def time_range(window: Window) -> TimeRange:
    return {"from": format_time(window.start), "to": format_time(window.end)}
