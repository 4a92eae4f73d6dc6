"""An ASGI server for tests: requests by raw target, bodies in pieces, hang-ups, clients that stop reading."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import unquote

import msgspec
import trio

from queen.app import QueenApp, create_app
from queen.config.settings import Settings


class Answer(msgspec.Struct, frozen=True):
    """What came back. ``chunks``: the body as it was sent, piece by piece."""

    status: int
    headers: dict[str, str]
    chunks: list[bytes]

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"])


class Exchange:
    """One request under way, as the server's side of ASGI sees it."""

    def __init__(
        self, app: Any, method: str, target: str, pieces: Sequence[bytes], headers: Mapping[str, str], root_path: str
    ) -> None:
        raw_path, _, query = target.partition("?")
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.1"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(raw_path),
            "raw_path": raw_path.encode(),
            "query_string": query.encode(),
            "root_path": root_path,
            "headers": [(b"host", b"queen.test"), *((k.lower().encode(), v.encode()) for k, v in headers.items())],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 6632),
            "extensions": {},
        }
        self._app = app
        self._pieces = list(pieces)
        self._hung_up = trio.Event()
        self.sent: list[dict[str, Any]] = []
        self.started = trio.Event()
        self.received = 0
        """Pieces of the body that the application has taken."""
        self.may_send = trio.Event()
        """Cleared (replaced) by a test, the client stops reading: sends wait."""
        self.may_send.set()

    async def run(self) -> None:
        await self._app(self.scope, self._receive, self._send)

    def hang_up(self) -> None:
        self._hung_up.set()

    async def _receive(self) -> dict[str, Any]:
        if self._pieces:
            self.received += 1
            await trio.lowlevel.checkpoint()
            return {"type": "http.request", "body": self._pieces.pop(0), "more_body": bool(self._pieces)}
        await self._hung_up.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.may_send.wait()
        await trio.lowlevel.checkpoint()
        self.sent.append(message)
        self.started.set()

    @property
    def complete(self) -> bool:
        return len(self.sent) > 1 and not self.sent[-1].get("more_body", False)

    @property
    def answer(self) -> Answer:
        start, *bodies = self.sent
        headers = [(name.decode().lower(), value.decode()) for name, value in start["headers"]]
        assert len(dict(headers)) == len(headers), f"a header came twice: {headers}"
        return Answer(start["status"], dict(headers), [body["body"] for body in bodies if body.get("body")])


class Http:
    """Talks to an application without a network."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def open(
        self,
        method: str,
        target: str,
        body: bytes | Sequence[bytes] | Any = b"",
        headers: Mapping[str, str] | None = None,
        root_path: str = "",
    ) -> Exchange:
        """A request that is not running yet. ``body``: bytes, bytes in pieces, or anything that is JSON."""
        if isinstance(body, bytes):
            pieces: Sequence[bytes] = [body]
        elif isinstance(body, list) and all(isinstance(piece, bytes) for piece in body) and body:
            pieces = body
        else:
            pieces = [json.dumps(body).encode()]
        return Exchange(self.app, method, target, pieces, headers or {}, root_path)

    async def request(self, method: str, target: str, body: Any = b"", **others: Any) -> Answer:
        """A request and its whole answer."""
        exchange = self.open(method, target, body, **others)
        await exchange.run()
        assert exchange.complete
        return exchange.answer

    async def get(self, target: str, **others: Any) -> Answer:
        return await self.request("GET", target, **others)

    async def post(self, target: str, body: Any = b"", **others: Any) -> Answer:
        return await self.request("POST", target, body, **others)

    async def push(self, queue: str, *payloads: Any, **fields: Any) -> list[Any]:
        """Push one message for each payload; their results."""
        items = [{"queue": queue, "payload": payload, **fields} for payload in payloads]
        answer = await self.post("/api/v1/push", {"items": items})
        assert answer.status == 201, answer.body
        results: list[Any] = answer.json
        return results


class StartupFailed(Exception):
    """What the application said of it."""


@asynccontextmanager
async def run_lifespan(app: Any) -> AsyncIterator[None]:
    """Start an application as a server does, and stop it. An application that ends by itself ends the block."""
    tell, hear = trio.open_memory_channel[dict[str, Any]](1)
    say, listen = trio.open_memory_channel[dict[str, Any]](1)
    scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": {}}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(app, scope, hear.receive, say.send)
        await tell.send({"type": "lifespan.startup"})
        started = await listen.receive()
        if started["type"] == "lifespan.startup.failed":
            raise StartupFailed(started["message"])
        assert started == {"type": "lifespan.startup.complete"}
        yield
        await tell.send({"type": "lifespan.shutdown"})
        assert await listen.receive() == {"type": "lifespan.shutdown.complete"}


@asynccontextmanager
async def open_app(settings: Settings) -> AsyncIterator[QueenApp]:
    app = create_app(settings)
    async with run_lifespan(app):
        yield app


class Standing:
    """An application that lives through the whole run, in a thread, for requests that leave nothing behind."""

    def __init__(self, settings: Settings, kind: type[Http] = Http) -> None:
        self._settings = settings
        self._kind = kind
        self._ready = threading.Event()
        self._closing: trio.Event
        self._token: trio.lowlevel.TrioToken
        self._http: Http
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def request(self, method: str, target: str, body: Any = b"", headers: Mapping[str, str] | None = None) -> Answer:
        async def exchange() -> Answer:
            return await self._http.request(method, target, body, headers=headers)

        return trio.from_thread.run(exchange, trio_token=self._token)

    def stop(self) -> None:
        trio.from_thread.run_sync(self._closing.set, trio_token=self._token)
        self._thread.join()

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as failure:  # noqa: BLE001  handed to the thread that waits
            self._failure = failure
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._closing = trio.Event()
        async with open_app(self._settings) as app:
            self._http = self._kind(app)
            self._ready.set()
            await self._closing.wait()
