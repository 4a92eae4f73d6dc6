"""Brings the database to the form this code knows, under an advisory lock. asyncio flavor throughout."""

from __future__ import annotations

from typing import Final

import asyncpg
import structlog

from queen.errors import StartupError
from queen.storage.connect import Connection
from queen.storage.queries import load_migrations

MINIMUM_POSTGRESQL: Final = 15
_LOCK: Final = 0x7175_6565_6E
"""Key of the advisory lock: the letters of our name. Transaction-level, so that a pooler in between is no harm."""

log = structlog.get_logger("queen.storage")


async def migrate(connection: Connection, buckets: int) -> int:
    """Apply what is missing, all in one transaction; return the number of buckets of this database.

    ``buckets`` counts only for a database that is not initialised yet. Raises StartupError when the database is newer
    than this code, PostgreSQL is too old, or the role may not create what is needed.
    """
    major = connection.get_server_version().major
    if major < MINIMUM_POSTGRESQL:
        raise StartupError(f"PostgreSQL {major} is too old for queen-trio: {MINIMUM_POSTGRESQL} or newer is needed")
    await _check_durability(connection)
    migrations = load_migrations()
    known = {migration.number for migration in migrations}
    if await _applied(connection) != known:
        try:
            async with connection.transaction():
                await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
                await connection.execute("CREATE SCHEMA IF NOT EXISTS queen")
                await connection.execute(
                    "CREATE TABLE IF NOT EXISTS queen.migrations (number integer NOT NULL, name text NOT NULL,"
                    " applied_at timestamptz NOT NULL, CONSTRAINT migrations_pkey PRIMARY KEY (number))"
                )
                applied = await _applied(connection)
                if applied - known:
                    raise StartupError(
                        f"the database is newer than this queen-trio: it has migration {max(applied - known)}, this"
                        f" version knows {max(known)}; install the version that made it, or a later one"
                    )
                for migration in migrations:  # also one whose number is below the newest applied
                    if migration.number not in applied:
                        for statement in migration.statements:
                            await connection.execute(statement)
                        await connection.execute(
                            "INSERT INTO queen.migrations VALUES ($1, $2, clock_timestamp())",
                            migration.number,
                            migration.name,
                        )
                        log.info("migration applied", number=migration.number, name=migration.name)
                await connection.execute(
                    "INSERT INTO queen.meta (buckets, initialised_at) VALUES ($1, clock_timestamp())"
                    " ON CONFLICT ON CONSTRAINT meta_one_row DO NOTHING",
                    buckets,
                )
        except asyncpg.InsufficientPrivilegeError as error:
            raise StartupError(
                f"the database role may not set up queen-trio: {error}; grant it CREATE on the database, or run"
                " 'queen-trio migrate' once as its owner"
            ) from None
    return int(await connection.fetchval("SELECT buckets FROM queen.meta"))


async def _applied(connection: Connection) -> set[int]:
    """The migrations applied."""
    if await connection.fetchval("SELECT to_regclass('queen.migrations')") is None:
        return set()
    return {row["number"] for row in await connection.fetch("SELECT number FROM queen.migrations")}


async def _check_durability(connection: Connection) -> None:
    """Say loudly when the server may forget what it has promised."""
    for name in ("fsync", "full_page_writes", "synchronous_commit"):
        value = await connection.fetchval("SELECT current_setting($1)", name)
        if value == "off":
            log.error(
                "PostgreSQL runs with a setting that can lose acknowledged messages: turn it on",
                setting=name,
                value=value,
            )
