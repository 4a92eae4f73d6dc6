"""Queues and their options. What a consumer group is and where it starts. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
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
    retry_delay_ms: int = 1000  # pause before a failed batch comes again, if it is enforced
    priority: int = 0  # higher first in namespace and task pops
    delayed_processing_seconds: int = 0
    window_buffer_seconds: int = 0
    max_size: int = 0  # messages that not every group has consumed; 0 = unlimited
    ttl_seconds: int = 3600  # age at which a message expires, if it is enforced; 0 = never
    dead_letter_queue: bool = False  # what expires becomes a dead letter; exhausted messages do regardless
    dlq_after_max_retries: bool = False  # stored
    retention_enabled: bool = False
    retention_seconds: int = 0
    completed_retention_seconds: int = 0
    max_wait_time_seconds: int = 0
    encryption_enabled: bool = False
    # a default does nothing: only a ttl or retry delay that somebody asked for is enforced
    ttl_enforced: bool = False
    retry_delay_enforced: bool = False


def asked_for(defaults: QueueOptions, changes: Mapping[str, int | bool]) -> QueueOptions:
    """The defaults, but for what somebody asked for, by field; a ttl or retry delay among that is enforced."""
    enforced = {
        flag: True
        for option, flag in (("ttl_seconds", "ttl_enforced"), ("retry_delay_ms", "retry_delay_enforced"))
        if option in changes
    }
    return msgspec.structs.replace(defaults, **changes, **enforced)


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
