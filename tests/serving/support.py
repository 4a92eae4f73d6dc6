"""A server on a socket in this process, either way of serving, and a client that sees bytes."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httptools
import msgspec
import trio

from queen.app import create_app
from queen.balance import Balance
from queen.config.settings import Settings
from queen.service import Service
from queen.serving.serve import HowToDrain, HowToServe, Load, serve
from queen.serving.tls import Certificate

PATIENCE_SECONDS = 10.0
"""How long a test waits for bytes that must come. Past it the test fails."""


@dataclass
class Server:
    """A running server. ``stop`` begins the drain; ``stopped`` is set when all of it has ended."""

    port: int
    service: Service
    how_to_drain: HowToDrain = field(default_factory=lambda: HowToDrain(grace_seconds=20.0))
    load: Load = field(default_factory=Load)
    stop: trio.Event = field(default_factory=trio.Event)
    stopped: trio.Event = field(default_factory=trio.Event)

    async def connect(self, receive_buffer_bytes: int | None = None) -> Client:
        connecting = trio.socket.socket()
        if receive_buffer_bytes is not None:
            connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        await connecting.connect(("127.0.0.1", self.port))
        return Client(trio.SocketStream(connecting))


@asynccontextmanager
async def open_server(
    settings: Settings,
    *,
    fast: bool,
    keep_alive_seconds: float = 75.0,
    certificate: Certificate | None = None,
    balance: Balance | None = None,
    make: Callable[[Settings], Any] = create_app,
) -> AsyncIterator[Server]:
    """Serve on a free port; drained and stopped at the end of the block."""
    app = make(msgspec.structs.replace(settings, fast_http=fast))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(listener.getsockname()[1], app.service, load=Load(balance=balance))

        async def run(*, task_status: trio.TaskStatus[Any]) -> None:
            async def take_listener() -> socket.socket:
                task_status.started()
                return listener.dup()

            async def told_to_drain() -> HowToDrain:
                await server.stop.wait()
                return server.how_to_drain

            await serve(
                app,
                app.service,
                HowToServe(keep_alive_seconds=keep_alive_seconds),
                take_listener,
                wait_drain=told_to_drain,
                certificate=certificate,
                load=server.load,
            )
            server.stopped.set()

        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            listener.close()
            try:
                yield server
            finally:
                server.how_to_drain = HowToDrain(grace_seconds=1.0)
                server.stop.set()


@dataclass
class Answer:
    """What came back for one request. ``complete``: its end came, and not only the end of the connection."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    complete: bool = False

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class Client:
    """One connection. Answers are parsed by llhttp's other half, so that framing is checked too."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.answers: list[Answer] = []
        self._taken = 0
        self._parser = httptools.HttpResponseParser(self)
        self._methods: list[bytes] = []

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def receive(self, *, to_head: bool = False) -> Answer | None:
        """The next answer (or what came of it); None when the server has closed the connection before it."""
        with trio.fail_after(PATIENCE_SECONDS):
            while not self._has_next(to_head):
                try:
                    data = await self.stream.receive_some(65536)
                except trio.BrokenResourceError:
                    data = b""
                if not data:
                    break
                self._parser.feed_data(data)
        if self._taken == len(self.answers):
            return None
        self._taken += 1
        return self.answers[self._taken - 1]

    def _has_next(self, to_head: bool) -> bool:
        return self._taken < len(self.answers) and (to_head or self.answers[self._taken].complete)

    async def exchange(self, data: bytes) -> Answer:
        await self.send(data)
        answer = await self.receive()
        assert answer is not None, "the server closed the connection without an answer"
        return answer

    async def is_open(self) -> bool:
        """Whether the server still answers on this connection."""
        try:
            await self.send(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        except trio.BrokenResourceError:
            return False
        answer = await self.receive()
        return answer is not None and answer.status == 200

    async def aclose(self) -> None:
        await self.stream.aclose()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # called by llhttp

    def on_message_begin(self) -> None:
        self.answers.append(Answer())

    def on_header(self, name: bytes, value: bytes) -> None:
        headers, key = self.answers[-1].headers, name.decode().lower()
        assert key not in headers, f"{key} came twice"
        headers[key] = value.decode()

    def on_headers_complete(self) -> None:
        self.answers[-1].status = self._parser.get_status_code()

    def on_body(self, piece: bytes) -> None:
        self.answers[-1].body += piece

    def on_message_complete(self) -> None:
        self.answers[-1].complete = True


def request(method: str, target: str, body: bytes = b"", **headers: str) -> bytes:
    """The bytes of a request; with a Content-Length when it has a body or is a POST."""
    lines = [f"{method} {target} HTTP/1.1", "Host: queen.test"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body
