"""The running server behind whatever serves HTTP: engine, counters, draining. Knows no socket and no framework.

``app.py`` answers through Quart and ``serving/`` by itself; both work on one Service.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import sniffio
import structlog
import trio

from queen.auth.access import open_access
from queen.config.settings import PageSettings, Settings
from queen.engine.engine import open_engine
from queen.errors import StartupError, StorageUnavailable
from queen.model.snapshot import Snapshot
from queen.routes import Route
from queen.routes.call import Call, Context, Counters, no_supervisor
from queen.routes.cors import Cors
from queen.routes.paging import limit_page
from queen.routes.paths import decode_segment

log = structlog.get_logger("queen.http")


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """What an application has done since it started, and what it is doing. See ``queen.routes.call.Counters``."""

    requests: int
    failed_requests: int
    pushed: int
    popped: int
    acked: int
    streamed_answers: int
    backpressure_waits: int
    requests_in_flight: int


class Service:
    """The running server behind an application: ``app.extensions["queen"]``.

    ``stopped`` is set when the engine is closed: after a shutdown, or because a part of it failed. In the second
    case the application goes on answering 503, and who runs it should end the process.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.counters = Counters()
        self.cors = Cors(settings.cors)
        self._pages = None if settings.pages == PageSettings() else settings.pages
        self.context: Context | None = None
        self.requests_in_flight = 0
        self.stopped = trio.Event()
        self.ask_supervisor: Callable[[], Awaitable[Snapshot | None]] = no_supervisor
        self._draining = False

    def require_context(self) -> Context:
        """What handlers work with. Raises StorageUnavailable outside the lifespan."""
        if self.context is None:
            raise StorageUnavailable("the server is not running: its lifespan has not started, or has ended")
        return self.context

    def make_call(
        self, route: Route, names: Mapping[str, str], query: bytes, body: bytes, producer_sub: str | None
    ) -> Call:
        """What the handler of a route is given.

        Args:
            names: what stands for the names in its path, still percent-encoded.

        Raises:
            InvalidRequest: the escapes of the path or of the query are not UTF-8.
        """
        parameters = {name: decode_segment(part, name) for name, part in names.items()}
        call = Call(parameters=parameters, query=query, body=body, producer_sub=producer_sub)
        if self._pages is not None:
            limit_page(route, call, self._pages)
        return call

    def begin_drain(self, *, replaced: bool = False) -> None:
        """Shutting down: waiting pops are answered at once. Harmless when repeated.

        Args:
            replaced: the server goes on in another process: ``/readyz`` does not say no.
        """
        self._draining = True
        if self.context is not None:
            self.context.draining = not replaced
            self.context.engine.begin_drain()

    def rename(self, worker_id: str) -> None:
        """This process is known by that name from now on. A spare worker has its name from the slot it takes."""
        self.settings = msgspec.structs.replace(self.settings, worker_id=worker_id)
        if self.context is not None:
            self.context.settings = self.settings
            self.context.engine.monitor.worker_id = worker_id

    def statistics(self) -> Statistics:
        return Statistics(**msgspec.structs.asdict(self.counters), requests_in_flight=self.requests_in_flight)

    async def live(
        self,
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
        enter: Callable[[AsyncExitStack], Awaitable[None]],
    ) -> None:
        """The lifespan that an ASGI server gives: open the engine, serve, close it, all in the one task.

        The engine's nursery stays properly nested that way: if a part of the engine fails, waiting for the shutdown is
        cancelled and the failure comes out here. (As a while_serving generator of Quart it would have been open around
        a yield, which no cancellation passes.)

        Args:
            enter: opens what else there is, to be closed before the engine is.
        """
        await receive()  # lifespan.startup: a server has nothing else to say first
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self.open())
                await enter(stack)
            except Exception as error:  # whatever it is, the server must be told not to serve
                sentence = error.detail if isinstance(error, StartupError) else f"{type(error).__name__}: {error}"
                log.error("cannot start", error=sentence, exc_info=not isinstance(error, StartupError))
                await send({"type": "lifespan.startup.failed", "message": sentence})
                return
            await send({"type": "lifespan.startup.complete"})
            await receive()  # lifespan.shutdown
        await send({"type": "lifespan.shutdown.complete"})

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Open the engine. Raises StartupError with a sentence for the operator."""
        if sniffio.current_async_library() != "trio":  # trio-asyncio runs a loop of asyncio within Trio, too
            raise StartupError("queen-trio runs on Trio, and this server runs on asyncio: start hypercorn with -k trio")
        if self.settings.database_url is None:
            raise StartupError(
                "no database: set QUEEN_DATABASE_URL to postgresql://user:password@host/name (or PG_HOST and its "
                "companions), or start the server with `queen-trio run`, which brings its own"
            )
        try:
            async with (
                open_access(self.settings.jwt, self.settings.spool_dir) as access,
                open_engine(self.settings) as engine,
            ):
                self.context = Context(
                    engine,
                    self.settings,
                    self.counters,
                    trio.current_time(),
                    access,
                    ask_supervisor=self.ask_supervisor,
                )
                engine.monitor.requests = lambda: (self.counters.requests, self.counters.failed_requests)
                try:
                    if self._draining:
                        self.begin_drain()
                    yield
                finally:
                    self.context = None
        finally:
            self.stopped.set()
