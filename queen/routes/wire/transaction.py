"""Transactions: pushes and acks in one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal, NotRequired, TypedDict
from uuid import uuid4

import msgspec
from msgspec import Meta

from queen.errors import InvalidRequest, RouteNotFound
from queen.model.message import Ack, AckResult, NewMessage, TransactionResult
from queen.routes.wire.ack import SINGLE_ACK, AckBody, read_loose_ack, to_ack
from queen.routes.wire.body import (
    Json,
    UuidText,
    body_fields,
    decode_body,
    encode_text,
    fields_of,
    is_null,
    is_text,
    objects_of,
    text_of,
)
from queen.routes.wire.push import PUSH, PushItem, finish_items, read_loose_item, read_loose_push


class PushOperation(msgspec.Struct, tag_field="type", tag="push", gc=False):
    """Messages to store. (One message without ``items`` around it is read too.)"""

    items: list[PushItem]


class AckOperation(AckBody, tag_field="type", tag="ack", gc=False):
    """What became of one message. ``failed`` is ``dlq`` here."""


Rider = Annotated[list[Json], Meta(max_length=0, description="Not served here: empty, or the whole is refused.")]


class TransactionBody(msgspec.Struct):
    """Pushes and acknowledgements, all of them or none."""

    operations: Annotated[list[PushOperation | AckOperation], Meta(min_length=1)]
    required_leases: list[str] | None = msgspec.field(name="requiredLeases", default=None)
    kv: Rider | None = None
    timers: Rider | None = None


_TRANSACTION: Final = msgspec.json.Decoder(TransactionBody)


class Transaction(msgspec.Struct, frozen=True):
    """A transaction as asked for. ``unknown`` is the first operation type that does not exist, if any."""

    operations: list[list[PushItem] | Ack]
    required_leases: list[str]
    unknown: str | None = None


def read_transaction(body: bytes) -> Transaction:
    """The operations of a transaction, in order.

    Raises:
        InvalidRequest: with the contract's sentence.
        RouteNotFound: it carries kv or timer operations, which this server does not have; leaving them out would
            break the promise of all or nothing.
    """
    asked = decode_body(body, _TRANSACTION, _read_loose_transaction)
    if isinstance(asked, Transaction):
        return asked
    newlines = b"\n" in body
    operations: list[list[PushItem] | Ack] = []
    for operation in asked.operations:
        if isinstance(operation, AckOperation):
            operations.append(to_ack(operation, operation.group, SINGLE_ACK))
        else:
            finish_items(operation.items, newlines=newlines)
            operations.append(operation.items)
    return Transaction(operations, asked.required_leases or [])


def _read_loose_transaction(body: bytes) -> Transaction:
    """A transaction with an operation of another shape, or that is wrong."""
    fields = body_fields(body)
    for rider in ("kv", "timers"):
        if not is_null(fields.get(rider)) and fields[rider] != msgspec.Raw(b"[]"):
            raise RouteNotFound("no_such_route")
    newlines = b"\n" in body
    elements = objects_of(fields.get("operations"), "operations array required", "Each operation must be a JSON object")
    if not elements:
        raise InvalidRequest("operations array cannot be empty")
    leases = _read_required_leases(fields.get("requiredLeases"))
    operations: list[list[PushItem] | Ack] = []
    for element in elements:
        operation = fields_of(element)
        if not is_text(operation.get("type")):
            raise InvalidRequest("Each operation must have a type string")
        kind = text_of(operation, "type") or ""
        if kind == "push":
            operations.append(_read_push_operation(element, operation, newlines=newlines))
        elif kind == "ack":
            item = read_loose_ack(operation, SINGLE_ACK)
            operations.append(to_ack(item, item.group, SINGLE_ACK))
        else:
            return Transaction(operations, leases, unknown=kind)
    return Transaction(operations, leases)


def _read_required_leases(raw: msgspec.Raw | None) -> list[str]:
    if raw is None or is_null(raw):
        return []
    try:
        return msgspec.json.decode(raw, type=list[str])
    except msgspec.ValidationError:
        raise InvalidRequest("requiredLeases must be an array of strings") from None


def _read_push_operation(
    element: msgspec.Raw, operation: Mapping[str, msgspec.Raw], *, newlines: bool
) -> list[PushItem]:
    if "items" in operation:
        try:
            items = PUSH.decode(element).items
        except msgspec.ValidationError:
            items = read_loose_push(bytes(element)).items
    else:
        items = [read_loose_item(operation)]
    finish_items(items, newlines=newlines)
    return items


class PushedOperation(msgspec.Struct, tag_field="type", tag="push"):
    """A message was stored, or is there already."""

    index: int
    success: bool
    status: Literal["queued", "duplicate"]
    transaction_id: str = msgspec.field(name="transactionId")
    message_id: UuidText = msgspec.field(name="messageId")
    partition_id: UuidText = msgspec.field(name="partitionId")
    queue: str = msgspec.field(name="queueName")


class AckedOperation(msgspec.Struct, tag_field="type", tag="ack"):
    """A message was acknowledged."""

    index: int
    success: bool
    transaction_id: str = msgspec.field(name="transactionId")
    error: None
    dead_lettered: bool = msgspec.field(name="dlq")


class TransactionAnswer(TypedDict):
    """What became of every message and every acknowledgement, or why nothing was done."""

    transactionId: UuidText
    success: bool
    results: list[PushedOperation | AckedOperation]
    error: NotRequired[str]


def write_transaction(operations: Sequence[Sequence[NewMessage] | Ack], outcome: TransactionResult) -> bytes:
    """The answer to a transaction: each pushed message and each ack in operation order, or the error and nothing."""
    if outcome.error is not None:
        return write_refused_transaction(outcome.transaction_id, outcome.error)
    queues: list[str] = []
    for operation in operations:
        queues.extend(("",) if isinstance(operation, Ack) else [message.queue for message in operation])
    elements = []
    for index, (queue, result) in enumerate(zip(queues, outcome.results, strict=True)):
        if isinstance(result, AckResult):
            elements.append(
                f'{{"index":{index},"type":"ack","success":true,"transactionId":{encode_text(result.transaction_id)},'
                f'"error":null,"dlq":{"true" if result.dead_lettered else "false"}}}'
            )
        else:
            elements.append(
                f'{{"index":{index},"type":"push","success":true,'
                f'"status":"{"duplicate" if result.duplicate else "queued"}",'
                f'"transactionId":{encode_text(result.transaction_id)},"messageId":"{result.message_id}",'
                f'"partitionId":"{result.partition_id}","queueName":{encode_text(queue)}}}'
            )
    body = ",".join(elements)
    return (f'{{"transactionId":{encode_text(outcome.transaction_id)},"success":true,"results":[{body}]}}').encode()


def write_refused_transaction(transaction_id: str | None, error: str) -> bytes:
    """The answer to a transaction of which nothing was applied."""
    return msgspec.json.encode(
        TransactionAnswer(
            {"transactionId": transaction_id or str(uuid4()), "success": False, "results": [], "error": error}
        )
    )
