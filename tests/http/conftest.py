"""The application in process: one for each test on a database of its own, and one that stands through the whole run."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from queen.app import QueenApp
from queen.config.settings import Secret, Settings

from .asgi_driver import Http, Standing, open_app
from .fast_driver import FastHttp

WAY = FastHttp if os.environ.get("QUEEN_TEST_FAST_HTTP") == "1" else Http
"""The whole suite runs either way: see fast_driver.py."""


@pytest.fixture
async def app(settings: Settings) -> AsyncIterator[QueenApp]:
    """An application on the test's own database."""
    async with open_app(settings) as app:
        yield app


@pytest.fixture
async def http(app: QueenApp) -> Http:
    return WAY(app)


@pytest.fixture(scope="session")
def standing(postgres: Any) -> Iterator[Standing]:
    buckets = int(os.environ.get("QUEEN_TEST_BUCKETS", "1"))
    name = postgres.create_migrated(buckets)
    settings = Settings(database_url=Secret(postgres.url(name)), buckets=buckets, db_pool_size=4)
    standing = Standing(settings, WAY)
    standing.start()
    yield standing
    standing.stop()
    postgres.drop(name)
