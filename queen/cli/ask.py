"""What every command that speaks to a running server shares: finding its control socket, asking, and giving up.

Not a command itself. Which socket is meant follows from the same flags and variables as for `queen-trio run`.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import struct
import time
from types import TracebackType
from typing import Final, Self, TypeVar

import msgspec

from queen.cli.run import add_control_argument, add_database_arguments, flags_of
from queen.config.sources import load_settings
from queen.errors import StartupError
from queen.model.snapshot import Snapshot
from queen.supervision.control_socket import (
    ANSWER_SECONDS,
    MAX_REPLY_BYTES,
    Command,
    Refused,
    Reply,
    Status,
    control_path,
    reach,
)

T = TypeVar("T")

NOT_RUNNING: Final = 3
_PEER: Final = struct.Struct("3i")  # pid, uid, gid: SO_PEERCRED of unix(7)


class NotRunning(StartupError):
    """No server answers on the control socket."""


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which server is meant."""
    add_control_argument(parser)
    parser.add_argument("--port", type=int, help="port of the server, if its socket is named for it (PORT)")
    add_database_arguments(parser)


class Line:
    """A connection to a server's control socket.

    Raises:
        NotRunning: nobody answers, from the start or any more.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        settings, _ = load_settings(flags=flags_of(arguments))
        self._path = control_path(settings)
        self._received = bytearray()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_SECONDS + 1.0)
        try:
            with reach(self._path) as address:
                self._socket.connect(address)
        except PermissionError as error:
            raise StartupError(f"the control socket {self._path} is another user's: run this as that user") from error
        except OSError as error:
            raise NotRunning(f"no server answers on {self._path} ({error.strerror or error})") from error

    def ask(self, command: Command, answer: type[T]) -> T:
        """Send a command and wait for its answer.

        Raises:
            Refused: the server says why not.
            NotRunning: it ended, or does not answer in time.
        """
        try:
            self._socket.sendall(msgspec.json.encode(command) + b"\n")
            line = self._receive()
        except OSError as error:
            raise NotRunning(f"the server on {self._path} does not answer ({error.strerror or error})") from error
        reply = msgspec.json.decode(line, type=Reply)
        if reply.error:
            raise Refused(reply.error)
        return msgspec.json.decode(reply.result, type=answer)

    def status(self) -> Snapshot:
        return self.ask(Status(), Snapshot)

    def wait_end(self, seconds: float) -> bool:
        """Wait for the server's process to end. Returns whether it has."""
        pid, _, _ = _PEER.unpack(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        try:
            return bool(select.select([process], [], [], seconds)[0])
        finally:
            os.close(process)

    def _receive(self) -> bytes:
        deadline = time.monotonic() + ANSWER_SECONDS + 1.0
        while (end := self._received.find(b"\n")) < 0:
            received = self._socket.recv(1 << 16)
            if not received:
                raise ConnectionResetError("it has ended")
            self._received += received
            if len(self._received) > MAX_REPLY_BYTES or time.monotonic() > deadline:
                raise TimeoutError("its answer does not end")
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
