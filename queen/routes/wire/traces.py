"""Traces: one to record, those of a message, those of a name. Answers are snake_case, as the contract has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Final
from uuid import UUID

import msgspec
from msgspec import Meta

from queen.errors import InvalidRequest
from queen.model.trace import NamedTrace, NewTrace, Trace, TraceName
from queen.routes.wire.body import (
    INT32_MAX,
    RAW_OBJECT,
    begins,
    body_fields,
    check_name,
    decode_body,
    format_time,
    is_null,
    is_text,
    text_of,
)
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


def read_trace(body: bytes) -> NewTrace:
    """Raises InvalidRequest."""
    fields = decode_body(body, RAW_OBJECT, body_fields)
    for name in ("transactionId", "partitionId"):
        if not is_text(fields.get(name)) or not text_of(fields, name):
            raise InvalidRequest(f"{name} is required")
    data = fields.get("data")
    if is_null(data) or data is None:
        raise InvalidRequest("data is required")
    if not begins(data, b"{"):
        raise InvalidRequest("data must be an object")
    return NewTrace(
        transaction_id=text_of(fields, "transactionId") or "",
        partition_id=text_of(fields, "partitionId") or "",
        data=bytes(data),
        group=_name(fields, "consumerGroup"),
        names=_names(fields.get("traceNames")),
        event_type=_name(fields, "eventType") or "info",
        worker_id=_name(fields, "workerId"),
    )


def _name(fields: Mapping[str, msgspec.Raw], what: str) -> str | None:
    """A short text; anything else that stands there is left out: a trace must not fail for its trimmings."""
    text = text_of(fields, what) if is_text(fields.get(what)) else None
    return check_name(text, what) if text else None


def _names(raw: msgspec.Raw | None) -> tuple[str, ...]:
    if raw is None or is_null(raw):
        return ()
    texts = [raw] if is_text(raw) else _NAMES.decode(raw) if begins(raw, b"[") else []
    names = [check_name(_TEXT.decode(text), "traceNames") for text in texts if is_text(text)]
    if len(names) > MAX_NAMES:
        raise InvalidRequest(f"a trace has at most {MAX_NAMES} names, not {len(names)}")
    return tuple(dict.fromkeys(name for name in names if name))


def write_recorded(trace_id: UUID | None) -> bytes:
    if trace_id is None:
        return b'{"success":false,"error":"Message not found"}'
    return msgspec.json.encode({"success": True, "traceId": str(trace_id)})


def _trace(trace: Trace) -> dict[str, object]:
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
    return msgspec.json.encode({"traces": [_trace(trace) for trace in traces]})


def write_named_traces(total: int, traces: Sequence[NamedTrace], limit: int, offset: int) -> bytes:
    return msgspec.json.encode(
        {
            "traces": [
                {
                    **_trace(found.trace),
                    "transaction_id": found.trace.transaction_id,
                    "partition_id": str(found.trace.partition_id),
                    "queue_name": found.queue,
                    "partition_name": found.partition,
                    "message_payload": None if found.line is None else read_line(found.line, found.id_prefix).data,
                }
                for found in traces
            ],
            "total": total,
            "pagination": {"limit": limit, "offset": offset},
        }
    )


def write_trace_names(total: int, names: Sequence[TraceName], limit: int, offset: int) -> bytes:
    return msgspec.json.encode(
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
