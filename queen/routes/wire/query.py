"""What a query string says: numbers, switches, times. What cannot be read means its default, as the contract has it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from queen.routes.wire.body import INT32_MAX, INT32_MIN, format_time

_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,18}").fullmatch
_SPACE_FOR_PLUS: Final = re.compile(r"(?:(?<=:[0-9]{2})|(?<=[0-9]{3})) (?=[0-9]{2}:?[0-9]{2}$)")
"""Where an unescaped "+02:00" at the end of a time has arrived as " 02:00"."""


def read_boolean(query: Mapping[str, str], name: str) -> bool:
    return query.get(name) in ("true", "1")


def read_integer(query: Mapping[str, str], name: str, default: int) -> int:
    """An integer kept within 32 bits; anything that is none means the default."""
    text = query.get(name, "").strip()
    return max(INT32_MIN, min(int(text), INT32_MAX)) if _INTEGER(text) else default


def read_time(text: str) -> datetime | None:
    """An ISO 8601 time, UTC unless it says otherwise; None for anything else."""
    if not text[:4].isdigit():
        return None
    try:
        moment = datetime.fromisoformat(_SPACE_FOR_PLUS.sub("+", text))
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def read_page(query: Mapping[str, str], default_limit: int, max_limit: int) -> tuple[int, int]:
    """``limit`` and ``offset``, kept within what a page may be."""
    limit = max(1, min(read_integer(query, "limit", default_limit), max_limit))
    return limit, max(0, read_integer(query, "offset", 0))


def time_or_null(moment: datetime | None) -> str | None:
    return None if moment is None else format_time(moment)
