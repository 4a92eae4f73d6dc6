"""Dead letters: which are asked for, and the page of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final
from uuid import UUID

import msgspec

from queen.errors import InvalidRequest
from queen.model.browse import DeadLetterFilter
from queen.routes.wire.body import (
    RAW_OBJECT,
    body_fields,
    check_name,
    decode_body,
    format_time,
    is_null,
    is_text,
    scalar_of,
    text_of,
)
from queen.routes.wire.query import read_boolean, read_integer, read_time
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
    """Which dead letters; None: any."""

    queue: str | None
    partition: str | None
    group: str | None
    failed_from: datetime | None
    failed_to: datetime | None
    limit: int
    offset: int


def read_dead_letter_query(query: Mapping[str, str]) -> DeadLetterQuery:
    return DeadLetterQuery(
        queue=query.get("queue"),  # the empty name is a name
        partition=query.get("partition"),
        group=query.get("consumerGroup") or None,
        failed_from=read_time(query.get("from", "")),
        failed_to=read_time(query.get("to", "")),
        limit=max(1, min(read_integer(query, "limit", 100), MAX_PAGE)),
        offset=max(0, read_integer(query, "offset", 0)),
    )


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Dead letters of a queue that something is to be done with, or with ``dry_run`` would be."""

    queue: str
    chosen: DeadLetterFilter
    limit: int
    dry_run: bool


def read_redrive(body: bytes) -> Selection:
    """What is to be delivered again. Raises InvalidRequest."""
    fields = decode_body(body, RAW_OBJECT, body_fields)
    texts: dict[str, str] = {}
    for name in ("queue", "partition", "consumerGroup", "from", "to", "error", "messageId"):
        if not is_text(fields.get(name), or_null=True):
            raise InvalidRequest(f"{name} must be a string")
        text = text_of(fields, name)
        if text is not None:
            texts[name] = text
    limit = scalar_of(fields.get("limit"))
    if not is_null(fields.get("limit")) and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise InvalidRequest("limit must be an integer, 1 or more")
    dry_run = scalar_of(fields.get("dryRun"))
    if not is_null(fields.get("dryRun")) and not isinstance(dry_run, bool):
        raise InvalidRequest("dryRun must be true or false")
    return _read_selection(texts, limit if isinstance(limit, int) else DEFAULT_SELECTION, dry_run=dry_run is True)


def read_removal(query: Mapping[str, str]) -> Selection:
    """What is to be removed. Raises InvalidRequest: a filter that cannot be read must not choose more than meant."""
    text = query.get("limit", str(DEFAULT_SELECTION))
    if not text.isdecimal() or int(text) < 1:
        raise InvalidRequest("limit must be an integer, 1 or more")
    return _read_selection(query, int(text), dry_run=read_boolean(query, "dryRun"))


def _read_selection(texts: Mapping[str, str], limit: int, *, dry_run: bool) -> Selection:
    if "queue" not in texts:
        raise InvalidRequest("queue is required")
    message_id = None
    if "messageId" in texts:
        try:
            message_id = UUID(texts["messageId"])
        except ValueError:
            raise InvalidRequest("messageId must be a UUID") from None
    return Selection(
        queue=check_name(texts["queue"], "queue"),
        chosen=DeadLetterFilter(
            partition=None if "partition" not in texts else check_name(texts["partition"], "partition"),
            group=None if "consumerGroup" not in texts else check_name(texts["consumerGroup"], "consumerGroup"),
            failed_from=_moment(texts, "from"),
            failed_to=_moment(texts, "to"),
            error=None if "error" not in texts else texts["error"].replace("\0", "\N{REPLACEMENT CHARACTER}"),
            message_id=message_id,
        ),
        limit=min(limit, MAX_SELECTION),
        dry_run=dry_run,
    )


def _moment(texts: Mapping[str, str], name: str) -> datetime | None:
    if name not in texts:
        return None
    moment = read_time(texts[name])
    if moment is None:
        raise InvalidRequest(f"{name} must be an ISO 8601 time")
    return moment


def write_selected(selection: Selection, what: str, message_ids: Sequence[UUID]) -> bytes:
    """``what`` was done, in the past tense, with how many, and with which of them first."""
    return msgspec.json.encode(
        {
            "queue": selection.queue,
            "matched": len(message_ids),
            what: 0 if selection.dry_run else len(message_ids),
            "dryRun": selection.dry_run,
            "messageIds": [str(message_id) for message_id in message_ids[:SHOWN]],
        }
    )


def write_dead_letters(asked: DeadLetterQuery, total: int, letters: Sequence[DeadLetter]) -> bytes:
    return msgspec.json.encode(
        {
            "messages": [_dead_letter(letter) for letter in letters],
            "total": total,
            "limit": asked.limit,
            "offset": asked.offset,
            "pagination": {"limit": asked.limit, "offset": asked.offset},
        }
    )


def _dead_letter(letter: DeadLetter) -> dict[str, object]:
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
