"""Push: the items of a request, and what became of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, Literal, NotRequired, TypedDict
from uuid import UUID

import msgspec

from queen.errors import InvalidRequest, QueenError, QueueFull
from queen.model.message import Buffered, NewMessage, PushResult
from queen.model.queue import DEFAULT_PARTITION
from queen.routes.wire.body import (
    NULL,
    Json,
    Name,
    UuidText,
    body_fields,
    check_name,
    decode_body,
    encode_text,
    fields_of,
    is_text,
    join_text,
    null,
    objects_of,
    text_encoder,
    text_of,
)


class PushItem(msgspec.Struct, gc=False):
    """One message to store."""  # it is a NewMessage as it stands

    queue: Name
    partition: Name = DEFAULT_PARTITION
    raw: Json = msgspec.field(name="payload", default_factory=null)
    transaction_id: str | None = msgspec.field(name="transactionId", default=None)
    trace_id: UuidText | None = msgspec.field(name="traceId", default=None)

    @property
    def payload(self) -> bytes:
        return bytes(self.raw)


class PushBody(msgspec.Struct):
    """Messages to store, all of them or none."""

    items: list[PushItem]


PUSH: Final = msgspec.json.Decoder(PushBody)

_CANONICAL_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}").fullmatch


def read_push(body: bytes) -> list[PushItem]:
    """The messages of a push request, checked.

    Raises:
        InvalidRequest: with the contract's sentence; nothing of the request may be applied.
    """
    items = decode_body(body, PUSH, read_loose_push).items
    finish_items(items, newlines=b"\n" in body)
    return items


def read_loose_push(body: bytes) -> PushBody:
    elements = objects_of(body_fields(body).get("items"), "items array is required", "Each item must be a JSON object")
    return PushBody([read_loose_item(fields_of(element)) for element in elements])


def read_loose_item(fields: Mapping[str, msgspec.Raw]) -> PushItem:
    """One item that may have nulls where a default stands, or be wrong."""
    if not is_text(fields.get("queue")):
        raise InvalidRequest("Queue must be a string")
    for name, sentence in (
        ("partition", "Partition must be a string"),
        ("transactionId", "TransactionId must be a string"),
        ("traceId", "TraceId must be a string"),
    ):
        if not is_text(fields.get(name), or_null=True):
            raise InvalidRequest(sentence)
    return PushItem(
        queue=text_of(fields, "queue") or "",
        partition=DEFAULT_PARTITION if (partition := text_of(fields, "partition")) is None else partition,
        raw=fields.get("payload", NULL),
        transaction_id=text_of(fields, "transactionId"),
        trace_id=text_of(fields, "traceId"),
    )


def finish_items(items: Sequence[PushItem], *, newlines: bool) -> None:
    """Check names, turn ``""`` into absent, bring trace ids into their one form, take newlines out of payloads."""
    for name in {item.queue for item in items}:
        check_name(name, "queue")
    for name in {item.partition for item in items}:
        check_name(name, "partition")
    for item in items:
        if item.transaction_id == "":
            item.transaction_id = None
        if item.trace_id is not None:
            item.trace_id = _read_trace_id(item.trace_id)
        if newlines:
            # Only whitespace between tokens can hold a raw newline; a stored envelope ends at the first one.
            item.raw = msgspec.Raw(msgspec.json.format(bytes(item.raw), indent=-1))


def _read_trace_id(text: str) -> str | None:
    if not text:
        return None
    if _CANONICAL_UUID(text):
        return text
    try:
        return str(UUID(text))
    except ValueError:
        raise InvalidRequest("TraceId must be a UUID") from None


class Pushed(TypedDict):
    """What became of a message: stored, or there already, or in the spool: then it has no ids yet."""

    index: int
    transaction_id: NotRequired[str]
    status: Literal["queued", "duplicate", "buffered"]
    message_id: NotRequired[UuidText]
    trace_id: UuidText | None
    transactionId: NotRequired[str]
    messageId: NotRequired[UuidText]
    partition_id: NotRequired[UuidText]
    partitionId: NotRequired[UuidText]
    queueName: str
    queue: str
    partition: str


class Failed(TypedDict):
    """A message that was to go to the spool and could not: it is kept nowhere. ``error``: why, for people."""

    index: int
    status: Literal["failed"]
    error: str
    code: str
    transaction_id: str | None
    transactionId: str | None
    queueName: str
    queue: str
    partition: str


def write_push(messages: Sequence[NewMessage], results: Sequence[PushResult]) -> bytes:
    """The answer to a push: one element for each message, in order; at least one."""
    encode = text_encoder([result.transaction_id for result in results])
    tails: dict[str, str] = {}
    pieces = ["["]
    for index, (message, result) in enumerate(zip(messages, results, strict=True)):
        transaction_id, message_id, partition_id = result.transaction_id, result.message_id, result.partition_id
        if encode is not str:
            transaction_id = encode(transaction_id)
        status, trace_id = "queued", "null"
        if result.duplicate:
            status = "duplicate"  # and the trace id of the stored message is not known here
        elif message.trace_id is not None:
            trace_id = f'"{message.trace_id}"'
        tail = tails.get(partition_id)
        if tail is None:
            tail = tails[partition_id] = _tail(message.queue, message.partition, partition_id)
        pieces.append(
            f'{{"index":{index},"transaction_id":"{transaction_id}","status":"{status}","message_id":"{message_id}",'
            f'"trace_id":{trace_id},"transactionId":"{transaction_id}","messageId":"{message_id}"'
        )
        pieces.append(tail)
    pieces[-1] = pieces[-1][:-1] + "]"
    return join_text(pieces)


def refused_results(messages: Sequence[NewMessage], error: QueueFull) -> list[dict[str, object]]:
    """What became of the items of a push that found no room: nothing, of those that would have had room neither."""
    return [
        _failed(index, message, error.code if message.queue in error.queues else "not_stored")
        for index, message in enumerate(messages)
    ]


def write_failed(messages: Sequence[NewMessage], error: QueenError) -> bytes:
    """The answer to a push that should have gone to the spool and could not: nothing of it is kept anywhere."""
    return msgspec.json.encode(
        [_failed(index, message, error.detail) | {"code": error.code} for index, message in enumerate(messages)]
    )


def _failed(index: int, message: NewMessage, error: str) -> dict[str, object]:
    return {
        "index": index,
        "transaction_id": message.transaction_id,
        "status": "failed",
        "error": error,
        "transactionId": message.transaction_id,
        "queueName": message.queue,
        "queue": message.queue,
        "partition": message.partition,
    }


def write_buffered(messages: Sequence[NewMessage], buffered: Buffered) -> bytes:
    """The answer to a push that went to the spool: there is no message id yet, and perhaps no transaction id."""
    results: list[Pushed] = []
    for index, (message, transaction_id) in enumerate(zip(messages, buffered.transaction_ids, strict=True)):
        result: Pushed = {
            "index": index,
            "status": "buffered",
            "trace_id": message.trace_id,
            "queueName": message.queue,
            "queue": message.queue,
            "partition": message.partition,
        }
        if transaction_id is not None:
            result["transaction_id"] = result["transactionId"] = transaction_id
        results.append(result)
    return msgspec.json.encode(results)


def _tail(queue: str, partition: str, partition_id: str) -> str:
    """The end of a push result, which all results of one partition share, and the comma after it."""
    queue, partition = encode_text(queue), encode_text(partition)
    return (
        f',"partition_id":"{partition_id}","partitionId":"{partition_id}",'
        f'"queueName":{queue},"queue":{queue},"partition":{partition}}},'
    )
