"""Bringing a database to the form this code knows: once, together, step by step, and never backwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import asyncpg
import msgspec
import pytest
import trio

from queen.config.settings import Secret, Settings
from queen.engine.engine import open_engine
from queen.errors import StartupError
from queen.storage import migrate as migrate_module
from queen.storage.connect import Connection
from queen.storage.migrate import migrate
from queen.storage.queries import Migration, load_migrations

if TYPE_CHECKING:
    from tests.conftest import OpenSession, Postgres, Session

DESCRIPTION = """
SELECT 'column', c.relname, a.attname::text, format_type(a.atttypid, a.atttypmod) || ' ' || a.attnotnull
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
WHERE c.relnamespace = 'queen'::regnamespace AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped
UNION ALL SELECT 'index', tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'queen'
UNION ALL SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid)
FROM pg_constraint WHERE connamespace = 'queen'::regnamespace AND contype <> 'n'
UNION ALL SELECT 'function', '', proname, md5(pg_get_functiondef(oid))
FROM pg_proc WHERE pronamespace = 'queen'::regnamespace
ORDER BY 1, 2, 3, 4
"""


async def apply(session: Session, buckets: int = 1) -> int:
    return await session.run(lambda connection: migrate(connection, buckets))


async def describe(session: Session) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in await session.fetch(DESCRIPTION)]


def settings_for(url: str, **others: Any) -> Settings:
    return Settings(database_url=Secret(url), workers=1, db_pool_size=2, **others)


async def open_and_close(settings: Settings) -> int:
    async with open_engine(settings) as engine:
        return engine.store.buckets


async def test_migrating_twice_changes_nothing(empty: Session) -> None:
    assert await apply(empty) == 1
    first = await describe(empty)
    times = await empty.fetch("SELECT number, name, applied_at FROM queen.migrations ORDER BY number")

    assert await apply(empty) == 1

    assert await describe(empty) == first
    assert await empty.fetch("SELECT number, name, applied_at FROM queen.migrations ORDER BY number") == times
    assert [(row["number"], row["name"]) for row in times] == [(each.number, each.name) for each in load_migrations()]


async def test_the_number_of_buckets_is_fixed_when_the_database_is_initialised(empty_database_url: str) -> None:
    assert await open_and_close(settings_for(empty_database_url, buckets=64)) == 64
    assert await open_and_close(settings_for(empty_database_url, buckets=1)) == 64
    assert await open_and_close(settings_for(empty_database_url)) == 64


async def test_many_workers_may_start_on_an_empty_database_at_once(open_empty: OpenSession) -> None:
    sessions = [open_empty() for _ in range(4)]

    async with trio.open_nursery() as workers:
        for number, session in enumerate(sessions):
            workers.start_soon(apply, session, number + 1)

    numbers = await sessions[0].fetch("SELECT number FROM queen.migrations")
    assert len(numbers) == len(load_migrations())
    assert len({await apply(session) for session in sessions}) == 1


@pytest.mark.parametrize("through", [1, 3, -1])
async def test_a_database_of_an_earlier_version_ends_up_as_a_new_one(
    empty: Session, sql: Session, monkeypatch: pytest.MonkeyPatch, through: int
) -> None:
    everything = load_migrations()
    with monkeypatch.context() as earlier:
        earlier.setattr(migrate_module, "load_migrations", lambda: everything[:through])
        await apply(empty)

    await apply(empty)

    assert await describe(empty) == await describe(sql)


async def test_a_migration_that_comes_between_those_applied_is_applied_too(
    empty: Session, sql: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two changes made side by side take two numbers, and the higher may be released first."""
    everything = load_migrations()
    late = everything[-2]
    with monkeypatch.context() as earlier:
        earlier.setattr(migrate_module, "load_migrations", lambda: tuple(each for each in everything if each != late))
        await apply(empty)

    await apply(empty)

    assert await describe(empty) == await describe(sql)


async def test_a_database_newer_than_the_code_is_refused_with_a_sentence(
    empty_database_url: str, empty: Session
) -> None:
    await apply(empty)
    await empty.execute("INSERT INTO queen.migrations VALUES (9999, 'from the future', clock_timestamp())")

    with pytest.raises(StartupError, match="the database is newer than this queen-trio: it has migration 9999"):
        await open_and_close(settings_for(empty_database_url))


async def test_a_migration_that_fails_leaves_the_database_as_it_was(
    empty: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = load_migrations()
    broken = Migration(9998, "broken", ("CREATE TABLE queen.half (id integer)", "SELECT 1 / 0"))
    await apply(empty)
    before = await describe(empty)
    monkeypatch.setattr(migrate_module, "load_migrations", lambda: (*everything, broken))

    with pytest.raises(asyncpg.DivisionByZeroError):
        await apply(empty)

    assert await describe(empty) == before
    assert await empty.fetchval("SELECT max(number) FROM queen.migrations") == everything[-1].number


async def test_a_role_that_may_not_create_is_told_what_it_lacks(postgres: Postgres, empty_database_url: str) -> None:
    await trio.to_thread.run_sync(postgres.execute, "DROP ROLE IF EXISTS powerless")
    await trio.to_thread.run_sync(postgres.execute, "CREATE ROLE powerless LOGIN")
    url = empty_database_url.replace("queen@", "powerless@")

    with pytest.raises(StartupError, match="grant it CREATE on the database"):
        await open_and_close(settings_for(url))


async def test_a_database_that_does_not_answer_is_told_in_a_sentence(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("queen.storage.store._STARTUP_SECONDS", 0.2)
    for wrong in (
        empty_database_url.replace("port=5432", "port=1"),
        empty_database_url.replace("@/test_", "@/missing_"),
        "postgresql://queen@127.0.0.1:1/nowhere",
    ):
        with pytest.raises(StartupError) as raised:
            await open_and_close(msgspec.structs.replace(settings_for(wrong), db_connect_timeout_seconds=1.0))
        assert "\n" not in str(raised.value)


async def test_every_connection_of_ours_has_our_settings(sql: Session, database_url: str) -> None:
    """What the functions rely on must hold whatever the server's defaults are."""
    database = await sql.fetchval("SELECT current_database()")
    for setting in (
        "default_transaction_isolation = 'repeatable read'",
        "synchronous_commit = off",
        "timezone = 'Asia/Tokyo'",
    ):
        await sql.execute(f"ALTER DATABASE {database} SET {setting}")
    shown: dict[str, str] = {}

    async def show(connection: Connection) -> None:
        for name in ("transaction_isolation", "synchronous_commit", "timezone"):
            shown[name] = await connection.fetchval("SELECT current_setting($1)", name)

    async with open_engine(settings_for(database_url)) as engine:
        await engine.store._bridge.run(show)

    assert shown == {"transaction_isolation": "read committed", "synchronous_commit": "on", "timezone": "UTC"}
