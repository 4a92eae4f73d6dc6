"""One task hears for all connections what none of them can hear while it waits: that its client has hung up.

A connection that runs a handler does not read, and a parked poll may run for half a minute; its client hanging up
must end it all the same, or it would take a lease for nobody. A task for each connection that reads ahead, or a
nursery for each request, would hear it too; on a bare loop they cost 18 and 57 µs of CPU a request beside the 26 µs
of everything else. Linux tells of a hang-up apart from data (EPOLLRDHUP), and an epoll can wait in an epoll: this one
is asked once for each connection and costs a request nothing.

The same task ends what has been idle for too long and keeps the date. A deadline of Trio's for each wait would be
exact, and cost 7 µs a request for a limit that nobody needs to the second.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from typing import Final, Protocol

import trio

from queen.beat import next_beat
from queen.observability.doing import ConnectionRecord

TICK_SECONDS: Final = 1.0
"""How exact the date and the idle limit are. A tick looks at every connection: 0.3 ms for 10,000."""


class Watched(Protocol):
    """A connection, as its watch sees it. ``idle_since``: when it began to wait for a request; infinite otherwise.
    ``used``: it has had one."""

    idle_since: float
    used: bool

    def fileno(self) -> int: ...

    def hang_up(self) -> None:
        """The client has closed its side, or is gone. Told once."""

    def retire(self) -> None:
        """End after the next answer."""

    def bequeath(self, heir: Callable[[int], bool]) -> None:
        """Give the connection to another process as soon as it waits for a request. ``heir`` takes its descriptor, or
        says no."""

    def end_idle(self) -> None:
        """End if it waits for a request, and otherwise after the answer."""

    def doing(self) -> ConnectionRecord:
        """What it is at."""


class Watch:
    """The open connections of one server. ``len`` counts them."""

    def __init__(self, idle_seconds: float) -> None:
        self.date = formatdate(usegmt=True).encode()
        self._idle_seconds = idle_seconds
        self._draining = False
        self._heir: Callable[[int], bool] | None = None
        self._connections: dict[int, Watched] = {}
        self._hang_ups = select.epoll()

    def __len__(self) -> int:
        return len(self._connections)

    def doing(self) -> list[ConnectionRecord]:
        """What the connections are at."""
        return [connection.doing() for connection in self._connections.values()]

    @contextmanager
    def watching(self, connection: Watched) -> Iterator[None]:
        """Watch a connection for the length of this block, which must end before its socket is closed."""
        number = connection.fileno()
        self._connections[number] = connection
        self._hang_ups.register(number, select.EPOLLRDHUP | select.EPOLLONESHOT)
        try:
            if self._draining:
                connection.retire()
            elif self._heir is not None:
                connection.bequeath(self._heir)
            yield
        finally:
            self._hang_ups.unregister(number)
            del self._connections[number]

    def drain(self) -> None:
        """Shutting down: every connection, also of those that still come, ends after its next answer."""
        self._draining = True
        for connection in self._connections.values():
            connection.retire()

    def bequeath(self, heir: Callable[[int], bool]) -> None:
        """Another process goes on: give it every connection that waits for a request, now or later. To be repeated, for
        those that it had no room for."""
        self._heir = heir
        for connection in list(self._connections.values()):
            connection.bequeath(heir)

    def end_idle(self, *, unused: bool = True) -> None:
        """End connections that wait for a request. Without ``unused``, not those that wait for their first one."""
        for connection in self._connections.values():
            if unused or connection.used:
                connection.end_idle()

    async def run(self) -> None:
        """Watch until cancelled."""
        with self._hang_ups:
            tick = trio.current_time()
            while True:
                with trio.move_on_at(tick):
                    await trio.lowlevel.wait_readable(self._hang_ups.fileno())
                for number, _ in self._hang_ups.poll(0):
                    self._connections[number].hang_up()
                if (now := trio.current_time()) >= tick:
                    tick = next_beat(TICK_SECONDS)
                    self.date = formatdate(usegmt=True).encode()
                    for connection in self._connections.values():
                        if connection.idle_since + self._idle_seconds < now:
                            connection.end_idle()
