"""The port: taken once, and listened on by as many sockets as there are workers. Nothing is accepted here."""

from __future__ import annotations

import errno
import os
import socket
import time
from types import TracebackType
from typing import Any, Final, Self

from queen.errors import StartupError

LISTEN_BACKLOG: Final = 4096  # also what waits while a slot has no worker; the kernel caps it at somaxconn
_PAUSE_SECONDS: Final = 0.05


class Port:
    """An address that is ours until ``close``, whether anybody listens on it or not.

    The kernel spreads connections among the listening sockets. Each can be closed and another opened in its place: a
    socket that only holds the port keeps others from taking it meanwhile.
    """

    def __init__(self, host: str, port: int, *, patience_seconds: float = 0.0) -> None:
        """Take the port; 0 is any free one. May block.

        Raises:
            StartupError: the address is not ours, or the port is taken and stays so for ``patience_seconds``.
        """
        self._family, self.address = _resolve(host, port)
        give_up_at = time.monotonic() + patience_seconds
        while True:
            try:
                self._holder = self._bind(shared=False)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > give_up_at:
                    reason = os.strerror(error.errno or 0)
                    raise StartupError(f"cannot listen on {host} port {port}: {reason}") from error
            time.sleep(_PAUSE_SECONDS)
        # Bound without SO_REUSEPORT, so that a port held by another server, one of ours too, was refused; and taking it
        # on afterwards, so that no gap opens between that test and the use. SO_REUSEADDR, which got us past connections
        # that linger from before, would let others bind as long as nobody listens.
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        self.address = self._holder.getsockname()

    @classmethod
    def left(cls, descriptor: int) -> Self:
        """The port that this process already has."""
        port = cls.__new__(cls)
        port._holder = socket.socket(fileno=descriptor)
        port._family = port._holder.family
        port.address = port._holder.getsockname()
        return port

    def fileno(self) -> int:
        return self._holder.fileno()

    def listen(self) -> socket.socket:
        """One more listening socket.

        Raises:
            OSError: there is no descriptor left for it.
        """
        listener = self._bind(shared=True)
        listener.listen(LISTEN_BACKLOG)
        return listener

    def _bind(self, *, shared: bool) -> socket.socket:
        bound = socket.socket(self._family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # :: is all addresses, IPv4 too
            if shared:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound.bind(self.address)
        except BaseException:
            bound.close()
            raise
        return bound

    @property
    def url(self) -> str:
        host, port = self.address[0], self.address[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def close(self) -> None:
        """Let go of it. Listening sockets stay as they are."""
        self._holder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class PassedPort(Port):
    """A listening socket that was passed to us. All slots listen on it, each by a descriptor of its own.

    The kernel does not spread connections among descriptors of one socket: whichever worker is first to accept has it,
    and balance.py evens that out. In return none waits for a worker in particular, and none is lost while whoever
    passed the socket holds it.
    """

    def __init__(self, passed: socket.socket) -> None:
        self._holder = passed
        self.address = passed.getsockname()

    def listen(self) -> socket.socket:
        return self._holder.dup()


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartupError(f"the host {host!r} cannot be resolved: {error.strerror}") from error
    # A name such as localhost has addresses of both families; the one that every client tries is IPv4.
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, address
