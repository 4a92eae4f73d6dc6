"""How hypercorn serves a connection: what speaks TLS or HTTP/2, or asks for an upgrade. Loaded when one does."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
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
        await TCPServer(ASGIWrapper(app), self._config, context, ConnectionState(self._state.copy()), stream)


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
