"""How hypercorn serves a connection: what speaks TLS or HTTP/2, or asks for an upgrade. Loaded when one does."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Event, Updated
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState

if TYPE_CHECKING:
    from queen.serving.serve import HowToServe


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
    """A connection of hypercorn's that ends when its client has left, not when it has been idle for long enough."""

    _left = False

    async def _read_data(self) -> None:
        await super()._read_data()
        self._left = True
        await self.idle_task.stop()

    async def protocol_send(self, event: Event) -> None:
        if not (self._left and isinstance(event, Updated)):  # of what it was at: it would begin to be idle
            await super().protocol_send(event)


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
