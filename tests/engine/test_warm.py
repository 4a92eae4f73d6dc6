"""What a worker does before its first request so that it is not slow: it changes nothing."""

from __future__ import annotations

import pytest

from queen.config.settings import Settings
from queen.storage.bridge import open_bridge
from queen.storage.connect import Connection, open_connection
from queen.storage.loop import open_asyncio
from queen.storage.warm import STATEMENTS, run_for_nothing, warm


@pytest.mark.buckets
async def test_warming_up_writes_nothing_and_leaves_every_statement_prepared(settings: Settings) -> None:
    async def connect() -> Connection:
        return await open_connection(settings)

    async def written(connection: Connection) -> str | None:
        async with connection.transaction():
            await run_for_nothing(connection)
            transaction: str | None = await connection.fetchval("SELECT pg_current_xact_id_if_assigned()::text")
            return transaction

    async def prepared(connection: Connection) -> set[str]:
        return {row[0] for row in await connection.fetch("SELECT statement FROM pg_prepared_statements")}

    async with open_asyncio(), open_bridge(connect, 1) as bridge:
        await warm(bridge)
        assert set(STATEMENTS) <= await bridge.run(prepared)
        assert await bridge.run(written) is None
