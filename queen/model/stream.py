"""Streams: queries that run in their clients, what they remember, and their cycles. No I/O, no JSON."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from uuid import UUID

import msgspec

from queen.model.message import AckStatus, NewMessage, PushResult

MAX_STATE_KEY_BYTES = 2048
"""Of a state key as UTF-8: what the index over it can hold, with room for what stands before it."""


class StreamQuery(msgspec.Struct, frozen=True, kw_only=True):
    """A query to register. ``config_hash`` stands for the shape of its operators, which its state depends on."""

    name: str
    source_queue: str
    sink_queue: str | None
    config_hash: str
    reset: bool  # on another hash: forget the state, rather than refuse


class Registration(StrEnum):
    """What became of a registration."""

    FRESH = "fresh"  # no query had that name
    SAME = "same"  # found with the same hash; its state is kept
    RESET = "reset"  # found with another hash; its state is gone
    MISMATCH = "mismatch"  # found with another hash; nothing was changed


class StateChange(msgspec.Struct, frozen=True, gc=False):
    """A state row to put, or with ``value`` None to remove.

    ``value`` is valid UTF-8 JSON text, kept as it is. ``window_end`` is its member windowEnd, where that is a number.
    """

    key: str
    value: bytes | None
    window_end: float | None = None


class CycleAck(msgspec.Struct, frozen=True, kw_only=True):
    """The source messages that a cycle has processed: all up to ``transaction_id``.

    FAILED and DLQ both set that message aside as a dead letter.
    """

    transaction_id: str
    status: AckStatus = AckStatus.COMPLETED
    lease_id: str | None = None  # None: no lease check
    count: int = 1  # as the client counts; echoed
    error: str | None = None


class Cycle(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a query on one source partition: state, sink messages and acknowledgement, all or nothing.

    ``digest`` is that of the whole request where a repeat of it is known to be one (because it names a lease, or
    removes what is then gone): such a repeat is answered as the first was. None: a repeat is a new cycle.
    """

    query_id: UUID
    partition_id: UUID
    group: str
    changes: Sequence[StateChange]
    messages: Sequence[NewMessage]
    ack: CycleAck | None
    release_lease: bool
    digest: bytes | None = None


class CycleResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a cycle: all applied (``error`` None), or nothing. ``queue``: of the source partition."""

    error: str | None = None
    queue: str | None = None
    pushed: Sequence[PushResult] = ()
    lease_released: bool = False
    dead_lettered: bool = False
    consumed: int = 0  # messages that the source's position moved by
    repeated: bool = False  # had been applied before


class StateRow(msgspec.Struct, frozen=True, gc=False):
    """A state row as stored."""

    key: str
    value: bytes
    updated_at: datetime


class StateFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which state rows of a partition: those that meet all of it."""

    keys: Sequence[str] | None = None
    prefix: str = ""
    ripe_until: float | None = None  # window_end is at most this
