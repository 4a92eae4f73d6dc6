"""Dead letters: which are asked for, and the page of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

import msgspec

from queen.routes.wire.body import format_time
from queen.routes.wire.query import read_integer, read_time
from queen.storage.dead_letters import DeadLetter
from queen.storage.lines import read_line

MAX_PAGE: Final = 1000
"""Rows of one page at most: a page is built whole, each row with its payload."""


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
