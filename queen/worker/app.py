"""The application that workers serve: its lifespan is ours, its requests are Quart's (``queen.app``), loaded with the
first that is no plain HTTP/1.1.

Plain ones never come here (``queen.serving``), and most servers are never sent any other: they do without Quart and
what it stands on, 9 MB a worker.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import trio

from queen.config.settings import Settings
from queen.service import Service

if TYPE_CHECKING:
    from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, Scope

    from queen.app import QueenApp


def create_app(settings: Settings) -> WorkerApp:
    """The server as the ASGI application of one worker process."""
    return WorkerApp(settings)


class WorkerApp:
    """Served by ``queen.serving`` and nobody else, which sends it requests only while its lifespan is open."""

    def __init__(self, settings: Settings) -> None:
        self.service = Service(settings)
        self.extensions = {"queen": self.service}
        self._quart: QueenApp | None = None
        self._loading = trio.Lock()
        self._nursery: trio.Nursery
        self._closing = trio.Event()

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        if scope["type"] == "lifespan":
            await self.service.live(receive, send, self._enter)
        else:
            quart = self._quart or await self._load()
            await quart(scope, receive, send)

    async def _enter(self, stack: AsyncExitStack) -> None:
        self._nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(self._closing.set)
        settings = self.service.settings
        if not settings.fast_http or settings.tls_cert is not None:  # every request comes here
            await self._load()

    async def _load(self) -> QueenApp:
        async with self._loading:
            if self._quart is None:
                self._quart = await self._nursery.start(self._run_quart)
            return self._quart

    async def _run_quart(self, *, task_status: trio.TaskStatus[QueenApp]) -> None:
        make = await trio.to_thread.run_sync(_import_app)  # in a thread: others go on in the half second that it takes
        app = make(self.service.settings, self.service)
        async with AsyncExitStack() as stack:
            await app.enter(stack)
            task_status.started(app)
            await self._closing.wait()


def _import_app() -> type[QueenApp]:
    from queen.app import QueenApp

    return QueenApp
