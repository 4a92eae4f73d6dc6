"""Pushes while PostgreSQL is away or push maintenance is on: kept, answered, and stored in their turn, once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import trio

from queen.config.settings import Settings
from queen.errors import Overloaded, SpoolFull, StorageUnavailable
from queen.model.message import Ack, Buffered

if TYPE_CHECKING:
    from tests.conftest import Broker, OpenBroker, Postgres, Session


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    """Those of a server with a spool."""
    return msgspec.structs.replace(settings, spool_dir=tmp_path / "spool")


class Outage:
    """Takes the test's database away and gives it back."""

    def __init__(self, postgres: Postgres, sql: Session, database: str) -> None:
        self._postgres = postgres
        self._sql = sql
        self._database = database

    async def begin(self) -> None:
        await self._allow("false")
        await self._sql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    async def end(self) -> None:
        await self._allow("true")

    async def _allow(self, allowed: str) -> None:
        statement = f"ALTER DATABASE {self._database} WITH ALLOW_CONNECTIONS {allowed}"
        await trio.to_thread.run_sync(self._postgres.execute, statement)


@pytest.fixture
async def outage(postgres: Postgres, sql: Session) -> AsyncIterator[Outage]:
    outage = Outage(postgres, sql, await sql.fetchval("SELECT current_database()"))
    yield outage
    await outage.end()


def is_buffered(results: Any) -> bool:
    return isinstance(results, Buffered)


async def drained(*brokers: Broker) -> None:
    await brokers[0].wait_until(lambda: not any(broker.engine.spooling.active for broker in brokers), 20)


async def test_a_push_while_postgresql_is_away_is_kept_and_delivered_when_it_is_back(
    broker: Broker, outage: Outage
) -> None:
    await broker.push("q", 1)

    await outage.begin()
    kept = [await broker.push("q", number, partition=name) for number in (2, 3) for name in ("Default", "other")]
    await outage.end()
    await drained(broker)

    assert all(map(is_buffered, kept))
    assert await broker.drain("q", partition="Default") == [1, 2, 3]
    assert await broker.drain("q", partition="other") == [2, 3]
    assert not is_buffered(await broker.push("q", 4))
