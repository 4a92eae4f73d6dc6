"""Traces: what consumers record about messages. No I/O, no JSON."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import msgspec


class NewTrace(msgspec.Struct, frozen=True, kw_only=True):
    """A trace to record. ``data``: JSON text of an object."""

    transaction_id: str
    partition_id: str  # as given; need not be a UUID
    data: bytes
    group: str | None = None
    names: tuple[str, ...] = ()
    event_type: str = "info"
    worker_id: str | None = None


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """A trace as recorded."""

    trace_id: UUID
    transaction_id: str
    partition_id: UUID
    event_type: str
    data: bytes
    group: str | None
    worker_id: str | None
    created_at: datetime
    names: tuple[str, ...]


class NamedTrace(msgspec.Struct, frozen=True, kw_only=True):
    """A trace found by a name, with where its message lies; ``line`` as it is stored, None when it is gone."""

    trace: Trace
    queue: str
    partition: str
    line: bytes | None
    id_prefix: str


class TraceName(msgspec.Struct, frozen=True, kw_only=True):
    """A name that traces were recorded under."""

    name: str
    traces: int
    messages: int
    last_seen: datetime
