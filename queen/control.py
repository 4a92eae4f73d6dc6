"""What the supervisor and a worker say to each other: the messages, and how they travel over an inherited socket.

One JSON object a line, both ways. What either side does about a message is not decided here. The end of the stream
is the last message: the other process is gone.
"""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Final, Self

import msgspec
import trio

MAX_LINE_BYTES: Final = 1024 * 1024  # settings are about 1 KiB; more than this is not ours


class Start(msgspec.Struct, frozen=True, tag="start"):
    """Supervisor → worker, once: the database is up, serve with these settings (``encode_settings``)."""

    slot: int
    settings: msgspec.Raw


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Supervisor → worker: take nothing new, finish what is begun, exit."""


class ReloadCertificate(msgspec.Struct, frozen=True, tag="reload_certificate"):
    """Supervisor → worker: read the certificate again; connections go on."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Worker → supervisor, once: this worker serves."""


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Worker → supervisor, every second, from the worker's own Trio loop. Counters grow from its start."""

    loop_lag_ms: float
    rss_bytes: int
    requests: int = 0
    pushed: int = 0
    popped: int = 0
    acked: int = 0


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Worker → supervisor: it cannot start. ``error`` is one sentence for the operator."""

    error: str


Message = Start | Drain | ReloadCertificate | Ready | Heartbeat | Failed

_decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


class ControlChannel:
    """One end of the socket pair. Sending is safe from several tasks; receiving is one task's work."""

    def __init__(self, end: socket.socket) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(end))
        self._sending = trio.Lock()
        self._received = bytearray()

    async def send(self, message: Message) -> None:
        """Send one message. Raises trio.BrokenResourceError when the other process is gone.

        Cancelled while sending, the stream is torn: use it no more.
        """
        async with self._sending:
            await self._stream.send_all(msgspec.json.encode(message) + b"\n")

    async def receive(self) -> Message | None:
        """The next message; None when the other process has closed its end or died. Cancelled, it loses nothing."""
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > MAX_LINE_BYTES:
                raise ValueError(f"a control message of more than {MAX_LINE_BYTES} bytes")
            try:
                received = await self._stream.receive_some(65536)
            except trio.BrokenResourceError:  # it died with our words unread: an end like any other
                return None
            if not received:
                return None
            self._received += received
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return _decoder.decode(line)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
