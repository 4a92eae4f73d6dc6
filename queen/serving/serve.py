"""Serve an application on listening sockets until told to stop: its lifespan, its connections, and the drain.

What hypercorn does in ``hypercorn.trio.run.worker_serve``, with another way for plain HTTP/1.1. Sockets are bound
elsewhere (supervisor.py), requests answered elsewhere (connection.py).
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import structlog
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config, Sockets
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.run import worker_serve
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState, LifespanState

from queen.service import Service
from queen.serving.connection import Connection
from queen.serving.tls import Certificate
from queen.serving.watch import Watch

RECEIVE_BYTES: Final = 256 * 1024
"""What one receive can take. One buffer serves all connections of a process; most bodies of 1,000 messages fit."""

log = structlog.get_logger("queen.http")


async def serve(
    app: ASGIFramework,
    service: object,
    config: Config,
    sockets: Sockets,
    *,
    shutdown_trigger: Callable[[], Awaitable[None]],
    certificate: Certificate | None = None,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Open the lifespan of ``app``, serve, and close it when ``shutdown_trigger`` returns.

    From then on nothing is accepted, idle connections end at once and others after the answer they are at; what is
    left after ``config.graceful_timeout``, read at that moment, is cancelled, whether its client reads or not.

    Args:
        service: what is behind ``app``, to serve plain HTTP/1.1 without it. Anything but a Service of ours leaves all
            of it to hypercorn, and so does ``fast_http`` when it is off, and so does TLS.
        sockets: listening, the insecure ones, with TLS too; closed in the end.
        certificate: to speak TLS with; None: in clear.
    """
    fast = isinstance(service, Service) and service.settings.fast_http
    if certificate is None and not fast:
        await worker_serve(
            ASGIWrapper(app), config, sockets=sockets, shutdown_trigger=shutdown_trigger, task_status=task_status
        )
        return
    state: LifespanState = {}
    lifespan = Lifespan(ASGIWrapper(app), config, state)
    context = WorkerContext(None)
    watch = Watch(config.keep_alive_timeout)
    buffer = memoryview(bytearray(RECEIVE_BYTES))

    async def serve_tls(accepted: trio.SocketStream) -> None:
        assert certificate is not None
        stream = trio.SSLStream(accepted, certificate.context, server_side=True, https_compatible=True)
        try:
            await TCPServer(ASGIWrapper(app), config, context, ConnectionState(state.copy()), stream)
        except Exception as error:  # a bug ends this connection and not its neighbours
            log.error("unexpected error", exc_info=error)

    async def serve_plain(accepted: trio.SocketStream) -> None:
        assert isinstance(service, Service)
        with socket.socket(fileno=accepted.socket.detach()) as connected:
            connected.setblocking(False)
            foreign = await Connection(service, watch, connected, buffer).run()
            if foreign is None:
                return
            stream = ReplayedStream(connected, foreign)
            await TCPServer(ASGIWrapper(app), config, context, ConnectionState(state.copy()), stream)  # type: ignore[arg-type]

    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(each)) for each in sockets.insecure_sockets]
    async with trio.open_nursery() as lifespan_task:
        await lifespan_task.start(lifespan.handle_lifespan)
        await lifespan.wait_for_startup()
        async with trio.open_nursery() as watching:
            watching.start_soon(watch.run)
            async with trio.open_nursery() as connections:
                async with trio.open_nursery() as accepting:
                    accepting.start_soon(
                        partial(
                            trio.serve_listeners,
                            serve_plain if certificate is None else serve_tls,
                            listeners,
                            handler_nursery=connections,
                        )
                    )
                    task_status.started([repr(each.getsockname()) for each in sockets.insecure_sockets])
                    await shutdown_trigger()
                    accepting.cancel_scope.cancel()
                watch.drain()
                await context.terminated.set()
                connections.cancel_scope.deadline = trio.current_time() + config.graceful_timeout
            watching.cancel_scope.cancel()
        await lifespan.wait_for_shutdown()
        lifespan_task.cancel_scope.cancel()


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
