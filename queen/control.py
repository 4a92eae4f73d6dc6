"""What the supervisor and a worker say to each other: the messages, and how they travel over an inherited socket.

One JSON object a line, both ways; a descriptor may come along. What either side does about a message is not decided
here. The end of the stream is the last message: the other process is gone.
"""

from __future__ import annotations

import os
import socket
from array import array
from collections import deque
from types import TracebackType
from typing import Final, Self

import msgspec
import trio

from queen.model.snapshot import Snapshot
from queen.model.tree import Branch

MAX_LINE_BYTES: Final = 1024 * 1024  # settings are about 1 KiB; more than this is not ours
ANCILLARY_BYTES: Final = 4096  # room for descriptors; a message brings one


class Start(msgspec.Struct, frozen=True, tag="start"):
    """Supervisor → worker, once: the database is up, open the application with these settings (``encode_settings``)."""

    settings: msgspec.Raw


class Serve(msgspec.Struct, frozen=True, tag="serve"):
    """Supervisor → worker, once, with the descriptor of a listening socket: take this slot.

    ``balanced``: three more descriptors come along, those of a Pool.
    """

    slot: int
    generation: int
    balanced: bool = False


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Supervisor → worker: take nothing new, finish what is begun, exit.

    ``others``: other workers of the server go on, and there is no hurry: connections that are idle are theirs. Without
    them these end at once. ``replaced``: one of them accepts from the same socket. Without it, whatever waits in the
    backlog is the last that is accepted.
    """

    others: bool = False
    replaced: bool = False


class ReloadCertificate(msgspec.Struct, frozen=True, tag="reload_certificate"):
    """Supervisor → worker: read the certificate again; connections go on."""


class Prepared(msgspec.Struct, frozen=True, tag="prepared"):
    """Worker → supervisor, once: the application is open; all that is missing is a socket."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Worker → supervisor, once: this worker serves."""


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Worker → supervisor, twice a second, from the worker's own Trio loop. Counters grow from its start."""

    loop_lag_p50_ms: float = 0.0  # how late the loop was since the last heartbeat
    loop_lag_p99_ms: float = 0.0
    loop_lag_max_ms: float = 0.0
    rss_bytes: int = 0
    connections: int = 0
    requests_in_flight: int = 0
    requests: int = 0
    pushed: int = 0
    popped: int = 0
    acked: int = 0


class Describe(msgspec.Struct, frozen=True, tag="describe"):
    """Supervisor → worker: what are you doing?"""

    number: int


class Description(msgspec.Struct, frozen=True, tag="description"):
    """Worker → supervisor: the answer to the Describe of that number."""

    number: int
    branches: tuple[Branch, ...] = ()


class AskSnapshot(msgspec.Struct, frozen=True, tag="ask_snapshot"):
    """Worker → supervisor: how is the server? Somebody wants its metrics."""

    number: int


class TellSnapshot(msgspec.Struct, frozen=True, tag="tell_snapshot"):
    """Supervisor → worker: the answer to the AskSnapshot of that number."""

    number: int
    snapshot: Snapshot | None  # None is said before there was any


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Worker → supervisor: it cannot start. ``error`` is one sentence for the operator."""

    error: str


Message = (
    Start
    | Serve
    | Drain
    | ReloadCertificate
    | Prepared
    | Ready
    | Heartbeat
    | Describe
    | Description
    | AskSnapshot
    | TellSnapshot
    | Failed
)

_decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


def encode(message: Message) -> bytes:
    """The line that a message travels as."""
    return msgspec.json.encode(message) + b"\n"


class ControlChannel:
    """One end of the socket pair. Sending is safe from several tasks; receiving is one task's work."""

    def __init__(self, end: socket.socket, received: bytes = b"") -> None:
        self._socket = trio.socket.from_stdlib_socket(end)
        self._sending = trio.Lock()
        self._received = bytearray(received)
        self._descriptors: deque[int] = deque()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def received(self) -> bytes:
        """What has come and was not yet a whole message."""
        return bytes(self._received)

    async def send(self, message: Message, *descriptors: int) -> None:
        """Send one message, with descriptors of our files for the other process to have as its own.

        Cancelled while sending, the stream is torn: use it no more.

        Raises:
            trio.BrokenResourceError: the other process is gone.
        """
        rest = memoryview(encode(message))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
        async with self._sending:
            try:
                while rest:
                    rest = rest[await self._socket.sendmsg([rest], ancillary) :]
                    ancillary = []
            except OSError as error:
                raise trio.BrokenResourceError("the other process is gone") from error

    async def receive(self) -> Message | None:
        """The next message; None when the other process has closed its end or died. Cancelled, it loses nothing."""
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > MAX_LINE_BYTES:
                raise ValueError(f"a control message of more than {MAX_LINE_BYTES} bytes")
            try:
                received, ancillary, _, _ = await self._socket.recvmsg(65536, ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
            except OSError:  # it died with our words unread: an end like any other
                return None
            if not received:
                return None
            for level, kind, data in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    self._descriptors.extend(array("i", data))
            self._received += received
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return _decoder.decode(line)

    def take_descriptor(self) -> int:
        """The next descriptor that came with a message; it is the caller's to close."""
        return self._descriptors.popleft()

    async def aclose(self) -> None:
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())
        await trio.lowlevel.checkpoint()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
