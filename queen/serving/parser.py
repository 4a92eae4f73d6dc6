"""The bytes of one connection become requests: llhttp, told to be strict, and the limits that it does not keep.

Reads no socket and looks nothing up. What is refused here is refused because two readers could take it for two
different requests (RFC 9112, section 11.2), or because it would not fit in memory.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from httptools import HttpParserError, HttpParserInvalidMethodError, HttpParserUpgrade, HttpRequestParser

from queen.errors import HeadTooLarge, InvalidRequest, QueenError, UnsupportedCoding
from queen.routes.call import Call

MAX_HEAD_BYTES: Final = 64 * 1024
"""Of a request line with its headers; also what may come in a row that is no byte of a body, such as the extensions
of a chunk. As much as hypercorn reads."""

MAX_HEADERS: Final = 100
"""As many as Apache httpd takes. Each costs a dictionary entry before anything has looked at the request."""

HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n"


@dataclass(eq=False, slots=True)
class Request:
    """A request whose head is complete; the body may still be growing."""

    target: bytes = b""
    headers: dict[bytes, bytes] = field(default_factory=dict)  # by lower-case name, the first of several
    version: str = ""
    method: str = ""
    path: str = ""  # still percent-encoded
    query: bytes = b""
    keep_alive: bool = False
    parts: list[bytes] | None = field(default_factory=list)  # of the body; None: too large, and dropped
    body_bytes: int = 0
    complete: bool = False
    call: Call | None = None  # what its handler was given, once it has been

    def take_body(self) -> bytes:
        parts, self.parts = self.parts or [], []
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _Stop(Exception):
    """Ends parsing from within a callback; why is said elsewhere."""


class Parser:
    """Bytes in by ``feed``, requests out of ``requests``. Holds at most what one feed has brought beyond one request.

    After a feed, in the order in which it is to be dealt with:

    - ``requests``: those whose head is complete. Only the last may lack some of its body.
    - ``failure``: what came after them is no request; nothing more will be parsed.
    - ``foreign``: it is no plain HTTP/1.1 (an upgrade, HTTP/2, a method unknown to llhttp). All of it that has been
      received, from its first byte; only for a connection on which nothing else is unanswered.
    """

    def __init__(self, max_body_bytes: int) -> None:
        self.requests: deque[Request] = deque()
        self.failure: QueenError | None = None
        self.foreign: bytes | None = None
        self.in_head = False
        self._max_body_bytes = max_body_bytes
        self._llhttp = HttpRequestParser(self)
        self._request = Request(complete=True)
        self._is_foreign = False
        self._head: bytearray | None = bytearray()  # what came of an unfinished head; None: its start is not known
        self._head_bytes = 0
        self._barren_bytes = 0  # received in a row without a byte of a body
        self._steps = 0  # heads begun, heads complete and pieces of bodies, to see whether a feed brought any

    @property
    def in_body(self) -> bool:
        return not self.in_head and not self._request.complete

    @property
    def stopped(self) -> bool:
        return self.failure is not None or self.foreign is not None

    def feed(self, data: memoryview) -> None:
        """Parse what was received. ``data`` may be overwritten afterwards."""
        head, started, steps = self._head, len(self.requests), self._steps
        try:
            self._llhttp.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self._is_foreign |= isinstance(error, HttpParserInvalidMethodError)
            if head is not None and len(self.requests) == started:  # nothing before it in what was received
                received = bytes(head) + bytes(data)
                if self._is_foreign or received.startswith(HTTP2_PREFACE):
                    self.foreign = received
                    return
            if self.failure is None:
                self.failure = InvalidRequest(f"malformed HTTP/1.1: {error}")
            return
        if not self.in_head:
            self._head = bytearray() if self._request.complete else None
        elif head is not None and len(self.requests) == started:
            head += data
        else:
            self._head = None
        self._barren_bytes = self._barren_bytes + len(data) if self._steps == steps else 0
        if self._barren_bytes > MAX_HEAD_BYTES:
            self.failure = HeadTooLarge(MAX_HEAD_BYTES, MAX_HEADERS)

    def _refuse(self, error: QueenError) -> None:
        self.failure = error
        raise _Stop

    # What follows is called by llhttp.

    def on_message_begin(self) -> None:
        self._request = Request()
        self.in_head = True
        self._head_bytes = 0
        self._steps += 1

    def on_url(self, piece: bytes) -> None:
        self._request.target += piece
        self._count_head(len(piece))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value))
        if not self.in_head:
            return  # a trailer: it comes too late to mean anything
        headers, name = self._request.headers, name.lower()
        if name not in headers:
            headers[name] = value
        elif name == b"host":
            self._refuse(InvalidRequest("malformed HTTP/1.1: two Host headers"))
        if len(headers) > MAX_HEADERS:
            self._refuse(HeadTooLarge(MAX_HEAD_BYTES, MAX_HEADERS))

    def on_headers_complete(self) -> None:
        request, headers, llhttp = self._request, self._request.headers, self._llhttp
        if b"upgrade" in headers or llhttp.should_upgrade():
            self._is_foreign = True
            raise _Stop
        request.version = version = llhttp.get_http_version()
        if version == "1.1":
            if b"host" not in headers:
                self._refuse(InvalidRequest("malformed HTTP/1.1: no Host header"))
            request.keep_alive = llhttp.should_keep_alive()
        elif version != "1.0":
            self._refuse(InvalidRequest(f"HTTP/{version} is not spoken here"))
        if headers.get(b"transfer-encoding", b"chunked").lower() != b"chunked":
            self._refuse(UnsupportedCoding())
        if int(headers.get(b"content-length", 0)) > self._max_body_bytes:
            request.parts = None
        path, _, request.query = request.target.partition(b"?")
        request.method, request.path = llhttp.get_method().decode(), path.decode("ascii")
        self.in_head = False
        self._steps += 1
        self.requests.append(request)

    def on_body(self, piece: bytes) -> None:
        request = self._request
        request.body_bytes += len(piece)
        self._steps += 1
        if request.parts is None:
            return
        if request.body_bytes > self._max_body_bytes:
            request.parts = None
        else:
            request.parts.append(piece)

    def on_message_complete(self) -> None:
        self._request.complete = True

    def _count_head(self, count: int) -> None:
        self._head_bytes += count
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(HeadTooLarge(MAX_HEAD_BYTES, MAX_HEADERS))
