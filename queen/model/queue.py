"""Queues and their options. What a consumer group is and where it starts. No I/O."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Final
from uuid import UUID

import msgspec

QUEUE_MODE: Final = "__QUEUE_MODE__"
"""The reserved group of consumers that name none: they compete for the messages of the queue."""

DEFAULT_PARTITION: Final = "Default"
MAX_NAME_LENGTH: Final = 255
"""Characters of a queue, partition, group, namespace or task name."""


class QueueOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a queue, all of them, with the defaults of the contract (contract/http-core.md §1)."""

    lease_seconds: int = 300  # 0 is taken as 60 when a lease is given
    retry_limit: int = 3  # failed deliveries before the dead letter queue; 0 = on the first
    retry_delay_ms: int = 1000  # stored
    priority: int = 0  # higher first in namespace and task pops
    delayed_processing_seconds: int = 0
    window_buffer_seconds: int = 0
    max_size: int = 0  # stored; 0 = unlimited
    ttl_seconds: int = 3600  # stored
    dead_letter_queue: bool = False  # stored: exhausted messages are dead-lettered regardless
    dlq_after_max_retries: bool = False  # stored
    retention_enabled: bool = False
    retention_seconds: int = 0
    completed_retention_seconds: int = 0
    max_wait_time_seconds: int = 0
    encryption_enabled: bool = False


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """A queue as stored. ``version`` grows with every configure."""

    queue_id: UUID
    name: str
    namespace: str
    task: str
    options: QueueOptions
    version: int


class StartMode(StrEnum):
    """Where a new consumer group starts."""

    ALL = "all"  # with the oldest retained message
    NEW = "new"  # after the moment of its first pop
    FROM = "from"  # with the first message created at or after a time


class StartFrom(msgspec.Struct, frozen=True):
    """The start asked for by a pop; what is stored for the group wins over it."""

    mode: StartMode = StartMode.ALL
    at: datetime | None = None  # timezone-aware; only with FROM


def labels_of(queue_name: str) -> tuple[str, str]:
    """Namespace and task that an implicitly created queue takes from its dotted name; both empty without a dot."""
    namespace, dot, rest = queue_name.partition(".")
    if not dot:
        return "", ""
    return namespace, rest.partition(".")[0]
