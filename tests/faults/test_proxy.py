"""The proxy does what it is told: forwards, loses a reply after the work is done, swallows, refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

from .proxy import READY_FOR_QUERY, Proxy


@asynccontextmanager
async def open_proxied() -> AsyncIterator[tuple[Proxy, list[bytes]]]:
    """A proxy before a server that writes down each request and answers that it is ready."""
    asked: list[bytes] = []

    async def answer(stream: trio.SocketStream) -> None:
        async for request in stream:
            asked.append(bytes(request))
            await stream.send_all(b"done" + READY_FOR_QUERY)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    proxy = Proxy(partial(trio.open_tcp_stream, "127.0.0.1", listener.socket.getsockname()[1]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, answer, [listener])
        await nursery.start(proxy.run)
        yield proxy, asked
        nursery.cancel_scope.cancel()


async def test_what_is_said_passes_both_ways() -> None:
    async with open_proxied() as (proxy, asked), await trio.open_tcp_stream("127.0.0.1", proxy.port) as client:
        await client.send_all(b"COMMIT")

        assert await client.receive_some() == b"done" + READY_FOR_QUERY
        assert asked == [b"COMMIT"]


async def test_a_lost_reply_is_one_to_work_that_was_done() -> None:
    async with open_proxied() as (proxy, asked), await trio.open_tcp_stream("127.0.0.1", proxy.port) as client:
        proxy.lose_replies(b"COMMIT", 1.0)
        await client.send_all(b"SELECT")
        assert await client.receive_some() == b"done" + READY_FOR_QUERY
        await client.send_all(b"COMMIT")

        assert await client.receive_some() == b""
        assert asked == [b"SELECT", b"COMMIT"]
        assert proxy.replies_lost == 1


async def test_a_proxy_that_refuses_ends_new_connections_until_it_is_healed() -> None:
    async with open_proxied() as (proxy, _):
        proxy.refuses = True
        async with await trio.open_tcp_stream("127.0.0.1", proxy.port) as client:
            assert await client.receive_some() == b""
        proxy.heal()

        async with await trio.open_tcp_stream("127.0.0.1", proxy.port) as client:
            await client.send_all(b"SELECT")
            assert await client.receive_some() == b"done" + READY_FOR_QUERY
