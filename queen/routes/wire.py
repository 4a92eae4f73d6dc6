"""JSON on the wire ↔ the model: the only file that knows camelCase and the sentences of the contract's refusals.

Requests are decoded once, typed, with each payload left as the bytes it came in. Where that fails, a second and slower
reading finds out which sentence applies; it never builds a payload either. Answers are formatted, not encoded: what
the messages of an answer share is made once. No engine call and no status code lives here.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any, Final, TypeVar
from uuid import UUID, uuid4

import msgspec

from queen.config.settings import Settings
from queen.errors import InvalidRequest, RouteNotFound
from queen.model.message import (
    Ack,
    AckResult,
    AckStatus,
    Batch,
    LeaseExtension,
    NewMessage,
    PopRequest,
    PushResult,
    SegmentSlice,
    TransactionResult,
)
from queen.model.queue import DEFAULT_PARTITION, MAX_NAME_LENGTH, QUEUE_MODE, Queue, QueueOptions, StartFrom, StartMode
from queen.streaming.delivery import Part

T = TypeVar("T")

INT32_MAX: Final = 2**31 - 1
INT32_MIN: Final = -(2**31)

NULL: Final = msgspec.Raw(b"null")

AUTOPILOT_BATCH: Final = 200
"""Batch of a pop that leaves it to the server with ``autopilot=true`` (contract/v2-additions.md §10)."""

SPLICE_BYTES: Final = 16 * 1024
"""Stored bytes made into answer bytes at a time: with what is added to each message, about one chunk of 64 KiB."""


def encode_text(text: str) -> str:
    """``text`` as a JSON string, quotes included."""
    return msgspec.json.encode(text).decode()


def check_name(name: str, what: str) -> str:
    """Refuse a name that PostgreSQL cannot hold. Returns it."""
    if len(name) > MAX_NAME_LENGTH:
        raise InvalidRequest(f"{what} must be at most {MAX_NAME_LENGTH} characters long, not {len(name)}")
    if "\0" in name:
        raise InvalidRequest(f"{what} must not contain the NUL character")
    return name


def format_time(moment: datetime) -> str:
    """RFC 3339 in UTC with six fraction digits: ``ts6`` of the contract."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


# Reading bodies


def _check_utf8(body: bytes) -> None:
    """msgspec checks the strings it builds; a payload that stays raw is checked here, once for the whole body."""
    if body.isascii():
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    view = memoryview(body)
    try:
        for start in range(0, len(body), 1024 * 1024):  # piece by piece: decoded whole, 100 MB take up to 400 MB
            decoder.decode(view[start : start + 1024 * 1024])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"Invalid JSON: the body is not UTF-8 ({error.reason})") from None


def _decode(body: bytes, decoder: msgspec.json.Decoder[T], otherwise: Callable[[bytes], T]) -> T:
    """Decode a body; where it is JSON but of another shape, ``otherwise`` has the last word on it."""
    if not body:
        raise InvalidRequest("Empty request body")
    _check_utf8(body)
    try:
        try:
            return decoder.decode(body)
        except msgspec.ValidationError:
            return otherwise(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"Invalid JSON: {error}") from None


_RAW_OBJECT: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_RAW_ARRAY: Final = msgspec.json.Decoder(list[msgspec.Raw])


def _is(raw: msgspec.Raw | None, opening: bytes) -> bool:
    """True when ``raw`` is a JSON value that begins so: ``"`` for a string, ``[`` or ``{``."""
    return raw is not None and memoryview(raw)[:1] == opening


def _is_null(raw: msgspec.Raw | None) -> bool:
    return raw is None or memoryview(raw) == b"null"


def _is_text(raw: msgspec.Raw | None, *, or_null: bool = False) -> bool:
    return _is(raw, b'"') or (or_null and _is_null(raw))


_TEXT: Final = msgspec.json.Decoder(str)


def _text(fields: Mapping[str, msgspec.Raw], name: str) -> str | None:
    """A member known to be a string, or null, or absent."""
    raw = fields.get(name)
    return None if raw is None or _is_null(raw) else _TEXT.decode(raw)


def _fields(raw: bytes | msgspec.Raw) -> dict[str, msgspec.Raw]:
    """The members of a JSON object, unread. Raises msgspec.ValidationError when it is something else."""
    return _RAW_OBJECT.decode(raw)


def _body_fields(body: bytes) -> dict[str, msgspec.Raw]:
    try:
        return _fields(body)
    except msgspec.ValidationError:
        raise InvalidRequest("Request body must be a JSON object") from None


def _objects(raw: msgspec.Raw | None, when_no_array: str, when_no_object: str) -> list[msgspec.Raw]:
    """The elements of an array of objects, unread."""
    if raw is None or not _is(raw, b"["):
        raise InvalidRequest(when_no_array)
    elements = _RAW_ARRAY.decode(raw)
    if not all(_is(element, b"{") for element in elements):
        raise InvalidRequest(when_no_object)
    return elements


# Push


class PushItem(msgspec.Struct, gc=False):
    """One message of a push body; it is a NewMessage as it stands."""

    queue: str
    partition: str = DEFAULT_PARTITION
    raw: msgspec.Raw = msgspec.field(name="payload", default=NULL)
    transaction_id: str | None = msgspec.field(name="transactionId", default=None)
    trace_id: str | None = msgspec.field(name="traceId", default=None)

    @property
    def payload(self) -> bytes:
        return bytes(self.raw)


class _PushBody(msgspec.Struct):
    items: list[PushItem]


_PUSH: Final = msgspec.json.Decoder(_PushBody)

_CANONICAL_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}").fullmatch


def read_push(body: bytes) -> list[PushItem]:
    """The messages of a push request, checked.

    Raises:
        InvalidRequest: with the contract's sentence; nothing of the request may be applied.
    """
    items = _decode(body, _PUSH, _read_loose_push).items
    _finish_items(items, newlines=b"\n" in body)
    return items


def _read_loose_push(body: bytes) -> _PushBody:
    elements = _objects(_body_fields(body).get("items"), "items array is required", "Each item must be a JSON object")
    return _PushBody([_read_loose_item(_fields(element)) for element in elements])


def _read_loose_item(fields: Mapping[str, msgspec.Raw]) -> PushItem:
    """One item that may have nulls where a default stands, or be wrong."""
    if not _is_text(fields.get("queue")):
        raise InvalidRequest("Queue must be a string")
    for name, sentence in (
        ("partition", "Partition must be a string"),
        ("transactionId", "TransactionId must be a string"),
        ("traceId", "TraceId must be a string"),
    ):
        if not _is_text(fields.get(name), or_null=True):
            raise InvalidRequest(sentence)
    return PushItem(
        queue=_text(fields, "queue") or "",
        partition=DEFAULT_PARTITION if (partition := _text(fields, "partition")) is None else partition,
        raw=fields.get("payload", NULL),
        transaction_id=_text(fields, "transactionId"),
        trace_id=_text(fields, "traceId"),
    )


def _finish_items(items: Sequence[PushItem], *, newlines: bool) -> None:
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


_NEEDS_ESCAPE: Final = re.compile(r"[^ !#-\[\]-~]").search
"""Finds what does not stand for itself inside a JSON string of ASCII text."""


def _text_encoder(texts: Sequence[str]) -> Callable[[str], str]:
    """How to put these texts between quotes: as they are if none needs escaping, which one search tells."""
    if _NEEDS_ESCAPE("".join(texts)) is None:
        return str
    return lambda text: encode_text(text)[1:-1]


def write_push(messages: Sequence[NewMessage], results: Sequence[PushResult]) -> bytes:
    """The answer to a push: one element for each message, in order."""
    encode = _text_encoder([result.transaction_id for result in results])
    tails: dict[tuple[str, str, str], str] = {}
    elements = []
    for index, (message, result) in enumerate(zip(messages, results, strict=True)):
        transaction_id, message_id, partition_id, duplicate = result
        lane = (message.queue, message.partition, partition_id)
        tail = tails.get(lane)
        if tail is None:
            tail = tails[lane] = _lane(*lane)
        if encode is not str:
            transaction_id = encode(transaction_id)
        if duplicate:
            status, trace_id = "duplicate", "null"  # of the stored message it is not known here
        else:
            status, trace_id = "queued", "null" if message.trace_id is None else f'"{message.trace_id}"'
        elements.append(
            f'{{"index":{index},"transaction_id":"{transaction_id}","status":"{status}","message_id":"{message_id}",'
            f'"trace_id":{trace_id},"transactionId":"{transaction_id}","messageId":"{message_id}"{tail}'
        )
    body = ",".join(elements)
    return f"[{body}]".encode()


def _lane(queue: str, partition: str, partition_id: str) -> str:
    """The end of a push result, which all results of one partition share."""
    queue, partition = encode_text(queue), encode_text(partition)
    return (
        f',"partition_id":"{partition_id}","partitionId":"{partition_id}",'
        f'"queueName":{queue},"queue":{queue},"partition":{partition}}}'
    )


# Pop

_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,18}").fullmatch
_SPACE_FOR_PLUS: Final = re.compile(r"(?:(?<=:[0-9]{2})|(?<=[0-9]{3})) (?=[0-9]{2}:?[0-9]{2}$)")
"""Where an unescaped "+02:00" at the end of a time has arrived as " 02:00"."""


def read_boolean(query: Mapping[str, str], name: str) -> bool:
    return query.get(name) in ("true", "1")


def read_integer(query: Mapping[str, str], name: str, default: int) -> int:
    """An integer kept within 32 bits; anything that is none means the default."""
    text = query.get(name, "").strip()
    return max(INT32_MIN, min(int(text), INT32_MAX)) if _INTEGER(text) else default


def read_pop(parameters: Mapping[str, str], query: Mapping[str, str], settings: Settings) -> PopRequest:
    """A pop, from the path and the query.

    Raises:
        InvalidRequest: a name that cannot be, or nothing said about where to pop from.
    """
    queue, partition = parameters.get("queue"), parameters.get("partition")
    namespace, task = query.get("namespace") or None, query.get("task") or None
    if queue is None and namespace is None and task is None:
        raise InvalidRequest("namespace or task is required")
    group = query.get("consumerGroup") or query.get("consumer_group") or QUEUE_MODE
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
    if read_boolean(query, "wait"):
        timeout_seconds = read_integer(query, "timeout", round(settings.default_timeout_seconds * 1000)) / 1000
        if settings.max_timeout_seconds is not None:
            timeout_seconds = min(timeout_seconds, settings.max_timeout_seconds)
    default_batch = AUTOPILOT_BATCH if read_boolean(query, "autopilot") else settings.default_batch
    return PopRequest(
        queue=queue,
        partition=partition,
        namespace=namespace if queue is None else None,
        task=task if queue is None else None,
        group=group,
        batch=max(1, read_integer(query, "batch", default_batch)),
        partitions=1 if partition is not None else max(1, read_integer(query, "partitions", 1)),
        auto_ack=read_boolean(query, "autoAck"),
        timeout_seconds=timeout_seconds if timeout_seconds is not None and timeout_seconds > 0 else None,
        start=_read_start(query, settings.default_subscription_mode),
    )


def _read_start(query: Mapping[str, str], default_mode: str) -> StartFrom:
    start = query.get("subscriptionFrom", "")
    if start == "now":
        return StartFrom(StartMode.NEW)
    mode = query.get("subscriptionMode") or default_mode
    at = _read_time(start) or _read_time(mode)
    if at is not None:
        return StartFrom(StartMode.FROM, at)
    return StartFrom(StartMode.NEW if mode in ("new", "new-only") else StartMode.ALL)


def _read_time(text: str) -> datetime | None:
    """An ISO 8601 time, UTC unless it says otherwise; None for anything else."""
    if not text[:4].isdigit():
        return None
    try:
        moment = datetime.fromisoformat(_SPACE_FOR_PLUS.sub("+", text))
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


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
            for part in _splice(piece, lease_id, group):
                yield Part(separator + part.data, part.messages)
                separator = b","
    yield Part(b"]}", 0)


def _splice(piece: SegmentSlice, lease_id: str, group: str) -> Iterator[Part]:
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


# Ack


class _AckItem(msgspec.Struct, gc=False):
    transaction_id: str = msgspec.field(name="transactionId")
    partition_id: str = msgspec.field(name="partitionId")
    status: str | None = None
    error: str | None = None
    lease_id: str | None = msgspec.field(name="leaseId", default=None)
    group: str | None = msgspec.field(name="consumerGroup", default=None)


class _AckBatch(msgspec.Struct):
    acknowledgments: list[_AckItem]
    group: str | None = msgspec.field(name="consumerGroup", default=None)


class _AckSentences(msgspec.Struct, frozen=True):
    transaction_id: str
    partition_id: str


_ACK: Final = msgspec.json.Decoder(_AckItem)
_ACK_BATCH: Final = msgspec.json.Decoder(_AckBatch)

_STATUSES: Final[dict[str | None, AckStatus]] = {
    None: AckStatus.COMPLETED,
    "success": AckStatus.COMPLETED,
    **{status.value: status for status in AckStatus},
}

_SINGLE_ACK: Final = _AckSentences("transactionId is required", "partitionId is required to ensure message uniqueness")
_BATCH_ACK: Final = _AckSentences(
    "Each acknowledgment must have a valid transactionId string",
    "Each acknowledgment must have a valid partitionId string to ensure message uniqueness",
)


def read_ack(body: bytes) -> Ack:
    """One acknowledgement. Raises InvalidRequest."""
    item = _decode(body, _ACK, lambda body: _read_loose_ack(_body_fields(body), _SINGLE_ACK))
    return _to_ack(item, item.group, _SINGLE_ACK)


def read_ack_batch(body: bytes) -> list[Ack]:
    """The acknowledgements of one request; the group stands beside them and holds for all. Raises InvalidRequest."""
    request = _decode(body, _ACK_BATCH, _read_loose_ack_batch)
    return [_to_ack(item, request.group, _BATCH_ACK) for item in request.acknowledgments]


def _read_loose_ack_batch(body: bytes) -> _AckBatch:
    fields = _body_fields(body)
    elements = _objects(
        fields.get("acknowledgments"), "acknowledgments array is required", "Each acknowledgment must be an object"
    )
    return _AckBatch([_read_loose_ack(_fields(element), _BATCH_ACK) for element in elements], _group_text(fields))


def _read_loose_ack(fields: Mapping[str, msgspec.Raw], sentences: _AckSentences) -> _AckItem:
    """One acknowledgement whose status may be anything (then it means the default), or that is wrong."""
    if not _is_text(fields.get("transactionId")):
        raise InvalidRequest(sentences.transaction_id)
    if not _is_text(fields.get("partitionId")):
        raise InvalidRequest(sentences.partition_id)
    for name in ("error", "leaseId"):
        if not _is_text(fields.get(name), or_null=True):
            raise InvalidRequest(f"{name} must be a string")
    return _AckItem(
        _text(fields, "transactionId") or "",
        _text(fields, "partitionId") or "",
        _text(fields, "status") if _is_text(fields.get("status")) else None,
        _text(fields, "error"),
        _text(fields, "leaseId"),
        _group_text(fields),
    )


def _group_text(fields: Mapping[str, msgspec.Raw]) -> str | None:
    if not _is_text(fields.get("consumerGroup"), or_null=True):
        raise InvalidRequest("consumerGroup must be a string")
    return _text(fields, "consumerGroup")


def _to_ack(item: _AckItem, group: str | None, sentences: _AckSentences) -> Ack:
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


def write_acks(results: Sequence[AckResult]) -> bytes:
    """The answer to one acknowledgement or many: always an array."""
    encode = _text_encoder([result.transaction_id for result in results])
    lanes: dict[tuple[str | None, str | None], str] = {}
    elements = []
    for index, result in enumerate(results):
        lane = (result.queue, result.partition)
        names = lanes.get(lane)
        if names is None:
            names = lanes[lane] = f'"queueName":{_or_null(result.queue)},"partitionName":{_or_null(result.partition)}'
        elements.append(
            f'{{"index":{index},"transactionId":"{encode(result.transaction_id)}",'
            f'"success":{"true" if result.success else "false"},"error":{_or_null(result.error)},{names},'
            f'"leaseReleased":{"true" if result.lease_released else "false"},'
            f'"dlq":{"true" if result.dead_lettered else "false"}}}'
        )
    body = ",".join(elements)
    return f"[{body}]".encode()


def _or_null(text: str | None) -> str:
    return "null" if text is None else encode_text(text)


# Transaction


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
    fields = _decode(body, _RAW_OBJECT, _body_fields)
    for rider in ("kv", "timers"):
        if not _is_null(fields.get(rider)) and fields[rider] != msgspec.Raw(b"[]"):
            raise RouteNotFound("no_such_route")
    newlines = b"\n" in body
    elements = _objects(fields.get("operations"), "operations array required", "Each operation must be a JSON object")
    if not elements:
        raise InvalidRequest("operations array cannot be empty")
    leases = _read_required_leases(fields.get("requiredLeases"))
    operations: list[list[PushItem] | Ack] = []
    for element in elements:
        operation = _fields(element)
        if not _is_text(operation.get("type")):
            raise InvalidRequest("Each operation must have a type string")
        kind = _text(operation, "type") or ""
        if kind == "push":
            operations.append(_read_push_operation(element, operation, newlines=newlines))
        elif kind == "ack":
            item = _read_loose_ack(operation, _SINGLE_ACK)
            operations.append(_to_ack(item, item.group, _SINGLE_ACK))
        else:
            return Transaction(operations, leases, unknown=kind)
    return Transaction(operations, leases)


def _read_required_leases(raw: msgspec.Raw | None) -> list[str]:
    if raw is None or _is_null(raw):
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
            items = _PUSH.decode(element).items
        except msgspec.ValidationError:
            items = _read_loose_push(bytes(element)).items
    else:
        items = [_read_loose_item(operation)]
    _finish_items(items, newlines=newlines)
    return items


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
        {"transactionId": transaction_id or str(uuid4()), "success": False, "results": [], "error": error}
    )


# Leases


def read_extension(body: bytes) -> int:
    """Seconds to extend a lease by; the body may be absent."""
    if not body:
        return 60
    raw = _decode(body, _RAW_OBJECT, _body_fields).get("seconds")
    if _is_null(raw):
        return 60
    seconds = _builtin(raw)
    if type(seconds) is not int or not 1 <= seconds <= INT32_MAX:
        raise InvalidRequest(f"seconds must be an integer from 1 to {INT32_MAX}")
    return seconds


def write_extension(extension: LeaseExtension) -> bytes:
    expires_at = None if extension.expires_at is None else format_time(extension.expires_at)
    answer = {
        "leaseId": extension.lease_id,
        "success": extension.error is None,
        "renewed": extension.renewed,
        "newExpiresAt": expires_at,
        "expiresAt": expires_at,
        "lease_expires_at": expires_at,
    }
    if extension.error is not None:
        answer["error"] = extension.error
    return msgspec.json.encode(answer)


# Queues

_OPTIONS: Final[dict[str, tuple[str, int | None]]] = {
    # wire name → field of QueueOptions and smallest value; None: a boolean
    "leaseTime": ("lease_seconds", 0),
    "retryLimit": ("retry_limit", 0),
    "retryDelay": ("retry_delay_ms", 0),
    "priority": ("priority", INT32_MIN),
    "delayedProcessing": ("delayed_processing_seconds", 0),
    "windowBuffer": ("window_buffer_seconds", 0),
    "maxSize": ("max_size", 0),
    "ttl": ("ttl_seconds", 0),
    "deadLetterQueue": ("dead_letter_queue", None),
    "dlqAfterMaxRetries": ("dlq_after_max_retries", None),
    "retentionEnabled": ("retention_enabled", None),
    "retentionSeconds": ("retention_seconds", 0),
    "completedRetentionSeconds": ("completed_retention_seconds", 0),
    "maxWaitTimeSeconds": ("max_wait_time_seconds", 0),
    "encryptionEnabled": ("encryption_enabled", None),
}


class Configuration(msgspec.Struct, frozen=True):
    """A configure as asked for: all options, with the defaults where it says nothing."""

    queue: str
    namespace: str
    task: str
    options: QueueOptions


def read_configure(body: bytes, defaults: QueueOptions) -> Configuration:
    """Raises InvalidRequest."""
    fields = _decode(body, _RAW_OBJECT, _body_fields)
    if not _is_text(fields.get("queue")):
        raise InvalidRequest("queue is required")
    namespace, task = (_text(fields, name) if _is_text(fields.get(name)) else None for name in ("namespace", "task"))
    return Configuration(
        check_name(_text(fields, "queue") or "", "queue"),
        check_name(namespace or "", "namespace"),
        check_name(task or "", "task"),
        _read_options(fields.get("options"), defaults),
    )


def _read_options(raw: msgspec.Raw | None, defaults: QueueOptions) -> QueueOptions:
    if _is_null(raw):
        return defaults
    if raw is None or not _is(raw, b"{"):
        raise InvalidRequest("options must be an object")
    changes: dict[str, int | bool] = {}
    for name, value in _fields(raw).items():
        if name in _OPTIONS and not _is_null(value):
            field, smallest = _OPTIONS[name]
            changes[field] = _read_option(name, value, smallest)
    return msgspec.structs.replace(defaults, **changes)


def _read_option(name: str, raw: msgspec.Raw, smallest: int | None) -> int | bool:
    value = _builtin(raw)
    if smallest is None:
        if type(value) is not bool:
            raise InvalidRequest(f"option {name} must be true or false")
    elif type(value) is not int or not smallest <= value <= INT32_MAX:
        raise InvalidRequest(f"option {name} must be an integer from {smallest} to {INT32_MAX}")
    return value


def _builtin(raw: msgspec.Raw | None) -> Any:
    """A number or a boolean; None for anything larger, which is not built."""
    if raw is None or memoryview(raw)[:1] in (b"{", b"[", b'"'):
        return None
    return msgspec.json.decode(raw)


def write_configured(queue: Queue, partition_id: UUID) -> bytes:
    return msgspec.json.encode(
        {
            "configured": True,
            "queueId": str(queue.queue_id),
            "partitionId": str(partition_id),
            "queue": queue.name,
            "namespace": queue.namespace,
            "task": queue.task,
            "options": {name: getattr(queue.options, field) for name, (field, _) in _OPTIONS.items()},
        }
    )


def write_deleted(name: str, existed: bool) -> bytes:
    return msgspec.json.encode({"deleted": True, "queue": name, "existed": existed})


# Health


def write_health(connected: bool, worker: int, version: str, uptime_seconds: float) -> bytes:
    return msgspec.json.encode(
        {
            "status": "healthy" if connected else "unhealthy",
            "database": "connected" if connected else "disconnected",
            "server": "running",
            "worker_id": worker,
            "version": version,
            "shared_state": {"enabled": False},
            "queen": {"worker_id": worker, "status": "active"},
            "uptime": f"{uptime_seconds:.0f}s",
        }
    )


def write_liveness() -> bytes:
    return b'{"status":"alive"}'


def write_readiness(connected: bool, draining: bool) -> bytes:
    return msgspec.json.encode(
        {
            "status": "draining" if draining else "ready" if connected else "unready",
            "database": "connected" if connected else "disconnected",
        }
    )
