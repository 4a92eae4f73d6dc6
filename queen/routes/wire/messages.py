"""Single messages: which are asked for, the list, all of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final, Literal, NotRequired, TypedDict

import msgspec
from msgspec import Meta, field

from queen.model.browse import Found, FoundMessage, MessageDetail, MessageQuery, MessageStatus
from queen.model.queue import QUEUE_MODE
from queen.routes.wire.body import (
    INT32_MAX,
    Json,
    TimeText,
    UuidText,
    format_time_short,
)
from queen.routes.wire.query import When, read_query, time_or_null
from queen.storage.lines import Line, read_line

MAX_PAGE: Final = 1000
DEFAULT_WINDOW: Final = timedelta(hours=1)
_BEGINNING: Final = datetime.min.replace(tzinfo=UTC)  # of time, as far as it can be said

_STATUSES: Final[dict[str | None, MessageStatus]] = {
    **{status.value: status for status in MessageStatus},
    "failed": MessageStatus.DEAD_LETTER,
    "deadLetter": MessageStatus.DEAD_LETTER,
}


StatusName = Literal["pending", "processing", "completed", "dead_letter", "failed", "deadLetter"]


class QueueMessagesQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which messages of a queue."""

    status: Annotated[StatusName | None, Meta(description="failed and deadLetter mean dead_letter.")] = None
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 50
    offset: Annotated[int, Meta(ge=0, le=INT32_MAX)] = 0


class MessagesQuery(QueueMessagesQuery, frozen=True, kw_only=True):
    """Which messages of any queue."""

    queue: str | None = None
    partition: str | None = None
    namespace: str | None = None
    ns: Annotated[str | None, Meta(description="The same as namespace.")] = None
    task: str | None = None
    created_from: Annotated[When | None, Meta(description="An hour before the end by default.")] = field(
        name="from", default=None
    )
    created_to: Annotated[When | None, Meta(description="To the end of its minute.")] = field(name="to", default=None)
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 200


def read_message_query(query: Mapping[str, str]) -> MessageQuery:
    """Without ``from`` the last hour before ``to``; ``to`` covers its whole minute."""
    asked = read_query(query, MessagesQuery)
    created_to, created_from = asked.created_to, asked.created_from
    if created_to is not None:
        created_to = created_to.replace(second=0, microsecond=0) + timedelta(minutes=1, microseconds=-1)
    if created_from is None:
        until = created_to or datetime.now(UTC)
        created_from = until - min(DEFAULT_WINDOW, until - _BEGINNING)
    return MessageQuery(
        queue=asked.queue,
        partition=asked.partition,
        namespace=asked.ns if asked.namespace is None else asked.namespace,
        task=asked.task,
        status=_STATUSES.get(asked.status),
        created_from=created_from,
        created_to=created_to,
        limit=asked.limit,
        offset=asked.offset,
    )


def read_queue_messages_query(queue: str, query: Mapping[str, str]) -> MessageQuery:
    """The messages of one queue, of any age."""
    asked = read_query(query, QueueMessagesQuery)
    return MessageQuery(queue=queue, status=_STATUSES.get(asked.status), limit=asked.limit, offset=asked.offset)


class BusStatus(TypedDict):
    """How many groups have consumed a message."""

    consumedBy: int
    totalGroups: int


ModeName = Literal["none", "queue", "bus", "hybrid"]


class Mode(TypedDict):
    """How a queue is consumed: without groups, by groups, or both."""

    hasQueueMode: bool
    busGroupsCount: int
    type: ModeName


class ShortMessage(TypedDict):
    """A message of a queue in a list."""

    id: UuidText
    transactionId: str
    partitionId: UuidText
    queuePath: str
    queue: str
    partition: str
    status: MessageStatus
    createdAt: TimeText


class MessageEntry(TypedDict):
    """A message in a list."""

    id: UuidText
    transactionId: str
    partitionId: UuidText
    queuePath: str
    queue: str
    partition: str
    namespace: str
    task: str
    status: MessageStatus
    queueStatus: MessageStatus | None
    busStatus: BusStatus
    traceId: UuidText | None
    producerSub: str | None
    queuePriority: int
    createdAt: TimeText
    leaseExpiresAt: TimeText | None
    offset: int


class MessageList(TypedDict):
    """Messages, newest first."""

    messages: list[MessageEntry]
    mode: Mode


class MessageOptions(TypedDict):
    """Options of the queue of a message."""

    leaseTime: int
    retryLimit: int
    retryDelay: int
    ttl: int
    priority: int


class MessageMode(Mode):
    """How the queue of a message is consumed, and how many groups have consumed the message."""

    consumedByGroups: int


class MessageGroup(TypedDict):
    """A message as a group has it."""

    name: str
    consumed: bool
    leaseExpiresAt: TimeText | None


class MessageDetailAnswer(MessageEntry):
    """A message with its payload."""

    payload: Json
    isEncrypted: bool
    errorMessage: str | None
    retryCount: int | None
    queueConfig: MessageOptions
    mode: MessageMode
    consumerGroups: list[MessageGroup]


class Erased(TypedDict):
    """Whether a message was there to erase."""

    success: bool
    partitionId: str
    transactionId: str
    message: str


class Retried(TypedDict):
    """Whether a message was a dead letter, and what it is called now."""

    retried: bool
    transactionId: str
    newTransactionId: NotRequired[str]
    message: NotRequired[str]


class SetAside(TypedDict):
    """A message became a dead letter."""

    movedToDLQ: bool
    transactionId: str


def write_messages(found: Found) -> bytes:
    return msgspec.json.encode(
        MessageList(
            {
                "messages": [_entry(message, read_line(message.line, message.id_prefix)) for message in found.messages],
                "mode": _mode(found.groups),
            }
        )
    )


def _mode(groups: Iterable[str]) -> Mode:
    groups = set(groups)
    queue_mode, named = QUEUE_MODE in groups, len(groups - {QUEUE_MODE})
    kind: ModeName = "hybrid" if queue_mode and named else "queue" if queue_mode else "bus" if named else "none"
    return {"hasQueueMode": queue_mode, "busGroupsCount": named, "type": kind}


def _entry(message: FoundMessage, line: Line) -> MessageEntry:
    standing = message.standing
    return {
        "id": line.message_id,
        "transactionId": line.transaction_id,
        "partitionId": str(message.partition_id),
        "queuePath": f"{message.queue.name}/{message.partition}",
        "queue": message.queue.name,
        "partition": message.partition,
        "namespace": message.queue.namespace,
        "task": message.queue.task,
        "status": standing.status,
        "queueStatus": standing.queue_status,
        "busStatus": {"consumedBy": standing.consumed_by, "totalGroups": standing.total_groups},
        "traceId": line.trace_id,
        "producerSub": line.producer_sub,
        "queuePriority": message.queue.options.priority,
        "createdAt": format_time_short(message.created_at),
        "leaseExpiresAt": time_or_null(standing.lease_expires_at),
        "offset": message.offset,
    }


def write_short_messages(found: Found) -> bytes:
    """The bare array of ``status/queues/:q/messages``."""
    entries: list[ShortMessage] = []
    for message in found.messages:
        entry = _entry(message, read_line(message.line, message.id_prefix))
        entries.append(
            {
                "id": entry["id"],
                "transactionId": entry["transactionId"],
                "partitionId": entry["partitionId"],
                "queuePath": entry["queuePath"],
                "queue": entry["queue"],
                "partition": entry["partition"],
                "status": entry["status"],
                "createdAt": entry["createdAt"],
            }
        )
    return msgspec.json.encode(entries)


def write_message(detail: MessageDetail) -> bytes:
    message = detail.message
    line = read_line(message.line, message.id_prefix)
    options = message.queue.options
    return msgspec.json.encode(
        MessageDetailAnswer(
            {
                **_entry(message, line),
                "payload": line.data,
                "isEncrypted": detail.encrypted,
                "errorMessage": detail.error,
                "retryCount": detail.retry_count,
                "queueConfig": {
                    "leaseTime": options.lease_seconds,
                    "retryLimit": options.retry_limit,
                    "retryDelay": options.retry_delay_ms,
                    "ttl": options.ttl_seconds,
                    "priority": options.priority,
                },
                "mode": {**_mode(detail.cursors), "consumedByGroups": message.standing.consumed_by},
                "consumerGroups": [
                    {
                        "name": group,
                        "consumed": message.offset < cursor.committed,
                        "leaseExpiresAt": time_or_null(
                            cursor.lease_expires_at if cursor.holds(message.offset) else None
                        ),
                    }
                    for group, cursor in sorted(detail.cursors.items())
                ],
            }
        )
    )


def write_erased(partition_id: str, transaction_id: str, *, erased: bool) -> bytes:
    return msgspec.json.encode(
        Erased(
            {
                "success": erased,
                "partitionId": partition_id,
                "transactionId": transaction_id,
                "message": "Message deleted" if erased else "Message not found",
            }
        )
    )


def write_retried(transaction_id: str, new_transaction_id: str | None) -> bytes:
    answer: Retried = {"retried": new_transaction_id is not None, "transactionId": transaction_id}
    if new_transaction_id is None:
        answer["message"] = "The message is not in the dead letter queue"
    else:
        answer["newTransactionId"] = new_transaction_id
    return msgspec.json.encode(answer)


def write_set_aside(transaction_id: str) -> bytes:
    return msgspec.json.encode(SetAside({"movedToDLQ": True, "transactionId": transaction_id}))
