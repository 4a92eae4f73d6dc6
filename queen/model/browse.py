"""Messages as operators look at them: where each stands for which group. No I/O, no JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import StrEnum
from uuid import UUID

import msgspec

from queen.model.queue import QUEUE_MODE, Queue


class MessageStatus(StrEnum):
    """Where a message stands."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    DEAD_LETTER = "dead_letter"


class Cursor(msgspec.Struct, frozen=True, kw_only=True):
    """How far a group is in a partition. The lease is a live one, or absent."""

    committed: int
    retry_count: int = 0
    lease_first: int = 0
    lease_end: int = 0
    lease_expires_at: datetime | None = None

    def status(self, offset: int) -> MessageStatus:
        if offset < self.committed:
            return MessageStatus.COMPLETED
        if self.holds(offset):
            return MessageStatus.PROCESSING
        return MessageStatus.PENDING

    def holds(self, offset: int) -> bool:
        """Whether the message is under the lease."""
        return self.lease_expires_at is not None and self.lease_first <= offset < self.lease_end


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """A message for all groups together. ``queue_status`` is None where nobody consumes without a group."""

    status: MessageStatus
    queue_status: MessageStatus | None
    consumed_by: int  # named groups
    total_groups: int
    lease_expires_at: datetime | None


def standing_of(offset: int, cursors: Mapping[str, Cursor], dead: Iterable[str]) -> Standing:
    """``cursors``: of the registered groups; ``dead``: groups that have set the message aside.

    A queue that is consumed without groups counts by that; another one is done with a message when every group is.
    """
    dead = set(dead)
    named = [cursor for group, cursor in cursors.items() if group != QUEUE_MODE]
    consumed_by = sum(offset < cursor.committed for cursor in named)
    expires_at = next((cursor.lease_expires_at for cursor in cursors.values() if cursor.holds(offset)), None)
    queue_status = None
    if QUEUE_MODE in cursors:
        queue_status = MessageStatus.DEAD_LETTER if QUEUE_MODE in dead else cursors[QUEUE_MODE].status(offset)
    if queue_status is not None:
        status = queue_status
    elif dead:
        status = MessageStatus.DEAD_LETTER
    elif named and consumed_by == len(named):
        status = MessageStatus.COMPLETED
    elif any(cursor.holds(offset) for cursor in named):
        status = MessageStatus.PROCESSING
    else:
        status = MessageStatus.PENDING
    return Standing(
        status=status,
        queue_status=queue_status,
        consumed_by=consumed_by,
        total_groups=len(named),
        lease_expires_at=expires_at,
    )


class MessageQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which messages; None: any. Newest first."""

    queue: str | None = None
    partition: str | None = None
    namespace: str | None = None
    task: str | None = None
    status: MessageStatus | None = None
    created_from: datetime | None = None
    created_to: datetime | None = None
    limit: int = 200
    offset: int = 0


class DeadLetterFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which dead letters of a queue; None: any. ``error`` is a part of the reason."""

    partition: str | None = None
    group: str | None = None
    failed_from: datetime | None = None
    failed_to: datetime | None = None
    error: str | None = None
    message_id: UUID | None = None


class FoundMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A message that was found. ``line``: see ``queen.storage.lines``; in lists without its payload."""

    queue: Queue
    partition: str
    partition_id: UUID
    offset: int
    created_at: datetime
    id_prefix: str
    line: bytes
    standing: Standing


class Found(msgspec.Struct, frozen=True):
    """A page of messages, and the groups of the queues it was looked for in."""

    messages: list[FoundMessage]
    groups: frozenset[str]


class MessageDetail(msgspec.Struct, frozen=True, kw_only=True):
    """A message with all that is known of it."""

    message: FoundMessage
    encrypted: bool
    error: str | None  # of its dead letter
    retry_count: int
    cursors: dict[str, Cursor]
