"""One HTTP/1.1 connection of a well-behaved client, which says exactly what became of a request. No retries here.

A connection that the server has closed meanwhile, or said that it will close, is not used again: that is how clients
in the field do it, and what a server that drains may count on.
"""

from __future__ import annotations

import json
import socket
from typing import Any

import trio

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 20.0
CHUNK = 65536


class Unanswered(Exception):
    """No answer came. ``sent``: the server may have seen the request. ``told``: what happened."""

    def __init__(self, told: str, *, sent: bool) -> None:
        super().__init__(told)
        self.told = told
        self.sent = sent


class Wire:
    """A place for one connection at a time; ``opened_at`` and ``local_port`` are those of the last one used."""

    def __init__(self, port: int, *, answer_seconds: float = ANSWER_SECONDS) -> None:
        self.port = port
        self.opened_at = 0.0
        self.local_port = 0
        self.closes = False  # the last answer said that the connection ends with it
        self._answer_seconds = answer_seconds
        self._stream: trio.SocketStream | None = None
        self._received = bytearray()

    async def exchange(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Send a request and receive its answer. Raises Unanswered; the connection is closed then."""
        content = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Length: {len(content)}\r\n"
        head += "Content-Type: application/json\r\n" if content else ""
        stream = await self.connect()
        told = "no answer in time"
        with trio.move_on_after(self._answer_seconds):
            try:
                await stream.send_all(head.encode() + b"\r\n" + content)
                status, answer = await self._receive(stream)
                if self.closes:
                    self.close()
                return status, answer
            except (trio.BrokenResourceError, ConnectionError) as error:
                told = f"connection lost: {error}" if str(error) else "connection lost"
        self.close()
        raise Unanswered(told, sent=True)

    async def connect(self) -> trio.SocketStream:
        """The connection, opened anew if need be. Raises Unanswered: nothing was sent."""
        if self._stream is not None and self._ended(self._stream):
            self.close()
        if self._stream is None:
            told = "no connection in time"
            with trio.move_on_after(CONNECT_SECONDS):
                try:
                    self._stream = await trio.open_tcp_stream("127.0.0.1", self.port)
                except OSError as error:
                    told = f"refused to connect: {error.__cause__ or error}"
            if self._stream is None:
                raise Unanswered(told, sent=False)
            self._stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.opened_at = trio.current_time()
            self.local_port = self._stream.socket.getsockname()[1]
            self._received.clear()
        return self._stream

    def _ended(self, stream: trio.SocketStream) -> bool:
        """Whether the server has closed a connection that waits for its next request."""
        with socket.socket(fileno=socket.dup(stream.socket.fileno())) as peek:
            try:
                return not peek.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError:
                return True

    async def _receive(self, stream: trio.SocketStream) -> tuple[int, bytes]:
        while (end := self._received.find(b"\r\n\r\n")) < 0:
            await self._more(stream)
        head = bytes(self._received[:end]).decode("latin-1").lower().split("\r\n")
        del self._received[: end + 4]
        status = int(head[0].split()[1])
        fields = dict(line.split(": ", 1) for line in head[1:])
        self.closes = fields.get("connection") == "close"
        if "chunked" in fields.get("transfer-encoding", ""):
            return status, await self._receive_chunks(stream)
        if "content-length" in fields:
            return status, await self._take(stream, int(fields["content-length"]))
        if status not in (204, 304):
            self.closes = True
            return status, await self._take_all(stream)
        return status, b""

    async def _receive_chunks(self, stream: trio.SocketStream) -> bytes:
        body = bytearray()
        while True:
            while (end := self._received.find(b"\r\n")) < 0:
                await self._more(stream)
            size = int(self._received[:end], 16)
            del self._received[: end + 2]
            body += (await self._take(stream, size + 2))[:size]
            if not size:
                return bytes(body)

    async def _take(self, stream: trio.SocketStream, size: int) -> bytes:
        while len(self._received) < size:
            await self._more(stream)
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    async def _take_all(self, stream: trio.SocketStream) -> bytes:
        async for chunk in stream:
            self._received += chunk
        return bytes(self._received)

    async def _more(self, stream: trio.SocketStream) -> None:
        chunk = await stream.receive_some(CHUNK)
        if not chunk:
            raise ConnectionError("closed before the answer was whole")
        self._received += chunk

    def close(self) -> None:
        """Close at once. Safe to repeat."""
        if self._stream is not None:
            self._stream.socket.close()
            self._stream = None
