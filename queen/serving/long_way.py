"""How hypercorn serves a connection: what speaks TLS or HTTP/2, or asks for an upgrade. Loaded when one does."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, Final

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Closed, Event, Updated
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState

if TYPE_CHECKING:
    from queen.serving.serve import HowToServe

NEWS_SECONDS: Final = 0.05
"""For a connection that is to end because it is idle to begin what has come meanwhile."""


class LongWay:
    """Serves connections, each in the task of who calls.

    Args:
        state: of the application's lifespan; each connection has a copy.
    """

    def __init__(self, how: HowToServe, state: dict[str, Any]) -> None:
        self._config = server_config(how)
        self._state = state

    def new_context(self) -> WorkerContext:
        """For one connection: its ``terminated``, when set, ends it as soon as it is idle."""
        return WorkerContext(None)

    async def serve(self, app: ASGIFramework, context: WorkerContext, stream: Any) -> None:
        """Until the connection ends."""
        await _Connection(ASGIWrapper(app), self._config, context, ConnectionState(self._state.copy()), stream)


class _Connection(TCPServer):
    """A connection of hypercorn's that ends when it is over.

    hypercorn's own waits out the keep-alive after its client has left; answered after it was told to end, it waits for
    ever; and told to end while it is idle, it drops a request that has come meanwhile.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._left = False  # nothing more is received
        self._reading = trio.CancelScope()

    async def _read_data(self) -> None:
        with self._reading:
            await super()._read_data()
        if self._reading.cancelled_caught:
            await self.protocol.handle(Closed())
        self._left = True
        await self.idle_task.stop()

    async def protocol_send(self, event: Event) -> None:
        if self._left and isinstance(event, Updated):  # of what it was at: it would begin to be idle
            return
        await super().protocol_send(event)
        if isinstance(event, Closed):
            self._reading.cancel()

    async def _idle_timeout(self) -> None:
        with trio.move_on_after(self.config.keep_alive_timeout):
            await self.context.terminated.wait()
        await trio.sleep(NEWS_SECONDS)  # cancelled when it begins a request
        with trio.CancelScope(shield=True):
            await self._initiate_server_close()
            self._reading.cancel()


def server_config(how: HowToServe) -> Config:
    """How hypercorn is to serve."""
    config = Config()
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    config.include_server_header = False
    config.keep_alive_timeout = how.keep_alive_seconds
    config.keep_alive_max_requests = sys.maxsize  # a producer's connection is used for as long as it likes
    config.h11_max_incomplete_size = how.max_header_bytes
    return config
