"""Traces: one to record, those of a message, those of a name. Answers are snake_case, as the contract has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Final, NotRequired, TypedDict
from uuid import UUID

import msgspec
from msgspec import Meta, field

from queen.errors import InvalidRequest
from queen.model.trace import NamedTrace, NewTrace, Trace, TraceName
from queen.routes.wire.body import (
    INT32_MAX,
    NULL,
    Json,
    Name,
    Text,
    TimeText,
    UuidText,
    begins,
    body_fields,
    check_name,
    decode_body,
    format_time,
    is_null,
    is_text,
    text_of,
)
from queen.routes.wire.dead_letters import Page
from queen.storage.lines import read_line

MAX_NAMES: Final = 100
"""Names of one trace: each is a row of its own."""

MAX_PAGE: Final = 1000

_NAMES: Final = msgspec.json.Decoder(list[msgspec.Raw])
_TEXT: Final = msgspec.json.Decoder(str)


class NamedTracesQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which page of the traces of a name."""

    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 100
    offset: Annotated[int, Meta(ge=0, le=INT32_MAX)] = 0


class NamesQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which page of the names."""

    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 50
    offset: Annotated[int, Meta(ge=0, le=INT32_MAX)] = 0


class TraceBody(msgspec.Struct, frozen=True, kw_only=True):
    """Something to note about a message."""

    transaction_id: Text = field(name="transactionId")
    partition_id: Text = field(name="partitionId")
    data: Annotated[msgspec.Raw, Meta(description="Any JSON object.", extra_json_schema={"type": "object"})]
    group: Name | None = field(name="consumerGroup", default=None)
    names: Annotated[list[Name], Meta(max_length=MAX_NAMES)] | Name | None = field(name="traceNames", default=None)
    event_type: Name | None = field(name="eventType", default=None)
    worker_id: Name | None = field(name="workerId", default=None)


_TRACE: Final = msgspec.json.Decoder(TraceBody)


def read_trace(body: bytes) -> NewTrace:
    """Raises InvalidRequest."""
    asked = decode_body(body, _TRACE, _read_loose_trace)
    if is_null(asked.data):
        raise InvalidRequest("data is required")
    if not begins(asked.data, b"{"):
        raise InvalidRequest("data must be an object")
    names = [asked.names] if isinstance(asked.names, str) else asked.names or []
    return NewTrace(
        transaction_id=asked.transaction_id,
        partition_id=asked.partition_id,
        data=bytes(asked.data),
        group=_name(asked.group, "consumerGroup"),
        names=tuple(dict.fromkeys(name for name in names if _name(name, "traceNames"))),
        event_type=_name(asked.event_type, "eventType") or "info",
        worker_id=_name(asked.worker_id, "workerId"),
    )


def _name(text: str | None, what: str) -> str | None:
    return check_name(text, what) if text else None


def _read_loose_trace(body: bytes) -> TraceBody:
    """A trace whose trimmings may be anything (then they are left out: it must not fail for them), or that is wrong."""
    fields = body_fields(body)
    for name in ("transactionId", "partitionId"):
        if not is_text(fields.get(name)) or not text_of(fields, name):
            raise InvalidRequest(f"{name} is required")
    return TraceBody(
        transaction_id=text_of(fields, "transactionId") or "",
        partition_id=text_of(fields, "partitionId") or "",
        data=fields.get("data", NULL),
        group=_loose_name(fields, "consumerGroup"),
        names=_loose_names(fields.get("traceNames")),
        event_type=_loose_name(fields, "eventType"),
        worker_id=_loose_name(fields, "workerId"),
    )


def _loose_name(fields: Mapping[str, msgspec.Raw], what: str) -> str | None:
    return text_of(fields, what) if is_text(fields.get(what)) else None


def _loose_names(raw: msgspec.Raw | None) -> list[str]:
    if raw is None or is_null(raw):
        return []
    texts = [raw] if is_text(raw) else _NAMES.decode(raw) if begins(raw, b"[") else []
    names = [_TEXT.decode(text) for text in texts if is_text(text)]
    if len(names) > MAX_NAMES:
        raise InvalidRequest(f"a trace has at most {MAX_NAMES} names, not {len(names)}")
    return names


class Recorded(TypedDict):
    """Whether something was noted, and under which id."""

    success: bool
    traceId: NotRequired[UuidText]
    error: NotRequired[str]


class TraceEntry(TypedDict):
    """What was noted about a message."""

    id: UuidText
    event_type: str
    data: Json
    consumer_group: str | None
    worker_id: str | None
    created_at: TimeText
    trace_names: list[str]


class NamedTraceEntry(TraceEntry):
    """The same, with its message."""

    transaction_id: str
    partition_id: UuidText
    queue_name: str
    partition_name: str
    message_payload: Json


class TraceList(TypedDict):
    """What was noted about a message, oldest first."""

    traces: list[TraceEntry]


class NamedTraceList(TypedDict):
    """What was noted under a name, oldest first."""

    traces: list[NamedTraceEntry]
    total: int
    pagination: Page


class TraceNameEntry(TypedDict):
    """A name of traces."""

    trace_name: str
    trace_count: int
    message_count: int
    last_seen: TimeText


class TraceNameList(TypedDict):
    """Names of traces."""

    trace_names: list[TraceNameEntry]
    total: int
    pagination: Page


def write_recorded(trace_id: UUID | None) -> bytes:
    if trace_id is None:
        return b'{"success":false,"error":"Message not found"}'
    return msgspec.json.encode(Recorded({"success": True, "traceId": str(trace_id)}))


def _trace(trace: Trace) -> TraceEntry:
    return {
        "id": str(trace.trace_id),
        "event_type": trace.event_type,
        "data": msgspec.Raw(trace.data),
        "consumer_group": trace.group,
        "worker_id": trace.worker_id,
        "created_at": format_time(trace.created_at),
        "trace_names": list(trace.names),
    }


def write_traces(traces: Sequence[Trace]) -> bytes:
    return msgspec.json.encode(TraceList({"traces": [_trace(trace) for trace in traces]}))


def write_named_traces(total: int, traces: Sequence[NamedTrace], limit: int, offset: int) -> bytes:
    return msgspec.json.encode(
        NamedTraceList(
            {
                "traces": [
                    {
                        **_trace(found.trace),
                        "transaction_id": found.trace.transaction_id,
                        "partition_id": str(found.trace.partition_id),
                        "queue_name": found.queue,
                        "partition_name": found.partition,
                        "message_payload": NULL if found.line is None else read_line(found.line, found.id_prefix).data,
                    }
                    for found in traces
                ],
                "total": total,
                "pagination": {"limit": limit, "offset": offset},
            }
        )
    )


def write_trace_names(total: int, names: Sequence[TraceName], limit: int, offset: int) -> bytes:
    return msgspec.json.encode(
        TraceNameList(
            {
                "trace_names": [
                    {
                        "trace_name": name.name,
                        "trace_count": name.traces,
                        "message_count": name.messages,
                        "last_seen": format_time(name.last_seen),
                    }
                    for name in names
                ],
                "total": total,
                "pagination": {"limit": limit, "offset": offset},
            }
        )
    )
