"""Looks at a PostgreSQL as our server would find it. Changes nothing; what is well is judged elsewhere."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

import asyncpg
import outcome
import trio_asyncio

from queen.config.settings import Settings
from queen.errors import StartupError
from queen.model.checkup import DatabaseFacts, Setting, Slot, Table, Transaction
from queen.storage.connect import Connection, dial, explain_unreachable
from queen.storage.loop import open_asyncio
from queen.storage.queries import load_migrations
from queen.storage.translate import CONNECTION_LOST

SETTINGS: Final = (
    *("fsync", "full_page_writes", "synchronous_commit", "data_checksums", "zero_damaged_pages"),
    *("ignore_checksum_failure", "ignore_system_indexes", "default_transaction_read_only", "wal_compression"),
    *("max_wal_size", "checkpoint_timeout", "shared_buffers", "huge_pages_status", "autovacuum"),
    *("autovacuum_naptime", "autovacuum_freeze_max_age", "track_counts", "max_connections", "TimeZone"),
    *("superuser_reserved_connections", "reserved_connections"),
)

_UNITS: Final = {"B": 1, "kB": 1024, "8kB": 8192, "MB": 1 << 20, "GB": 1 << 30, "ms": 0.001, "s": 1, "min": 60}

_OLDEST: Final = 5


async def look_at_database(settings: Settings) -> DatabaseFacts:
    """Trio flavor. The facts, read on one connection.

    Raises:
        StartupError: it cannot be reached, or refuses us.
    """

    async def look() -> DatabaseFacts:
        connection = await dial(settings, application="queen-trio check")
        try:
            return await _read(connection)
        finally:
            await connection.close()
            await asyncio.sleep(0)  # asyncio closes the socket a turn later

    async with open_asyncio():
        looked: outcome.Outcome[DatabaseFacts] = await outcome.acapture(trio_asyncio.aio_as_trio(look))
    try:
        return looked.unwrap()
    except CONNECTION_LOST as error:
        raise explain_unreachable(settings, error) from error
    except asyncpg.PostgresError as error:
        raise StartupError(f"PostgreSQL refuses: {error}") from error


async def _read(connection: Connection) -> DatabaseFacts:
    rows = await connection.fetch(
        "SELECT name, setting, unit, current_setting(name) AS text FROM pg_settings WHERE name = ANY($1)",
        list(SETTINGS),
    )
    settings = {row["name"]: Setting(row["text"], _number(row["setting"], row["unit"])) for row in rows}
    ahead, doubt = await _compare_clocks(connection)
    basics = await connection.fetchrow(
        "SELECT current_setting('server_version_num')::integer AS version, pg_is_in_recovery() AS standby,"
        " getdatabaseencoding()::text AS encoding, age(d.datfrozenxid) AS frozen_age, d.datconnlimit, r.rolconnlimit,"
        " has_database_privilege(d.oid, 'CREATE') AS may_create,"
        " pg_has_role(r.oid, 'pg_read_all_stats', 'USAGE') AS may_see_others,"
        " (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' OR backend_type IS NULL)"
        "   AS connections"
        " FROM pg_database d, pg_roles r WHERE d.datname = current_database() AND r.rolname = current_user"
    )
    assert basics is not None
    checkpoints = await connection.fetchrow(
        "SELECT num_timed AS timed, num_requested AS requested FROM pg_stat_checkpointer"
        if basics["version"] >= 170000
        else "SELECT checkpoints_timed AS timed, checkpoints_req AS requested FROM pg_stat_bgwriter"
    )
    extension = await connection.fetchrow(
        "SELECT installed_version IS NOT NULL AS installed FROM pg_available_extensions"
        " WHERE name = 'pg_stat_statements'"
    )
    migration = None
    if await connection.fetchval("SELECT to_regclass('queen.migrations')") is not None:
        migration = await connection.fetchval("SELECT max(number) FROM queen.migrations")
    return DatabaseFacts(
        version=basics["version"],
        settings=settings,
        standby=basics["standby"],
        encoding=basics["encoding"],
        frozen_age=basics["frozen_age"],
        clock_ahead_seconds=ahead,
        clock_doubt_seconds=doubt,
        connections=basics["connections"],
        role_connections=basics["rolconnlimit"],
        database_connections=basics["datconnlimit"],
        may_create=basics["may_create"],
        may_see_others=basics["may_see_others"],
        transactions=await _transactions(connection),
        prepared=tuple(
            Transaction(row["gid"], row["seconds"], row["xmin_age"])
            for row in await connection.fetch(
                "SELECT gid, extract(epoch FROM clock_timestamp() - prepared)::float8 AS seconds,"
                " age(transaction) AS xmin_age FROM pg_prepared_xacts ORDER BY prepared LIMIT $1",
                _OLDEST,
            )
        ),
        slots=tuple(
            Slot(row["slot_name"], row["active"], row["held"] or 0, row["xmin_age"] or 0)
            for row in await connection.fetch(
                "SELECT slot_name, active, pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN"
                " pg_last_wal_receive_lsn() ELSE pg_current_wal_lsn() END, restart_lsn)::bigint AS held,"
                " greatest(age(xmin), age(catalog_xmin)) AS xmin_age FROM pg_replication_slots ORDER BY slot_name"
            )
        ),
        replicas=tuple(
            row["sync_state"] or "unknown"
            for row in await connection.fetch("SELECT sync_state FROM pg_stat_replication")
        ),
        statements_available=extension is not None,
        statements_installed=extension is not None and extension["installed"],
        tables=tuple(
            Table(row["relname"], row["logged"], row["live"], row["dead"])
            for row in await connection.fetch(
                "SELECT c.relname, c.relpersistence = 'p' AS logged, coalesce(s.n_live_tup, 0) AS live,"
                " coalesce(s.n_dead_tup, 0) AS dead FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
                " LEFT JOIN pg_stat_user_tables s ON s.relid = c.oid"
                " WHERE n.nspname = 'queen' AND c.relkind IN ('r', 'p') ORDER BY c.relname"
            )
        ),
        migration=migration,
        known_migration=max(each.number for each in load_migrations()),
        checkpoints_timed=0 if checkpoints is None else checkpoints["timed"],
        checkpoints_requested=0 if checkpoints is None else checkpoints["requested"],
    )


async def _transactions(connection: Connection) -> tuple[Transaction, ...]:
    """The oldest that are open. Of other roles' sessions, without the right to see them, nothing is known."""
    rows = await connection.fetch(
        "SELECT format('process %s of %s (%s, %s)', pid, coalesce(usename, 'nobody'), coalesce(nullif("
        " application_name, ''), 'no name'), coalesce(state, 'unknown')) AS who,"
        " extract(epoch FROM clock_timestamp() - xact_start)::float8 AS seconds,"
        " coalesce(greatest(age(backend_xmin), age(backend_xid)), 0) AS xmin_age FROM pg_stat_activity"
        " WHERE xact_start IS NOT NULL AND pid <> pg_backend_pid() AND backend_type IN ('client backend', 'walsender')"
        " ORDER BY xact_start LIMIT $1",
        _OLDEST,
    )
    return tuple(Transaction(row["who"], row["seconds"], row["xmin_age"]) for row in rows)


async def _compare_clocks(connection: Connection) -> tuple[float, float]:
    """How far PostgreSQL's clock is ahead of ours, and by how much that may be off: half of the quickest of five."""
    best: tuple[float, float] | None = None
    for _ in range(5):
        before = time.time()
        theirs = await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
        after = time.time()
        doubt = (after - before) / 2
        if best is None or doubt < best[1]:
            best = theirs - (before + after) / 2, doubt
    assert best is not None
    return best


def _number(setting: str, unit: Any) -> float:
    try:
        return float(setting) * _UNITS.get(unit or "", 1)
    except ValueError:  # a word
        return 0.0
