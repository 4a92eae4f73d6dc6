"""What a query string says: numbers, switches, times. What cannot be read means its default, as the contract has it.

The parameters of a route are the fields of a struct, from which the API's description is made too: a field's type, its
bounds and its default say how its text is read. ``read_query`` reads leniently, ``read_filter`` refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Any, Final, NamedTuple, TypeVar
from uuid import UUID

import msgspec
from msgspec import Meta, inspect

from queen.errors import InvalidRequest
from queen.routes.wire.body import INT32_MAX, INT32_MIN, format_time

T = TypeVar("T", bound=msgspec.Struct)

When = Annotated[datetime, Meta(tz=True)]
"""A time, in the type of a parameter. (Described as RFC 3339 has it; any ISO 8601 time is read.)"""

_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,18}").fullmatch
_SPACE_FOR_PLUS: Final = re.compile(r"(?:(?<=:[0-9]{2})|(?<=[0-9]{3})) (?=[0-9]{2}:?[0-9]{2}$)")
"""Where an unescaped "+02:00" at the end of a time has arrived as " 02:00"."""


class _Parameter(NamedTuple):
    """One query parameter: the field it fills and how its text is read; ``read`` gives None for what it cannot read."""

    field: str
    read: Callable[[str], Any]
    refusal: str
    least: int | None = None  # under it a filter is refused, and anything else is raised to it
    required: bool = False
    default: Any = None


def read_query(query: Mapping[str, str], kind: type[T]) -> T:
    """The parameters that ``kind`` declares. What cannot be read is as if absent; numbers are kept in bounds.

    Raises:
        InvalidRequest: there is a NUL in a text.
    """
    parameters = parameters_of(kind)
    values = {}
    for name, text in query.items():
        parameter = parameters.get(name)
        if parameter is not None and (value := parameter.read(text)) is not None:
            if value is text:
                _check_text(text, name)
            values[parameter.field] = value
    return kind(**values)


def _check_text(text: str, name: str) -> None:
    if "\0" in text:  # PostgreSQL holds none: such a name is none
        raise InvalidRequest(f"{name} must not contain the NUL character")


def read_filter(query: Mapping[str, str], kind: type[T]) -> T:
    """The same where guessing could do harm: a filter that cannot be read must not choose more than was meant.

    Raises:
        InvalidRequest: a parameter is missing, cannot be read, or is too small a number.
    """
    values = {}
    for name, parameter in parameters_of(kind).items():
        text = query.get(name)
        if text is None:
            if parameter.required:
                raise InvalidRequest(f"{name} is required")
            continue
        value = parameter.read(text)
        if value is None or (parameter.least is not None and int(text) < parameter.least):
            raise InvalidRequest(f"{name} must be {parameter.refusal}")
        values[parameter.field] = value
    return kind(**values)


@cache
def parameters_of(kind: type[msgspec.Struct]) -> dict[str, _Parameter]:
    """The parameters that a struct declares, by their names on the wire."""
    declared = inspect.type_info(kind)
    assert isinstance(declared, inspect.StructType)
    return {field.encode_name: _parameter(field) for field in declared.fields}


def _parameter(field: inspect.Field) -> _Parameter:
    kind = _bare(field.type)
    if isinstance(kind, inspect.BoolType):
        return _Parameter(field.name, _is_true, "true or false")
    if isinstance(kind, inspect.IntType):
        least, most = kind.ge if kind.ge is not None else INT32_MIN, kind.le if kind.le is not None else INT32_MAX

        def read_bounded(text: str) -> int | None:
            number = _number(text)
            return None if number is None else max(least, min(number, most))

        return _Parameter(
            field.name, read_bounded, f"an integer, {least} or more", least, field.required, field.default
        )
    if isinstance(kind, inspect.DateTimeType):
        return _Parameter(field.name, read_time, "an ISO 8601 time", None, field.required)
    if isinstance(kind, inspect.UUIDType):
        return _Parameter(field.name, _uuid, "a UUID", None, field.required)
    if isinstance(kind, inspect.LiteralType):
        choices = frozenset(kind.values)
        return _Parameter(field.name, lambda text: text if text in choices else None, "one of its values")
    assert isinstance(kind, inspect.StrType), f"a query parameter is no {kind}"
    return _Parameter(field.name, str, "a string", None, field.required)


def _bare(kind: inspect.Type) -> inspect.Type:
    """The type without what is said about it, and without None."""
    if isinstance(kind, inspect.Metadata):
        return _bare(kind.type)
    if isinstance(kind, inspect.UnionType):
        return _bare(next(member for member in kind.types if not isinstance(member, inspect.NoneType)))
    return kind


def _is_true(text: str) -> bool:
    return text in ("true", "1")


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if _INTEGER(text) else None


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


def read_time(text: str) -> datetime | None:
    """An ISO 8601 time, UTC unless it says otherwise; None for anything else."""
    if not text[:4].isdigit():
        return None
    try:
        moment = datetime.fromisoformat(_SPACE_FOR_PLUS.sub("+", text))
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def time_or_null(moment: datetime | None) -> str | None:
    return None if moment is None else format_time(moment)
