"""A TCP proxy before PostgreSQL that can be told to misbehave: lose replies, swallow a direction, wait, refuse.

It knows one thing of the protocol: a request that ends in Sync (or is a simple query) is answered up to
ReadyForQuery. Losing a reply means that PostgreSQL has done the work and said so, and the client never hears.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Awaitable, Callable

import trio

CHUNK = 65536
READY_FOR_QUERY = b"Z\x00\x00\x00\x05"  # whatever was asked is done; outside a transaction it is committed


class Proxy:
    """Forwards connections of ``port`` to what ``connect`` opens."""

    def __init__(self, connect: Callable[[], Awaitable[trio.SocketStream]], seed: int = 0) -> None:
        self._connect = connect
        self.port = 0
        self.replies_lost = 0
        self.connections = 0
        self.delay_seconds = 0.0  # of everything the server says
        self.swallows_replies = False  # half open: requests arrive, replies do not
        self.refuses = False
        self._lose: Callable[[bytes], bool] | None = None
        self._draw = random.Random(seed)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._serve, [listener])

    def lose_replies(self, needle: bytes, probability: float) -> None:
        """From now on lose the reply to a request that contains the needle, with that probability, and hang up."""
        self._lose = lambda request: needle in request and self._draw.random() < probability

    def heal(self) -> None:
        """Misbehave no more."""
        self._lose, self.delay_seconds, self.swallows_replies, self.refuses = None, 0.0, False, False

    async def _serve(self, client: trio.SocketStream) -> None:
        if self.refuses:
            return
        self.connections += 1
        try:
            server = await self._connect()
        except OSError:
            return  # it is down: the client sees a connection that ends
        line = _Line(self, client, server)
        async with server, trio.open_nursery() as both:
            both.start_soon(line.pump, line.requests, both.cancel_scope)
            both.start_soon(line.pump, line.replies, both.cancel_scope)

    def loses(self, request: bytes) -> bool:
        return self._lose is not None and self._lose(request)


class _Line:
    """One connection through the proxy."""

    def __init__(self, proxy: Proxy, client: trio.SocketStream, server: trio.SocketStream) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._losing = False

    async def pump(self, direction: Callable[[], Awaitable[None]], both: trio.CancelScope) -> None:
        """One direction; with its end, the connection ends."""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # either side is gone
            await direction()
        both.cancel()

    async def requests(self) -> None:
        async for received in self._client:
            chunk = bytes(received)
            self._losing = self._losing or self._proxy.loses(chunk)
            await self._server.send_all(chunk)

    async def replies(self) -> None:
        async for chunk in self._server:
            if self._losing:
                if READY_FOR_QUERY in chunk:
                    self._proxy.replies_lost += 1
                    return
                continue
            if self._proxy.delay_seconds:
                await trio.sleep(self._proxy.delay_seconds)
            if not self._proxy.swallows_replies:
                await self._client.send_all(chunk)
