"""Dead letters: which are asked for, and the page of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Final, Literal, NotRequired, TypedDict
from uuid import UUID

import msgspec
from msgspec import Meta, field

from queen.errors import InvalidRequest
from queen.model.browse import DeadLetterFilter
from queen.routes.wire.body import (
    INT32_MAX,
    Json,
    Name,
    TimeText,
    UuidText,
    body_fields,
    check_name,
    decode_body,
    format_time,
    is_null,
    is_text,
    scalar_of,
    text_of,
)
from queen.routes.wire.query import When, read_filter, read_time
from queen.storage.dead_letters import DeadLetter
from queen.storage.lines import read_line

MAX_PAGE: Final = 1000
"""Rows of one page at most: a page is built whole, each row with its payload."""


DEFAULT_SELECTION: Final = 1000
MAX_SELECTION: Final = 10_000
"""Dead letters that one request delivers again or removes."""

SHOWN: Final = 100
"""Message ids that the answer to such a request names."""


class DeadLetterQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which dead letters; what is not named does not matter. Times are of the failure."""

    queue: str | None = None  # the empty name is a name
    partition: str | None = None
    group: str = field(name="consumerGroup", default="")
    failed_from: When | None = field(name="from", default=None)
    failed_to: When | None = field(name="to", default=None)
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 100
    offset: Annotated[int, Meta(ge=0, le=INT32_MAX)] = 0


class RemovalQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which dead letters of a queue are to be removed, the oldest failures first."""

    queue: Name
    partition: Name | None = None
    group: Name | None = field(name="consumerGroup", default=None)
    failed_from: When | None = field(name="from", default=None)
    failed_to: When | None = field(name="to", default=None)
    error: Annotated[str | None, Meta(description="A part of the reason.")] = None
    message_id: UUID | None = field(name="messageId", default=None)
    limit: Annotated[int, Meta(ge=1, le=MAX_SELECTION)] = DEFAULT_SELECTION
    dry_run: Annotated[bool, Meta(description="Only say what would be removed.")] = field(name="dryRun", default=False)


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Dead letters of a queue that something is to be done with, or with ``dry_run`` would be."""

    queue: str
    chosen: DeadLetterFilter
    limit: int
    dry_run: bool


class RedriveBody(msgspec.Struct, frozen=True, kw_only=True):
    """Which dead letters of a queue are to be delivered again, the oldest failures first."""

    queue: Name
    partition: Name | None = None
    group: Name | None = field(name="consumerGroup", default=None)
    failed_from: TimeText | None = field(name="from", default=None)
    failed_to: TimeText | None = field(name="to", default=None)
    error: Annotated[str | None, Meta(description="A part of the reason.")] = None
    message_id: UuidText | None = field(name="messageId", default=None)
    limit: Annotated[int, Meta(ge=1, le=MAX_SELECTION)] | None = None
    dry_run: Annotated[bool | None, Meta(description="Only say what would be delivered.")] = field(
        name="dryRun", default=None
    )


_REDRIVE: Final = msgspec.json.Decoder(RedriveBody)


def read_redrive(body: bytes) -> Selection:
    """What is to be delivered again. Raises InvalidRequest."""
    asked = decode_body(body, _REDRIVE, _read_loose_redrive)
    return _select(
        RemovalQuery(
            queue=asked.queue,
            partition=asked.partition,
            group=asked.group,
            failed_from=_moment(asked.failed_from, "from"),
            failed_to=_moment(asked.failed_to, "to"),
            error=asked.error,
            message_id=_uuid(asked.message_id),
            limit=DEFAULT_SELECTION if asked.limit is None else asked.limit,
            dry_run=asked.dry_run is True,
        )
    )


def _read_loose_redrive(body: bytes) -> RedriveBody:
    """A redrive of more than is done at once, or that is wrong."""
    fields = body_fields(body)
    for name in ("queue", "partition", "consumerGroup", "from", "to", "error", "messageId"):
        if not is_text(fields.get(name), or_null=True):
            raise InvalidRequest(f"{name} must be a string")
    limit = scalar_of(fields.get("limit"))
    if not is_null(fields.get("limit")) and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise InvalidRequest("limit must be an integer, 1 or more")
    dry_run = scalar_of(fields.get("dryRun"))
    if not is_null(fields.get("dryRun")) and not isinstance(dry_run, bool):
        raise InvalidRequest("dryRun must be true or false")
    if is_null(fields.get("queue")):
        raise InvalidRequest("queue is required")
    return RedriveBody(
        queue=text_of(fields, "queue") or "",
        partition=text_of(fields, "partition"),
        group=text_of(fields, "consumerGroup"),
        failed_from=text_of(fields, "from"),
        failed_to=text_of(fields, "to"),
        error=text_of(fields, "error"),
        message_id=text_of(fields, "messageId"),
        limit=limit if isinstance(limit, int) else None,
        dry_run=dry_run is True,
    )


def read_removal(query: Mapping[str, str]) -> Selection:
    """What is to be removed. Raises InvalidRequest: a filter that cannot be read must not choose more than meant."""
    return _select(read_filter(query, RemovalQuery))


def _select(asked: RemovalQuery) -> Selection:
    return Selection(
        queue=check_name(asked.queue, "queue"),
        chosen=DeadLetterFilter(
            partition=None if asked.partition is None else check_name(asked.partition, "partition"),
            group=None if asked.group is None else check_name(asked.group, "consumerGroup"),
            failed_from=asked.failed_from,
            failed_to=asked.failed_to,
            error=None if asked.error is None else asked.error.replace("\0", "\N{REPLACEMENT CHARACTER}"),
            message_id=asked.message_id,
        ),
        limit=min(asked.limit, MAX_SELECTION),
        dry_run=asked.dry_run,
    )


def _moment(text: str | None, name: str) -> datetime | None:
    moment = None if text is None else read_time(text)
    if text is not None and moment is None:
        raise InvalidRequest(f"{name} must be an ISO 8601 time")
    return moment


def _uuid(text: str | None) -> UUID | None:
    try:
        return None if text is None else UUID(text)
    except ValueError:
        raise InvalidRequest("messageId must be a UUID") from None


class Selected(TypedDict):
    """Dead letters that were chosen, and what became of them; ``messageIds`` names the first of them."""

    queue: str
    matched: int
    redriven: NotRequired[int]
    removed: NotRequired[int]
    dryRun: bool
    messageIds: list[UuidText]


class Page(TypedDict):
    """Which part of a list this is."""

    limit: int
    offset: int


class DeadLetterEntry(TypedDict):
    """A dead letter."""

    id: UuidText
    messageId: UuidText
    transactionId: str
    partitionId: UuidText
    queue: str
    partition: str
    queueName: str
    partitionName: str
    namespace: str
    task: str
    consumerGroup: str
    errorMessage: str
    retryCount: int
    data: Json
    producerSub: str | None
    traceId: UuidText | None
    createdAt: TimeText
    failedAt: TimeText
    originalCreatedAt: TimeText
    movedToDlqAt: TimeText


class DeadLetterList(TypedDict):
    """Dead letters, newest failure first."""

    messages: list[DeadLetterEntry]
    total: int
    limit: int
    offset: int
    pagination: Page


def write_selected(selection: Selection, what: Literal["redriven", "removed"], message_ids: Sequence[UUID]) -> bytes:
    """``what`` was done, in the past tense, with how many, and with which of them first."""
    done = 0 if selection.dry_run else len(message_ids)
    answer: Selected = {
        "queue": selection.queue,
        "matched": len(message_ids),
        "dryRun": selection.dry_run,
        "messageIds": [str(message_id) for message_id in message_ids[:SHOWN]],
    }
    if what == "redriven":
        answer["redriven"] = done
    else:
        answer["removed"] = done
    return msgspec.json.encode(answer)


def write_dead_letters(asked: DeadLetterQuery, total: int, letters: Sequence[DeadLetter]) -> bytes:
    return msgspec.json.encode(
        DeadLetterList(
            {
                "messages": [_dead_letter(letter) for letter in letters],
                "total": total,
                "limit": asked.limit,
                "offset": asked.offset,
                "pagination": {"limit": asked.limit, "offset": asked.offset},
            }
        )
    )


def _dead_letter(letter: DeadLetter) -> DeadLetterEntry:
    message_id = str(letter.message_id)
    line = read_line(letter.line, message_id[:24])
    created_at, failed_at = format_time(letter.created_at), format_time(letter.failed_at)
    return {
        "id": message_id,
        "messageId": message_id,
        "transactionId": line.transaction_id,
        "partitionId": str(letter.partition_id),
        "queue": letter.queue,
        "partition": letter.partition,
        "queueName": letter.queue,
        "partitionName": letter.partition,
        "namespace": letter.namespace,
        "task": letter.task,
        "consumerGroup": letter.group,
        "errorMessage": letter.error,
        "retryCount": letter.retry_count,
        "data": line.data,
        "producerSub": line.producer_sub,
        "traceId": line.trace_id,
        "createdAt": created_at,
        "failedAt": failed_at,
        "originalCreatedAt": created_at,
        "movedToDlqAt": failed_at,
    }
