"""One stored message, taken out of the line it is stored as. How lines are made stands in segments.py."""

from __future__ import annotations

from typing import Final

import msgspec


class Line(msgspec.Struct, frozen=True):
    """The members of a stored line. ``data`` is the payload, unread."""

    message_id: str = msgspec.field(name="id")
    transaction_id: str = msgspec.field(name="transactionId")
    trace_id: str | None = msgspec.field(name="traceId")
    producer_sub: str | None = msgspec.field(name="producerSub")
    data: msgspec.Raw


_LINE: Final = msgspec.json.Decoder(Line)
_DATA: Final = b',"data":'


def read_line(line: bytes, id_prefix: str) -> Line:
    """A line as it is stored (see ``queen.model.message.SegmentSlice``), with the id prefix that it lacks.

    A NUL stands for the prefix where the transaction id was minted; JSON text holds no other.
    """
    prefix = id_prefix.encode()
    return _LINE.decode(b'{"id":"' + prefix + line.replace(b"\0", prefix) + b"}")


def without_payload(line: bytes) -> bytes:
    """The line with ``null`` for its payload, which may be megabytes. (Inside a JSON string every quote is escaped, so
    that the first place that looks like the member is the member.)"""
    return line[: line.index(_DATA) + len(_DATA)] + b"null"
