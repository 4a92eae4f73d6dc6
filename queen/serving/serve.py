"""Serve an application on listening sockets until told to stop: its lifespan, its connections, and the drain.

What hypercorn does in ``hypercorn.trio.run.worker_serve``, with another way for plain HTTP/1.1. Sockets are bound
elsewhere (supervisor.py), requests answered elsewhere (connection.py).
"""

from __future__ import annotations

import errno
import math
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog
import trio

from queen.balance import Balance, waiting_at
from queen.observability.doing import ConnectionRecord
from queen.service import Service
from queen.serving.connection import Connection
from queen.serving.lifespan import Lifespan
from queen.serving.tls import Certificate
from queen.serving.watch import Watch

if TYPE_CHECKING:
    from hypercorn.typing import ASGIFramework, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope

    from queen.serving.long_way import LongWay

RECEIVE_BYTES: Final = 256 * 1024
"""What one receive can take. One buffer serves all connections of a process; most bodies of 1,000 messages fit."""

FIRST_REQUEST_SECONDS: Final = 1.0
"""How long the last connections that are accepted have for a first request."""

HAND_ON_SECONDS: Final = 0.05
"""Between two tries to hand on what is idle. The queue between workers has room for some hundreds at a time."""

ACCEPT_PAUSE_SECONDS: Final = 0.1
"""Between two tries to accept when no descriptor or no memory is left. Connections wait in the backlog meanwhile."""

SAY_AGAIN_SECONDS: Final = 10.0  # how often such a shortage is told of while it lasts

NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

log = structlog.get_logger("queen.http")


class HowToServe(msgspec.Struct, frozen=True):
    """What a client, and the application, may take their time for."""

    startup_seconds: float = 600.0  # migrations of a large database run in it, and other workers wait for them
    shutdown_seconds: float = 20.0
    keep_alive_seconds: float = 75.0  # longer than the 60 s that proxies keep an idle connection
    max_header_bytes: int = 64 * 1024  # the long way


class HowToDrain(msgspec.Struct, frozen=True):
    """What becomes of the connections of a server that is to end.

    ``linger_seconds``: how long an idle connection may stay, so that none is ended while its client sends. Others that
    even out connections with this one are given it; else a request that still comes on it is answered, and told that
    it was the last. ``keep_backlog``: others accept from the same socket; without them, what waits there is accepted as
    the last.
    """

    grace_seconds: float = 0.0  # what is left then is cut off
    linger_seconds: float = 0.0
    keep_backlog: bool = False


@dataclass
class Load:
    """What a server has to do now."""

    connections: int = 0
    balance: Balance | None = None  # with other workers of this server; set before there is a listener
    doing: Callable[[], list[ConnectionRecord]] = list  # of those that are served the short way

    def change(self, connections: int) -> None:
        self.connections += connections
        if self.balance is not None:
            self.balance.note(self.connections)


async def serve(
    app: ASGIFramework,
    service: object,
    how_to_serve: HowToServe,
    wait_listener: Callable[[], Awaitable[socket.socket | None]],
    *,
    wait_drain: Callable[[], Awaitable[HowToDrain]],
    certificate: Certificate | None = None,
    load: Load | None = None,
) -> None:
    """Open the lifespan of ``app``, serve, and close it when ``wait_drain`` returns and connections have ended.

    From then on nothing is accepted, idle connections end and others after the answer they are at; what is left after
    the grace is cancelled, whether its client reads or not.

    Args:
        service: what is behind ``app``, to serve plain HTTP/1.1 without it. Anything but a Service of ours leaves all
            of it to hypercorn, and so does ``fast_http`` when it is off, and so does TLS.
        wait_listener: called when the app is open; the listening socket, which is closed in the end, or None to serve
            nothing.
        certificate: to speak TLS with; None: in clear.
    """
    fast = isinstance(service, Service) and service.settings.fast_http
    load = load or Load()
    state: dict[str, Any] = {}
    guests = Guests(app, how_to_serve, state)
    lifespan = Lifespan(app, state)
    watch = Watch(how_to_serve.keep_alive_seconds)
    load.doing = watch.doing
    buffer = memoryview(bytearray(RECEIVE_BYTES))

    async def serve_fast(accepted: trio.SocketStream) -> None:
        assert isinstance(service, Service)
        with socket.socket(fileno=accepted.socket.detach()) as connected:
            connected.setblocking(False)
            foreign = await Connection(service, watch, connected, buffer).run()
            if foreign is not None:
                await guests.serve(ReplayedStream(connected, foreign))

    async def serve_connection(accepted: trio.SocketStream) -> None:
        load.change(+1)
        try:
            if certificate is not None:
                context_now = certificate.context
                await guests.serve(trio.SSLStream(accepted, context_now, server_side=True, https_compatible=True))
            elif fast:
                await serve_fast(accepted)
            else:
                await guests.serve(accepted)
        finally:
            load.change(-1)

    async def serve_or_hand_on(accepted: trio.SocketStream) -> None:
        if load.balance is not None and load.balance.is_heavy and load.balance.hand_on(accepted.socket.fileno()):
            return
        await serve_connection(accepted)

    async def hand_on_idle(balance: Balance) -> None:
        while True:
            watch.bequeath(balance.give)
            await trio.sleep(HAND_ON_SECONDS)

    async def end_idle(seconds: float, heirs: Balance | None = None) -> None:
        with trio.move_on_after(seconds):
            if heirs is not None:
                await hand_on_idle(heirs)
            await trio.sleep_forever()
        watch.drain()
        watch.end_idle()
        await guests.end_idle()

    async with trio.open_nursery() as lifespan_task:
        lifespan_task.start_soon(lifespan.run)
        await lifespan.open(how_to_serve.startup_seconds)
        if certificate is not None or not fast:
            await guests.load()
        listener = await wait_listener()
        async with trio.open_nursery() as watching:
            watching.start_soon(watch.run)
            async with trio.open_nursery() as connections:
                if listener is not None:
                    with listener:
                        how = await accept(listener, serve_or_hand_on, connections, wait_drain, load.balance)
                else:
                    how = await wait_drain()
                connections.cancel_scope.deadline = trio.current_time() + how.grace_seconds
                guests.last = True
                if how.linger_seconds:
                    if load.balance is None:
                        watch.drain()
                    watching.start_soon(end_idle, how.linger_seconds, load.balance)
                else:
                    watch.drain()
                    watch.end_idle(unused=False)
                    watching.start_soon(end_idle, FIRST_REQUEST_SECONDS)
                    await guests.end_idle(unused=False)
            watching.cancel_scope.cancel()
        await lifespan.close(how_to_serve.shutdown_seconds)
        lifespan_task.cancel_scope.cancel()


async def accept(
    listener: socket.socket,
    serve_connection: Callable[[trio.SocketStream], Awaitable[None]],
    connections: trio.Nursery,
    wait_drain: Callable[[], Awaitable[HowToDrain]],
    balance: Balance | None,
) -> HowToDrain:
    """Accept connections, and take those that others hand on, until it is time to drain; returns how that is to be
    done.

    Unless somebody else goes on, what the kernel has accepted by then is taken too: to close the socket on it would be
    a reset for clients that have done nothing wrong.
    """
    listener.setblocking(False)

    async def serve_one(stream: trio.SocketStream) -> None:
        async with stream:
            await serve_connection(stream)

    def begin(stream: trio.SocketStream) -> None:
        connections.start_soon(serve_one, stream)

    def serve_taken(connected: socket.socket) -> None:
        begin(trio.SocketStream(trio.socket.from_stdlib_socket(connected)))

    async with trio.open_nursery() as accepting:
        accepting.start_soon(accept_all, listener, begin)
        if balance is not None:
            accepting.start_soon(balance.run, serve_taken)
        how = await wait_drain()
        accepting.cancel_scope.cancel()

    if balance is not None:
        balance.leave(replaced=how.keep_backlog)
        while not how.keep_backlog and (taken := balance.take_nowait()) is not None:
            serve_taken(taken)
    if not how.keep_backlog:
        for connected in waiting_at(listener):
            serve_taken(connected)
    return how


async def accept_all(listener: socket.socket, begin: Callable[[trio.SocketStream], None]) -> None:
    """Accept until cancelled, which leaves the socket open. With no descriptor left it pauses, and goes on when one is
    there again."""
    accepting = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
    said_at = -math.inf
    while True:
        try:
            stream = await accepting.accept()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            if (now := trio.current_time()) >= said_at + SAY_AGAIN_SECONDS:
                said_at = now
                log.error("cannot accept: connections wait", reason=error.strerror)
            await trio.sleep(ACCEPT_PAUSE_SECONDS)
        else:
            begin(stream)


class Guests:
    """The connections that hypercorn serves. With ``last``, answers tell HTTP/1.1 clients that nothing follows.

    Where all that comes is plain HTTP/1.1 there are none, and hypercorn with its parsers, 4 MB, is never loaded.
    """

    def __init__(self, app: ASGIFramework, how: HowToServe, state: dict[str, Any]) -> None:
        self.app = app
        self.last = False
        self._how = how
        self._state = state
        self._present: set[Guest] = set()
        self._long_way: LongWay | None = None
        self._loading = trio.Lock()

    async def load(self) -> LongWay:
        """What serves them. In a thread: others need not wait for a tenth of a second's imports."""
        async with self._loading:
            if self._long_way is None:
                make = await trio.to_thread.run_sync(_import_long_way)
                self._long_way = make(self._how, self._state)
            return self._long_way

    async def serve(self, stream: Any) -> None:
        """Serve one connection until it ends."""
        try:
            long_way = await self.load()
            guest = Guest(self, long_way.new_context())
            self._present.add(guest)
            try:
                await long_way.serve(guest, guest.context, stream)
            finally:
                self._present.discard(guest)
        except Exception as error:  # a bug ends this connection and not its neighbours
            log.error("unexpected error", exc_info=error)

    async def end_idle(self, *, unused: bool = True) -> None:
        """End connections that wait for a request. Without ``unused``, not those that wait for their first one."""
        for guest in list(self._present):
            if unused or guest.used:
                await guest.context.terminated.set()


class Guest:
    """The app as one connection sees it. By its ``context`` hypercorn is told to end the connection when it is idle."""

    def __init__(self, guests: Guests, context: Any) -> None:
        self.used = False  # it has had a request
        self.context = context
        self._guests = guests

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        self.used = True

        async def send_last(message: ASGISendEvent) -> None:
            if self._guests.last and message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        closes = scope["type"] == "http" and scope["http_version"].startswith("1")
        await self._guests.app(scope, receive, send_last if closes else send)


def _import_long_way() -> type[LongWay]:
    from queen.serving.long_way import LongWay

    return LongWay


class ReplayedStream:
    """A connection from which something has been received already: it is received again, first."""

    def __init__(self, connected: socket.socket, received: bytes) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(connected))
        self._received = received

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._received:
            return await self._stream.receive_some(max_bytes)
        await trio.lowlevel.checkpoint()
        first, self._received = self._received[:max_bytes], self._received[max_bytes or len(self._received) :]
        return first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
