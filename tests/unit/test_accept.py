"""A worker that has no descriptor left to accept with: it waits, does not spin, does not flood the log, and goes on."""

from __future__ import annotations

import socket

import structlog.testing
import trio
import trio.testing

from queen.serving.serve import SAY_AGAIN_SECONDS, accept_all

from .test_balance import no_descriptor_left


async def test_connections_wait_until_there_is_a_descriptor_for_them(autojump_clock: trio.testing.MockClock) -> None:
    begun: list[trio.SocketStream] = []
    came = trio.Event()

    def begin(stream: trio.SocketStream) -> None:
        begun.append(stream)
        came.set()

    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        listener.setblocking(False)
        async with trio.open_nursery() as nursery:
            with structlog.testing.capture_logs() as logged, no_descriptor_left():
                nursery.start_soon(accept_all, listener, begin)
                await trio.sleep(2.5 * SAY_AGAIN_SECONDS)
                assert not begun
            assert [line["event"] for line in logged] == ["cannot accept: connections wait"] * 3
            assert {line["reason"] for line in logged} == {"Too many open files"}

            await came.wait()
            nursery.cancel_scope.cancel()
        await begun[0].aclose()
        assert listener.fileno() >= 0  # it is whoever opened it that closes it
