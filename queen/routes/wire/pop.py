"""Pop: the parameters of a request, and the answer as it is read from segments."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import AsyncExitStack
from typing import Annotated, Final, TypedDict

import msgspec
from msgspec import Meta, field

from queen.config.settings import Settings
from queen.errors import InvalidRequest
from queen.model.message import Batch, PopRequest, SegmentSlice
from queen.model.queue import QUEUE_MODE, StartFrom, StartMode
from queen.routes.wire.body import (
    INT32_MAX,
    Json,
    Name,
    TimeText,
    UuidText,
    check_name,
    encode_text,
    format_time,
)
from queen.routes.wire.query import read_query, read_time
from queen.streaming.delivery import Part

AUTOPILOT_BATCH: Final = 200
"""Batch of a pop that leaves it to the server with ``autopilot=true`` (contract/v2-additions.md §10)."""

SPLICE_BYTES: Final = 16 * 1024
"""Stored bytes made into answer bytes at a time: with what is added to each message, about one chunk of 64 KiB."""


Many = Annotated[int, Meta(ge=1, le=INT32_MAX)]


class PopQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of a pop, whatever it pops from."""

    batch: Annotated[Many | None, Meta(description="Most messages of the answer. Default 1.")] = None
    wait: Annotated[bool, Meta(description="Wait for a message, up to timeout.")] = False
    timeout: Annotated[
        Annotated[int, Meta(ge=0, le=INT32_MAX)] | None, Meta(description="Milliseconds. Default 30000.")
    ] = None
    group: Annotated[Name, Meta(description="Whose position; empty: that of all who name none.")] = field(
        name="consumerGroup", default=""
    )
    group_too: Annotated[Name, Meta(description="The same by another name.")] = field(name="consumer_group", default="")
    auto_ack: Annotated[bool, Meta(description="What is handed out is consumed: no lease.")] = field(
        name="autoAck", default=False
    )
    start_mode: Annotated[
        str, Meta(description="Where a group begins that is new: all, new, or a time.", examples=["new"])
    ] = field(name="subscriptionMode", default="")
    start_from: Annotated[str, Meta(description="The same: now, or a time.", examples=["now"])] = field(
        name="subscriptionFrom", default=""
    )
    autopilot: Annotated[bool, Meta(description="What batch leaves open is for the server to choose.")] = False


class QueuePopQuery(PopQuery, frozen=True, kw_only=True):
    """Parameters of a pop from any partition of a queue."""

    partitions: Annotated[Many, Meta(description="Most partitions to take from.")] = 1


class LabelPopQuery(QueuePopQuery, frozen=True, kw_only=True):
    """Parameters of a pop from any queue with a namespace, a task, or both; one of them must be there."""

    namespace: Name = ""
    task: Name = ""


def pop_query_of(queue: str | None, partition: str | None) -> type[PopQuery]:
    """What can be asked for, by what the path names already."""
    if queue is None:
        return LabelPopQuery
    return QueuePopQuery if partition is None else PopQuery


def read_pop(parameters: Mapping[str, str], query: Mapping[str, str], settings: Settings) -> PopRequest:
    """A pop, from the path and the query.

    Raises:
        InvalidRequest: a name that cannot be, or nothing said about where to pop from.
    """
    queue, partition = parameters.get("queue"), parameters.get("partition")
    asked = read_query(query, pop_query_of(queue, partition))
    namespace = task = None
    if isinstance(asked, LabelPopQuery):
        namespace, task = asked.namespace or None, asked.task or None
        if namespace is None and task is None:
            raise InvalidRequest("namespace or task is required")
    group = asked.group or asked.group_too or QUEUE_MODE
    for name, what in (
        (queue, "queue"),
        (partition, "partition"),
        (namespace, "namespace"),
        (task, "task"),
        (group, "consumerGroup"),
    ):
        if name is not None:
            check_name(name, what)
    timeout_seconds: float | None = None
    if asked.wait:
        timeout_seconds = settings.default_timeout_seconds if asked.timeout is None else asked.timeout / 1000
        if settings.max_timeout_seconds is not None:
            timeout_seconds = min(timeout_seconds, settings.max_timeout_seconds)
    default_batch = AUTOPILOT_BATCH if asked.autopilot else settings.default_batch
    return PopRequest(
        queue=queue,
        partition=partition,
        namespace=namespace,
        task=task,
        group=group,
        batch=max(1, default_batch) if asked.batch is None else asked.batch,
        partitions=asked.partitions if isinstance(asked, QueuePopQuery) else 1,
        auto_ack=asked.auto_ack,
        timeout_seconds=timeout_seconds if timeout_seconds is not None and timeout_seconds > 0 else None,
        start=_read_start(asked, settings.default_subscription_mode),
    )


def _read_start(asked: PopQuery, default_mode: str) -> StartFrom:
    start = asked.start_from
    if start == "now":
        return StartFrom(StartMode.NEW)
    mode = asked.start_mode or default_mode
    at = read_time(start) or read_time(mode)
    if at is not None:
        return StartFrom(StartMode.FROM, at)
    return StartFrom(StartMode.NEW if mode in ("new", "new-only") else StartMode.ALL)


class PoppedMessage(TypedDict):
    """A message as a consumer gets it."""

    id: UuidText
    transactionId: str
    traceId: UuidText | None
    producerSub: str | None
    data: Json
    createdAt: TimeText
    queue: str
    partition: str
    partitionId: UuidText
    leaseId: str
    consumerGroup: str
    retryCount: int
    deliveryAttempt: int


class Popped(TypedDict):
    """Messages under a lease, or for good: then ``leaseId`` is empty. The names are those of the first partition."""

    success: bool
    queue: str
    partition: str
    partitionId: UuidText
    leaseId: str
    consumerGroup: str
    partitionsClaimed: int
    messages: list[PoppedMessage]


async def write_batch(batch: Batch) -> AsyncGenerator[Part]:
    """The answer to a pop, piece by piece as the batch is read: the envelope, the messages, the end."""
    first = batch.claims[0]
    lease_id = "" if batch.lease_id is None else str(batch.lease_id)
    group = encode_text(batch.group)
    yield Part(
        f'{{"success":true,"queue":{encode_text(first.queue)},"partition":{encode_text(first.partition)},'
        f'"partitionId":"{first.partition_id}","leaseId":"{lease_id}","consumerGroup":{group},'
        f'"partitionsClaimed":{len(batch.claims)},"messages":['.encode(),
        0,
    )
    separator = b""
    slices = batch.slices()
    async with AsyncExitStack() as stack:
        if isinstance(slices, AsyncGenerator):
            stack.push_async_callback(slices.aclose)
        async for piece in slices:
            for part in splice(piece, lease_id, group):
                yield Part(separator + part.data, part.messages)
                separator = b","
    yield Part(b"]}", 0)


def splice(piece: SegmentSlice, lease_id: str, group: str) -> Iterator[Part]:
    """The messages of a slice as JSON objects joined by commas, without reading them.

    A stored line lacks what all messages of its segment share; one ``replace`` of the line ends puts that between
    any two of them.
    """
    claim = piece.claim
    prefix = piece.id_prefix.encode()
    head = b'{"id":"' + prefix
    tail = (
        f',"createdAt":"{format_time(piece.created_at)}","queue":{encode_text(claim.queue)},'
        f'"partition":{encode_text(claim.partition)},"partitionId":"{claim.partition_id}","leaseId":"{lease_id}",'
        f'"consumerGroup":{group},"retryCount":{claim.retry_count},"deliveryAttempt":{claim.attempt}}}'
    ).encode()
    between = tail + b"," + head
    lines = piece.lines
    start = 0
    while start < len(lines):
        end = len(lines) if len(lines) - start <= SPLICE_BYTES else lines.find(b"\n", start + SPLICE_BYTES)
        if end < 0:
            end = len(lines)
        block = lines[start:end]
        start = end + 1
        if piece.minted:
            block = block.replace(b"\0", prefix)
        yield Part(head + block.replace(b"\n", between) + tail, block.count(b"\n") + 1)
