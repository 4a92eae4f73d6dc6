"""Who does a job: a connection that is open, whichever is free first; none waits for another to be opened."""

from __future__ import annotations

import asyncio

import pytest
import trio

from queen.config.settings import Settings
from queen.storage.bridge import open_bridge
from queen.storage.connect import Connection, open_connection
from queen.storage.loop import open_asyncio


class Door:
    """Opens connections, from the second on only when it is told to."""

    def __init__(self, settings: Settings) -> None:
        self.opened = 0
        self.asked = 0
        self.prepared = 0
        self._settings = settings
        self._may = asyncio.Event()

    async def connect(self) -> Connection:
        self.asked += 1
        if self.asked > 1:
            await self._may.wait()
        connection = await open_connection(self._settings)
        self.opened += 1
        return connection

    async def prepare(self, _connection: Connection) -> None:
        self.prepared += 1

    async def allow(self, _connection: Connection) -> None:
        self._may.set()


async def backend(connection: Connection) -> int:
    pid: int = connection.get_server_pid()
    return pid


@pytest.fixture
def door(settings: Settings) -> Door:
    return Door(settings)


async def test_a_job_is_done_on_the_open_connection_while_another_is_being_opened(door: Door) -> None:
    pids: set[int] = set()

    async def ask() -> None:
        pids.add(await bridge.run(backend, writes=False))

    async with open_asyncio(), open_bridge(door.connect, 4, door.prepare) as bridge:
        await ask()
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:  # more than one connection can do at once
                for _ in range(20):
                    nursery.start_soon(ask)
        assert len(pids) == 1
        assert (door.asked, door.opened) == (2, 1)  # one at a time

        await bridge.run(door.allow)


async def test_a_job_that_would_wait_is_done_on_another_connection(door: Door) -> None:
    released = asyncio.Event()
    held = trio.Event()

    async def hold(connection: Connection) -> int:
        held.set()
        await released.wait()
        return await backend(connection)

    async def release(connection: Connection) -> int:
        released.set()
        return await backend(connection)

    async with open_asyncio(), open_bridge(door.connect, 2, door.prepare) as bridge:
        await bridge.run(door.allow)
        holding: list[int] = []

        async def holder() -> None:
            holding.append(await bridge.run(hold))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(holder)
            await held.wait()
            with trio.fail_after(10):
                other = await bridge.run(release, writes=False)

        assert holding != [other]
        assert door.prepared == 1  # the one that was opened beside a job


async def test_where_none_is_open_jobs_open_theirs(settings: Settings) -> None:
    door = Door(settings)
    door._may.set()
    async with open_asyncio(), open_bridge(door.connect, 3, door.prepare) as bridge:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(bridge.run, backend)
        assert (door.opened, door.prepared) == (3, 0)


async def test_a_connection_that_falls_silent_while_it_is_opened_keeps_no_job_waiting(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("queen.storage.bridge._OPEN_SECONDS", 0.5)
    door = Door(settings)
    door._may.set()
    silence, silent = asyncio.Event(), trio.Event()

    async def fall_silent(_connection: Connection) -> None:
        silent.set()
        await silence.wait()

    async def break_off(connection: Connection) -> None:
        connection.terminate()

    with trio.fail_after(10):
        async with open_asyncio(), open_bridge(door.connect, 4, fall_silent) as bridge, trio.open_nursery() as jobs:
            await bridge.run(backend)
            for _ in range(2):  # one of them waits, so that another connection is opened
                jobs.start_soon(bridge.run, backend)
            await silent.wait()
            await bridge.run(break_off)  # the only one that is open
            await bridge.run(backend)
        # it was given up, or the end would wait for it
