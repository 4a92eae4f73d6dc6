"""Streams: registrations, cycles, state. Names are in snake case here; what a cycle is refused for is in its answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal, NotRequired, TypedDict, cast
from uuid import UUID

import msgspec
from msgspec import Meta

from queen.errors import InvalidRequest
from queen.model.message import AckStatus
from queen.model.queue import MAX_NAME_LENGTH, QUEUE_MODE
from queen.model.stream import (
    MAX_STATE_KEY_BYTES,
    Cycle,
    CycleAck,
    CycleResult,
    Registration,
    StateChange,
    StateFilter,
    StateRow,
    StreamQuery,
)
from queen.routes.wire.body import (
    NO_NUL,
    Json,
    Name,
    Text,
    TimeText,
    UuidText,
    begins,
    check_name,
    decode_body,
    encode_text,
    fields_of,
    format_time,
    is_null,
    is_text,
    objects_of,
    scalar_of,
    text_of,
    text_or_null,
)
from queen.routes.wire.push import Pushed, PushItem, finish_items, read_loose_item, write_push

_NOT_AN_OBJECT: Final = "request body must be a JSON object"
_EMPTY_OBJECT: Final = msgspec.Raw(b"{}")

_STATUSES: Final = {
    "completed": AckStatus.COMPLETED,
    "success": AckStatus.COMPLETED,
    "failed": AckStatus.FAILED,
    "dlq": AckStatus.DLQ,
}


class _Window(msgspec.Struct, gc=False):
    end: int | float | None = msgspec.field(name="windowEnd", default=None)


_WINDOW: Final = msgspec.json.Decoder(_Window)


ShortText = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_LENGTH, extra_json_schema=NO_NUL)]
StateKey = Annotated[str, Meta(max_length=MAX_STATE_KEY_BYTES, description="At most 2048 bytes.")]


class StreamQueryBody(msgspec.Struct, frozen=True, kw_only=True):
    """A stream query to register. ``reset``: wipe its state if its operators have changed."""

    name: ShortText
    source_queue: ShortText
    config_hash: Annotated[ShortText, Meta(description="Stands for the shape of the operators.")]
    sink_queue: Name | None = None
    reset: bool | None = False


class Upsert(msgspec.Struct, tag_field="type", tag="upsert", gc=False):
    """Remember a value under a key."""

    key: StateKey
    value: Json = msgspec.field(default_factory=lambda: _EMPTY_OBJECT)


class Removal(msgspec.Struct, tag_field="type", tag="delete", gc=False):
    """Forget a key."""

    key: StateKey


CycleStatus = Literal["completed", "success", "failed", "dlq"]


class CycleAckBody(msgspec.Struct, gc=False):
    """The last message of what was processed."""

    transaction_id: Text = msgspec.field(name="transactionId")
    status: CycleStatus | None = None
    lease_id: str | None = msgspec.field(name="leaseId", default=None)
    count: int | None = None
    error: str | None = None


class CycleBody(msgspec.Struct):
    """One step of a stream query: state, messages and acknowledgement, all or nothing."""

    query_id: Annotated[Text, Meta(extra_json_schema={"format": "uuid"})]
    partition_id: Annotated[Text, Meta(extra_json_schema={"format": "uuid"})]
    group: Name | None = msgspec.field(name="consumer_group", default=None)
    state_ops: list[Upsert | Removal] | None = None
    push_items: list[PushItem] | None = None
    ack: CycleAckBody | None = None
    release_lease: bool | None = None


class StateBody(msgspec.Struct, frozen=True, kw_only=True):
    """Which state of a stream query, of one partition of its source."""

    query_id: Annotated[Text, Meta(extra_json_schema={"format": "uuid"})]
    partition_id: Annotated[Text, Meta(extra_json_schema={"format": "uuid"})]
    keys: list[str] | None = None
    key_prefix: str | None = None
    ripe_at_or_before: Annotated[float | None, Meta(description="Milliseconds since 1970.")] = None


_STREAM_QUERY: Final = msgspec.json.Decoder(StreamQueryBody)
_CYCLE: Final = msgspec.json.Decoder(CycleBody)
_CYCLE_ACK: Final = msgspec.json.Decoder(CycleAckBody)
_PUSH_ITEMS: Final = msgspec.json.Decoder(list[PushItem])
_TEXTS: Final = msgspec.json.Decoder(list[str])
_STATE: Final = msgspec.json.Decoder(StateBody)


class CycleRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A cycle as asked for. ``refusal``: why it cannot be applied, if it cannot; then there is no ``cycle``."""

    query_id: str
    partition_id: str
    cycle: Cycle | None = None
    refusal: str | None = None


class StateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Which state is asked for. An id that is None is of nothing that exists."""

    query_id: UUID | None
    partition_id: UUID | None
    wanted: StateFilter


def _check_body(body: bytes) -> None:
    if not body:
        raise InvalidRequest(_NOT_AN_OBJECT)


def _fields(body: bytes) -> dict[str, msgspec.Raw]:
    try:
        return fields_of(body)
    except msgspec.ValidationError:
        raise InvalidRequest(_NOT_AN_OBJECT) from None


def _required(fields: Mapping[str, msgspec.Raw], name: str) -> str:
    text = text_of(fields, name) if is_text(fields.get(name)) else None
    if not text:
        raise InvalidRequest(f"{name} is required")
    return text


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


def read_stream_query(body: bytes) -> StreamQuery:
    """A registration. Raises InvalidRequest."""
    _check_body(body)
    asked = decode_body(body, _STREAM_QUERY, _read_loose_stream_query)
    return StreamQuery(
        name=check_name(asked.name, "name"),
        source_queue=check_name(asked.source_queue, "source_queue"),
        sink_queue=None if asked.sink_queue is None else check_name(asked.sink_queue, "sink_queue"),
        config_hash=check_name(asked.config_hash, "config_hash"),
        reset=asked.reset is True,
    )


def _read_loose_stream_query(body: bytes) -> StreamQueryBody:
    """A registration that is wrong, or long."""
    fields = _fields(body)
    name, source_queue, config_hash = (_required(fields, field) for field in ("name", "source_queue", "config_hash"))
    if not is_text(fields.get("sink_queue"), or_null=True):
        raise InvalidRequest("sink_queue must be a string")
    return StreamQueryBody(
        name=name,
        source_queue=source_queue,
        config_hash=config_hash,
        sink_queue=text_of(fields, "sink_queue"),
        reset=_read_switch(fields, "reset", default=False),
    )


def _read_switch(fields: Mapping[str, msgspec.Raw], name: str, *, default: bool) -> bool:
    value = scalar_of(fields.get(name))
    if isinstance(value, bool):
        return value
    if not is_null(fields.get(name)):
        raise InvalidRequest(f"{name} must be true or false")
    return default


class Registered(TypedDict):
    """A stream query was registered, or found again."""

    success: bool
    query_id: UuidText
    name: str
    config_hash: str
    fresh: bool
    reset: bool


class Mismatched(TypedDict):
    """The operators of a stream query have changed: nothing was done."""

    success: bool
    query_id: UuidText
    name: str
    error: str


def write_registration(query: StreamQuery, query_id: UUID, outcome: Registration) -> bytes:
    if outcome is Registration.MISMATCH:
        error = (
            f"config_hash mismatch: operator chain changed for queryId '{query.name}'. "
            "Pass reset:true to wipe existing state, or use a new queryId."
        )
        return msgspec.json.encode(
            Mismatched({"success": False, "query_id": str(query_id), "name": query.name, "error": error})
        )
    return msgspec.json.encode(
        Registered(
            {
                "success": True,
                "query_id": str(query_id),
                "name": query.name,
                "config_hash": query.config_hash,
                "fresh": outcome is Registration.FRESH,
                "reset": outcome is Registration.RESET,
            }
        )
    )


def read_cycle(body: bytes) -> CycleRequest:
    """A cycle. What is wrong with it beyond its ids is a refusal and no error.

    Raises:
        InvalidRequest: it is no object, or names no query or no partition.
    """
    _check_body(body)
    asked = decode_body(body, _CYCLE, _read_loose_cycle)
    if isinstance(asked, CycleRequest):
        return asked
    try:
        cycle = _to_cycle(asked, body)
    except InvalidRequest as wrong:
        return CycleRequest(query_id=asked.query_id, partition_id=asked.partition_id, refusal=wrong.detail)
    return CycleRequest(query_id=asked.query_id, partition_id=asked.partition_id, cycle=cycle)


def _to_cycle(asked: CycleBody, body: bytes) -> Cycle:
    query_id, partition_id = _cycle_ids(asked.query_id, asked.partition_id)
    changes = [
        StateChange(check_state_key(change.key), bytes(change.value), _window_end(bytes(change.value)))
        if isinstance(change, Upsert)
        else StateChange(check_state_key(change.key), None)
        for change in asked.state_ops or ()
    ]
    messages = asked.push_items or []
    finish_items(messages, newlines=b"\n" in body)
    ack = None if asked.ack is None else _to_ack(asked.ack)
    if ack is not None:
        repeat_is_known = ack.lease_id is not None
    else:
        repeat_is_known = bool(changes) and all(change.value is None for change in changes)
    return Cycle(
        query_id=query_id,
        partition_id=partition_id,
        group=check_name(asked.group or QUEUE_MODE, "consumer_group"),
        changes=changes,
        messages=messages,
        ack=ack,
        release_lease=asked.release_lease is not False,
        digest=hashlib.blake2b(body, digest_size=16).digest() if repeat_is_known else None,
    )


def _cycle_ids(query_id: str, partition_id: str) -> tuple[UUID, UUID]:
    query, partition = _uuid(query_id), _uuid(partition_id)
    if query is None:
        raise InvalidRequest("Unknown query_id")
    if partition is None:
        raise InvalidRequest("partition_id must be a UUID")
    return query, partition


def _to_ack(ack: CycleAckBody) -> CycleAck:
    return CycleAck(
        transaction_id=ack.transaction_id,
        status=_STATUSES[ack.status or "completed"],
        lease_id=ack.lease_id or None,
        count=1 if ack.count is None else ack.count,
        error=ack.error.replace("\0", "\N{REPLACEMENT CHARACTER}") if ack.error else None,  # PostgreSQL holds no NUL
    )


def _read_loose_cycle(body: bytes) -> CycleBody | CycleRequest:
    """A cycle that may have nulls where a default stands, or be wrong."""
    fields = _fields(body)
    query_id, partition_id = _required(fields, "query_id"), _required(fields, "partition_id")
    try:
        _cycle_ids(query_id, partition_id)
        if not is_text(fields.get("consumer_group"), or_null=True):
            raise InvalidRequest("consumer_group must be a string")
        return CycleBody(
            query_id,
            partition_id,
            text_of(fields, "consumer_group"),
            _read_state_ops(fields.get("state_ops")),
            _read_push_items(fields.get("push_items")),
            _read_cycle_ack(fields.get("ack")),
            _read_switch(fields, "release_lease", default=True),
        )
    except InvalidRequest as wrong:
        return CycleRequest(query_id=query_id, partition_id=partition_id, refusal=wrong.detail)


def _elements(raw: msgspec.Raw | None, name: str) -> list[msgspec.Raw]:
    if raw is None or is_null(raw):
        return []
    return objects_of(raw, f"{name} must be an array", f"each of {name} must be an object")


def _read_state_ops(raw: msgspec.Raw | None) -> list[Upsert | Removal]:
    changes: list[Upsert | Removal] = []
    for element in _elements(raw, "state_ops"):
        operation = fields_of(element)
        kind = operation.get("type")
        name = text_of(operation, "type") if is_text(kind) else bytes(kind).decode() if kind is not None else "null"
        if name not in ("upsert", "delete"):
            raise InvalidRequest(f"Unknown state_op type: {name}")
        if not is_text(operation.get("key")):
            raise InvalidRequest("state_op.key is required")
        key = text_of(operation, "key") or ""
        changes.append(Removal(key) if name == "delete" else Upsert(key, operation.get("value", _EMPTY_OBJECT)))
    return changes


def check_state_key(key: str) -> str:
    if len(key) * 4 > MAX_STATE_KEY_BYTES and len(key.encode()) > MAX_STATE_KEY_BYTES:
        raise InvalidRequest(f"a state key must be at most {MAX_STATE_KEY_BYTES} bytes long")
    return key


def _window_end(value: bytes) -> float | None:
    if b'"windowEnd"' not in value and b"\\" not in value:
        return None
    try:
        end = _WINDOW.decode(value).end
        return None if end is None else float(end)
    except (msgspec.DecodeError, OverflowError):
        return None


def _read_push_items(raw: msgspec.Raw | None) -> list[PushItem]:
    if raw is None or is_null(raw):
        return []
    try:
        return _PUSH_ITEMS.decode(raw)
    except msgspec.DecodeError:  # of another shape, or wrong: the slower reading tells
        return [read_loose_item(fields_of(element)) for element in _elements(raw, "push_items")]


def _read_cycle_ack(raw: msgspec.Raw | None) -> CycleAckBody | None:
    if raw is None or is_null(raw):
        return None
    if not begins(raw, b"{"):
        raise InvalidRequest("ack must be an object")
    fields = fields_of(raw)
    transaction_id = text_of(fields, "transactionId") if is_text(fields.get("transactionId")) else None
    if not transaction_id:
        raise InvalidRequest("ack.transactionId is required")
    for name in ("leaseId", "error"):
        if not is_text(fields.get(name), or_null=True):
            raise InvalidRequest(f"ack.{name} must be a string")
    status = fields.get("status")
    name = "completed" if status is None or is_null(status) else bytes(status).decode()
    if is_text(status):
        name = text_of(fields, "status") or ""
    if name not in _STATUSES:
        raise InvalidRequest(f"Unknown ack.status: {name}")
    count = 1 if is_null(fields.get("count")) else scalar_of(fields["count"])
    if not isinstance(count, int) or isinstance(count, bool):
        raise InvalidRequest("ack.count must be an integer")
    return CycleAckBody(
        transaction_id,
        cast("CycleStatus", name),
        text_of(fields, "leaseId"),
        count,
        text_of(fields, "error"),
    )


class CycleAckResult(TypedDict):
    """What became of the acknowledgement of a cycle."""

    success: bool
    count: int
    lease_released: bool
    dlq: bool


class CycleAnswer(TypedDict):
    """A cycle was applied, or ``error`` says why nothing was."""

    success: bool
    query_id: str
    partition_id: str
    queueName: str | None
    state_ops_applied: int
    push_results: list[Pushed]
    ack_result: CycleAckResult | None
    error: NotRequired[str]


def write_cycle(request: CycleRequest, result: CycleResult) -> bytes:
    head = (
        f'"query_id":{encode_text(request.query_id)},"partition_id":{encode_text(request.partition_id)},'
        f'"queueName":{text_or_null(result.queue)}'
    )
    cycle = request.cycle
    if result.error is not None or cycle is None:
        return (
            f'{{"success":false,{head},"state_ops_applied":0,"push_results":[],"ack_result":null,'
            f'"error":{encode_text(result.error or "")}}}'
        ).encode()
    ack_result = "null"
    if cycle.ack is not None:
        ack_result = (
            f'{{"success":true,"count":{cycle.ack.count},"lease_released":{_boolean(result.lease_released)},'
            f'"dlq":{_boolean(result.dead_lettered)}}}'
        )
    pushed = write_push(cycle.messages, result.pushed) if cycle.messages else b"[]"
    return b"".join(
        (
            f'{{"success":true,{head},"state_ops_applied":{len(cycle.changes)},"push_results":'.encode(),
            pushed,
            f',"ack_result":{ack_result}}}'.encode(),
        )
    )


def _boolean(value: bool) -> str:
    return "true" if value else "false"


def read_state_request(body: bytes) -> StateRequest:
    """Raises InvalidRequest."""
    _check_body(body)
    asked = decode_body(body, _STATE, _read_loose_state)
    return StateRequest(
        query_id=_uuid(asked.query_id),
        partition_id=_uuid(asked.partition_id),
        wanted=StateFilter(keys=asked.keys or None, prefix=asked.key_prefix or "", ripe_until=asked.ripe_at_or_before),
    )


def _read_loose_state(body: bytes) -> StateBody:
    fields = _fields(body)
    query_id, partition_id = _required(fields, "query_id"), _required(fields, "partition_id")
    keys: list[str] = []
    if not is_null(raw := fields.get("keys")) and raw is not None:
        try:
            keys = _TEXTS.decode(raw)
        except msgspec.DecodeError:
            raise InvalidRequest("keys must be an array of strings") from None
    if not is_text(fields.get("key_prefix"), or_null=True):
        raise InvalidRequest("key_prefix must be a string")
    ripe: object = None
    if not is_null(fields.get("ripe_at_or_before")):
        ripe = scalar_of(fields["ripe_at_or_before"])
        if not isinstance(ripe, int | float) or isinstance(ripe, bool):
            raise InvalidRequest("ripe_at_or_before must be a number of milliseconds")
    return StateBody(
        query_id=query_id,
        partition_id=partition_id,
        keys=keys,
        key_prefix=text_of(fields, "key_prefix"),
        ripe_at_or_before=_clipped(ripe) if isinstance(ripe, int | float) else None,
    )


def _clipped(number: int | float) -> float:
    try:
        return float(number)
    except OverflowError:
        return float("inf") if number > 0 else float("-inf")


class StateEntry(TypedDict):
    """What is remembered under a key."""

    key: str
    value: Json
    updated_at: TimeText


class StateAnswer(TypedDict):
    """What is remembered, ordered by key."""

    success: bool
    rows: list[StateEntry]


def write_state(rows: Sequence[StateRow]) -> bytes:
    pieces = [
        b'{"key":%b,"value":%b,"updated_at":"%b"}'
        % (msgspec.json.encode(row.key), row.value, format_time(row.updated_at).encode())
        for row in rows
    ]
    return b'{"success":true,"rows":[' + b",".join(pieces) + b"]}"
