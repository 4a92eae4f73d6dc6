"""One HTTP/1.1 keep-alive connection for load generation. No JSON here, no pooling, no retries.

The cost of the generator is subtracted from nothing: it shares the cores with the server it measures. So a request is
bytes made elsewhere, an answer is received into one reused buffer, and a body is never decoded, only counted in.
Trio's own socket object costs two checkpoints per call; here a request is sent without one, and Trio is asked only for
readiness.
"""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import trio

INITIAL_BUFFER_BYTES = 256 * 1024
MIN_FREE_BYTES = 64 * 1024


class Disconnected(Exception):
    """The peer hung up, or spoke something that is not HTTP. The request may or may not have been applied."""


class Connection:
    """A connection that carries one exchange at a time.

    ``status`` and the body belong to the last exchange and are overwritten by the next one. Cancelling an exchange
    leaves the connection unusable: close it.
    """

    __slots__ = ("_buffer", "_end", "_socket", "_start", "_view", "status")

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._buffer = bytearray(INITIAL_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self.status = 0

    @classmethod
    async def open(cls, url: str, receive_buffer_bytes: int | None = None) -> Connection:
        """Connect to the host and port of an http URL.

        Args:
            receive_buffer_bytes: SO_RCVBUF, set before connecting so that the window is small from the start.
        """
        parts = urlsplit(url)
        family, kind, proto, _, address = (
            await trio.socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
        )[0]
        connecting = socket.socket(family, kind, proto)
        try:
            connecting.setblocking(False)
            connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if receive_buffer_bytes is not None:
                connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
            try:
                connecting.connect(address)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(connecting)
                if error := connecting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise OSError(error, "connect failed") from None
        except BaseException:
            connecting.close()
            raise
        return cls(connecting)

    def close(self) -> None:
        """Close at once. Safe to repeat."""
        self._socket.close()

    async def send(self, *parts: bytes) -> None:
        """Send all parts, in order."""
        remaining = sum(map(len, parts))
        pending: list[bytes | memoryview] = list(parts)
        while True:
            try:
                sent = self._socket.sendmsg(pending)
            except BlockingIOError:
                sent = 0
            remaining -= sent
            if not remaining:
                return
            while pending and sent >= len(pending[0]):
                sent -= len(pending.pop(0))
            if sent:
                pending[0] = memoryview(pending[0])[sent:]
            await trio.lowlevel.wait_writable(self._socket)

    async def receive_some(self, max_bytes: int) -> int:
        """Receive up to ``max_bytes`` and forget them; returns how many, 0 at the end. For readers that only drain."""
        await trio.lowlevel.wait_readable(self._socket)
        return self._socket.recv_into(self._view, min(max_bytes, len(self._buffer)))

    async def exchange(self, *parts: bytes) -> int:
        """Send a request and receive its whole answer; returns the status."""
        await self.send(*parts)
        filled = await self._fill(0)
        while (head_end := self._buffer.find(b"\r\n\r\n", 0, filled)) < 0:
            filled = await self._fill(filled)
        head = bytes(self._view[:head_end]).lower()
        if not head.startswith(b"http/1.1 "):
            raise Disconnected(f"not HTTP/1.1: {head[:40]!r}")
        self.status = int(head[9:12])
        self._start = self._end = head_end + 4
        at = head.find(b"\r\ncontent-length:")
        if at >= 0:
            line_end = head.find(b"\r\n", at + 2)
            self._end += int(head[at + 17 : line_end if line_end >= 0 else len(head)])
            while filled < self._end:
                filled = await self._fill(filled, self._end - filled)
        elif b"\r\ntransfer-encoding: chunked" in head:
            await self._receive_chunks(filled)
        elif self.status not in (204, 304):
            raise Disconnected("an answer without a length")
        return self.status

    def count(self, needle: bytes) -> int:
        """How often ``needle`` stands in the body."""
        return self._buffer.count(needle, self._start, self._end)

    def body(self) -> bytes:
        """A copy of the body."""
        return bytes(self._view[self._start : self._end])

    @property
    def body_bytes(self) -> int:
        """Length of the body, without transfer framing."""
        return self._end - self._start

    async def _receive_chunks(self, filled: int) -> None:
        """Receive a chunked body and close the gaps of its framing, so that it lies in one piece."""
        read = self._start
        while True:
            while (line_end := self._buffer.find(b"\r\n", read, filled)) < 0:
                filled = await self._fill(filled)
            size = int(bytes(self._view[read:line_end]).partition(b";")[0], 16)
            read = line_end + 2
            while filled < read + size + 2:
                filled = await self._fill(filled, read + size + 2 - filled)
            if not size:
                return
            self._view[self._end : self._end + size] = self._view[read : read + size]
            self._end += size
            read += size + 2

    async def _fill(self, filled: int, wanted: int = 1) -> int:
        """Receive something behind the first ``filled`` bytes; returns the new fill.

        Waits before it tries: the last receive took all there was, so trying first would mostly cost a system call.
        """
        if len(self._buffer) - filled < max(wanted, MIN_FREE_BYTES):
            self._view.release()
            self._buffer.extend(bytes(max(len(self._buffer), wanted)))
            self._view = memoryview(self._buffer)
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                received = self._socket.recv_into(self._view[filled:])
            except BlockingIOError:  # readiness is a hint
                continue
            if not received:
                raise Disconnected(f"closed by the server after {filled} bytes of an answer")
            return filled + received


def get(url: str, path: str) -> bytes:
    """The bytes of a GET request."""
    return f"GET {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n\r\n".encode()


def post(url: str, path: str, body: bytes) -> bytes:
    """The bytes of a POST request with its JSON body."""
    head = f"POST {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
