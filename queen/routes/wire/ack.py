"""Acknowledgements, single and many, and what became of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Final, TypedDict

import msgspec
from msgspec import Meta

from queen.errors import InvalidRequest
from queen.model.message import Ack, AckResult, AckStatus
from queen.model.queue import QUEUE_MODE
from queen.routes.wire.body import (
    Name,
    Text,
    body_fields,
    check_name,
    decode_body,
    fields_of,
    is_text,
    join_text,
    objects_of,
    text_encoder,
    text_of,
    text_or_null,
)


class AckBody(msgspec.Struct, gc=False):
    """What became of one message."""

    transaction_id: Text = msgspec.field(name="transactionId")
    partition_id: Text = msgspec.field(name="partitionId")
    status: Annotated[
        str | None, Meta(description="completed, success, failed, dlq or retry; completed by default.")
    ] = None
    error: Annotated[str | None, Meta(description="Why; kept with a dead letter.")] = None
    lease_id: Annotated[str | None, Meta(description="Absent or empty: the lease is not checked.")] = msgspec.field(
        name="leaseId", default=None
    )
    group: Name | None = msgspec.field(name="consumerGroup", default=None)


class BatchedAck(msgspec.Struct, gc=False):
    """What became of one message of several."""

    transaction_id: Text = msgspec.field(name="transactionId")
    partition_id: Text = msgspec.field(name="partitionId")
    status: str | None = None
    error: str | None = None
    lease_id: str | None = msgspec.field(name="leaseId", default=None)


class AckBatchBody(msgspec.Struct):
    """What became of several messages; the group is that of all of them."""

    acknowledgments: list[BatchedAck]
    group: Name | None = msgspec.field(name="consumerGroup", default=None)


class _AckSentences(msgspec.Struct, frozen=True):
    transaction_id: str
    partition_id: str


_ACK: Final = msgspec.json.Decoder(AckBody)
_ACK_BATCH: Final = msgspec.json.Decoder(AckBatchBody)

_STATUSES: Final[dict[str | None, AckStatus]] = {
    None: AckStatus.COMPLETED,
    "success": AckStatus.COMPLETED,
    **{status.value: status for status in AckStatus},
}

SINGLE_ACK: Final = _AckSentences("transactionId is required", "partitionId is required to ensure message uniqueness")
_BATCH_ACK: Final = _AckSentences(
    "Each acknowledgment must have a valid transactionId string",
    "Each acknowledgment must have a valid partitionId string to ensure message uniqueness",
)


def read_ack(body: bytes) -> Ack:
    """One acknowledgement. Raises InvalidRequest."""
    item = decode_body(body, _ACK, lambda body: read_loose_ack(body_fields(body), SINGLE_ACK))
    return to_ack(item, item.group, SINGLE_ACK)


def read_ack_batch(body: bytes) -> list[Ack]:
    """The acknowledgements of one request; the group stands beside them and holds for all. Raises InvalidRequest."""
    request = decode_body(body, _ACK_BATCH, _read_loose_ack_batch)
    return [to_ack(item, request.group, _BATCH_ACK) for item in request.acknowledgments]


def _read_loose_ack_batch(body: bytes) -> AckBatchBody:
    fields = body_fields(body)
    elements = objects_of(
        fields.get("acknowledgments"), "acknowledgments array is required", "Each acknowledgment must be an object"
    )
    return AckBatchBody([_read_loose_item(fields_of(element), _BATCH_ACK) for element in elements], _group_text(fields))


def read_loose_ack(fields: Mapping[str, msgspec.Raw], sentences: _AckSentences) -> AckBody:
    """One acknowledgement whose status may be anything (then it means the default), or that is wrong."""
    item = _read_loose_item(fields, sentences)
    return AckBody(item.transaction_id, item.partition_id, item.status, item.error, item.lease_id, _group_text(fields))


def _read_loose_item(fields: Mapping[str, msgspec.Raw], sentences: _AckSentences) -> BatchedAck:
    if not is_text(fields.get("transactionId")):
        raise InvalidRequest(sentences.transaction_id)
    if not is_text(fields.get("partitionId")):
        raise InvalidRequest(sentences.partition_id)
    for name in ("error", "leaseId"):
        if not is_text(fields.get(name), or_null=True):
            raise InvalidRequest(f"{name} must be a string")
    return BatchedAck(
        text_of(fields, "transactionId") or "",
        text_of(fields, "partitionId") or "",
        text_of(fields, "status") if is_text(fields.get("status")) else None,
        text_of(fields, "error"),
        text_of(fields, "leaseId"),
    )


def _group_text(fields: Mapping[str, msgspec.Raw]) -> str | None:
    if not is_text(fields.get("consumerGroup"), or_null=True):
        raise InvalidRequest("consumerGroup must be a string")
    return text_of(fields, "consumerGroup")


def to_ack(item: AckBody | BatchedAck, group: str | None, sentences: _AckSentences) -> Ack:
    if not item.transaction_id:
        raise InvalidRequest(sentences.transaction_id)
    if not item.partition_id:
        raise InvalidRequest(sentences.partition_id)
    return Ack(
        transaction_id=item.transaction_id,
        partition_id=item.partition_id,
        status=_STATUSES.get(item.status),
        group=check_name(group, "consumerGroup") if group else QUEUE_MODE,
        lease_id=item.lease_id or None,
        # PostgreSQL holds no NUL; refusing the ack for its error text would cost the consumer its retry.
        error=item.error.replace("\0", "\N{REPLACEMENT CHARACTER}") if item.error else None,
    )


class Acked(TypedDict):
    """Whether an acknowledgement was accepted, or why not."""

    index: int
    transactionId: str
    success: bool
    error: str | None
    queueName: str | None
    partitionName: str | None
    leaseReleased: bool
    dlq: bool


def write_acks(results: Sequence[AckResult]) -> bytes:
    """The answer to one acknowledgement or many, at least one: always an array."""
    encode = text_encoder([result.transaction_id for result in results])
    lanes: dict[tuple[str | None, str | None], str] = {}
    pieces = []
    for index, result in enumerate(results):
        lane = (result.queue, result.partition)
        names = lanes.get(lane)
        if names is None:
            queue, partition = text_or_null(result.queue), text_or_null(result.partition)
            names = lanes[lane] = f'"queueName":{queue},"partitionName":{partition}'
        pieces.append(
            f'{"[" if index == 0 else ","}{{"index":{index},"transactionId":"{encode(result.transaction_id)}",'
            f'"success":{"true" if result.success else "false"},"error":{text_or_null(result.error)},{names},'
            f'"leaseReleased":{"true" if result.lease_released else "false"},'
            f'"dlq":{"true" if result.dead_lettered else "false"}}}'
        )
    pieces.append("]")
    return join_text(pieces)
