"""The same requests on the short path: bytes through a pair of sockets, answered by a connection of queen.serving.

``QUEEN_TEST_FAST_HTTP=1 pytest tests/http`` runs the suite this way. What only ASGI can express (a mounted application,
a client looked at piece by piece) stays with ASGI.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import h11
import trio

from queen.serving.connection import Connection
from queen.serving.watch import Watch

from .asgi_driver import Answer, Exchange, Http


class FastHttp(Http):
    """Talks to the service behind an application, past the application."""

    async def request(self, method: str, target: str, body: Any = b"", **others: Any) -> Answer:
        answer = None
        if method != "HEAD" and set(others) <= {"headers"}:  # on the wire, HEAD has no body to look at
            exchange = self.open(method, target, body, **others)
            answer = await self._exchange(exchange, method, target, others.get("headers") or {})
        return answer or await super().request(method, target, body, **others)

    async def _exchange(
        self, exchange: Exchange, method: str, target: str, headers: Mapping[str, str]
    ) -> Answer | None:
        """The answer; None when a server would have left it to hypercorn, and so to the application."""
        ours, theirs = socket.socketpair()
        foreign: list[bytes | None] = []
        with ours, theirs:
            theirs.setblocking(False)
            client = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            connection = Connection(self.app.service, Watch(75), theirs, memoryview(bytearray(65536)))

            async def serve() -> None:
                foreign.append(await connection.run())
                theirs.close()

            async with trio.open_nursery() as server:
                server.start_soon(serve)
                for piece in (head_of(exchange, method, target, headers), *exchange._pieces):
                    await client.send_all(piece)
                answer = await receive(client, method)
        return answer if foreign == [None] else None


def head_of(exchange: Exchange, method: str, target: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in ({"Host": "queen.test"} | dict(headers)).items()]
    if length := sum(map(len, exchange._pieces)):
        lines.append(f"Content-Length: {length}")
    return "\r\n".join([*lines, "", ""]).encode()


async def receive(client: trio.SocketStream, method: str) -> Answer | None:
    """The answer to a request that was sent already; None when the connection ends before it has begun."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method=method, target="/", headers=[("Host", "queen.test")]))
    parser.send(h11.EndOfMessage())
    head: h11.Response | None = None
    chunks: list[bytes] = []
    while True:
        event = parser.next_event()
        if event is h11.NEED_DATA:
            parser.receive_data(data := await client.receive_some())
            if not data:
                return None
        elif isinstance(event, h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            if event.chunk_start or not chunks:
                chunks.append(b"")
            chunks[-1] += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            break
    assert head is not None
    names = [name.decode() for name, _ in head.headers]
    assert len(set(names)) == len(names), f"a header came twice: {names}"
    hop = {"connection", "date", "transfer-encoding"}  # of the connection: an application does not send them
    fields = {name.decode(): value.decode() for name, value in head.headers if name.decode() not in hop}
    return Answer(head.status_code, fields, chunks)
