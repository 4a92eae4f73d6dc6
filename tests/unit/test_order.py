"""Requests that are ready at once are served in the order in which they came."""

from __future__ import annotations

import socket

import pytest
import trio
import trio._core._run as scheduler
from trio.testing import wait_all_tasks_blocked

from queen.worker.order import serve_in_order_of_arrival

CONNECTIONS = 5
TURNS = 20


async def test_connections_readable_in_one_turn_are_read_in_the_order_of_arrival(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler, "_r", scheduler._r)  # put back at the end
    monkeypatch.setattr(scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", False)  # hypothesis shuffles every turn
    serve_in_order_of_arrival()
    served: list[int] = []

    async def connection(index: int, server: trio.socket.SocketType) -> None:
        while await server.recv(1):
            served.append(index)
        server.close()

    async with trio.open_nursery() as connections:
        clients = []
        for index in range(CONNECTIONS):
            client, server = socket.socketpair()
            clients.append(client)
            connections.start_soon(connection, index, trio.socket.from_stdlib_socket(server))
        for turn in range(TURNS):
            await wait_all_tasks_blocked()
            served.clear()
            came = [(turn + 2 * step) % CONNECTIONS for step in range(CONNECTIONS)]
            for index in came:
                clients[index].send(b"x")  # all before the loop turns
            await wait_all_tasks_blocked()
            assert served == came
        for client in clients:
            client.close()
