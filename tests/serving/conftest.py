"""Both ways of serving, each with a server that stands through the whole run and with one for a test of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import trio

from queen.config.settings import Secret, Settings

from .support import Client, Server, open_server


class Standing:
    """A server that lives in a thread, for exchanges that leave nothing behind."""

    def __init__(self, settings: Settings, *, fast: bool) -> None:
        self.fast = fast
        self.server: Server
        self._settings = settings
        self._ready = threading.Event()
        self._closing: trio.Event
        self._token: trio.lowlevel.TrioToken
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        trio.from_thread.run_sync(self._closing.set, trio_token=self._token)
        self._thread.join()

    def _run(self) -> None:
        try:
            trio.run(self._main)
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._closing = trio.Event()
        async with open_server(self._settings, fast=self.fast) as self.server:
            self._ready.set()
            await self._closing.wait()


@pytest.fixture(scope="session", params=[True, False], ids=["fast", "hypercorn"])
def standing(request: pytest.FixtureRequest, postgres: Any) -> Iterator[Standing]:
    buckets = int(os.environ.get("QUEEN_TEST_BUCKETS", "1"))
    name = postgres.create_migrated(buckets)
    settings = Settings(
        database_url=Secret(postgres.url(name)), buckets=buckets, db_pool_size=4, max_body_bytes=100_000
    )
    standing = Standing(settings, fast=request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("queen.app.LINGER_SECONDS", 0.2)
        standing.start()
        yield standing
        standing.stop()
    postgres.drop(name)


@pytest.fixture
async def client(standing: Standing) -> AsyncIterator[Client]:
    """A connection to the standing server."""
    async with await standing.server.connect() as client:
        yield client


@pytest.fixture(params=[True, False], ids=["fast", "hypercorn"])
async def server(request: pytest.FixtureRequest, settings: Settings) -> AsyncIterator[Server]:
    """A server on the test's own database, served either way."""
    async with open_server(settings, fast=request.param) as server:
        yield server


@pytest.fixture
async def fast_server(settings: Settings) -> AsyncIterator[Server]:
    """A server on the test's own database, served the short way."""
    async with open_server(settings, fast=True) as server:
        yield server
