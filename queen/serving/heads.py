"""The head of an answer, as bytes. Nothing here sends it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from http import HTTPStatus
from typing import Final

from queen.routes.call import JSON
from queen.routes.cors import Lines

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
CHUNKED: Final = b"transfer-encoding: chunked\r\n"


def head_of(
    status: int,
    date: bytes,
    request_id: str,
    cors: Lines,
    framing: bytes,
    headers: Mapping[str, str],
    *,
    close: bool,
    content_type: str = JSON,
) -> bytes:
    """Everything up to the body.

    Args:
        cors: what browsers are told.
        framing: how long the body is, as the header that says so; empty for one that ends with the connection.
        headers: beyond those that every answer has.
    """
    extra = "".join(f"{name}: {value}\r\n" for name, value in headers.items()) if headers else ""
    if close:
        extra += "connection: close\r\n"
    return b"%bdate: %b\r\nx-request-id: %b\r\n%b%b\r\n" % (
        _start_of(status, content_type, cors),
        date,
        request_id.encode(),
        extra.encode(),
        framing,
    )


@cache
def _start_of(status: int, content_type: str, cors: Lines) -> bytes:
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()]
    lines += [name + b": " + value for name, value in cors]
    if status != HTTPStatus.NO_CONTENT:
        lines.append(b"content-type: " + content_type.encode())
    return b"".join(line + b"\r\n" for line in lines)
