"""What the migrations leave in the database keeps the rules that let it lie on more than one machine.

See docs/discussion/storage.md: `bucket` leads every key of a distributed table, names are given and not left to
PostgreSQL, and nothing is used that cannot be distributed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from tests.conftest import Session

REFERENCE: Final = {
    "meta",  # one row
    "migrations",  # one for each
    "queues",  # written when a queue is configured or deleted
    "deleted_queues",
    "consumer_groups",  # written when a group is registered or moved
    "switches",  # written by hand
    "stream_queries",  # written when a query is registered
}
"""Small, rarely written, copied to every node. Every other table is distributed by its bucket."""

WHOLE: Final = {
    "count_changes",  # a few seconds of rows without an index, read whole to be folded
    "queue_series",  # series of measurements, all in one bucket, read by span and time
    "worker_series",
    "parked_series",
}
"""Distributed tables of which a function may choose to read all."""

PLPGSQL: Final = """
SELECT p.proname AS name, p.prosrc AS body, coalesce(p.proconfig, '{}') AS settings, p.proargnames AS arguments
FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
WHERE p.pronamespace = 'queen'::regnamespace AND l.lanname = 'plpgsql'
"""
TABLES: Final = "SELECT relname FROM pg_class WHERE relnamespace = 'queen'::regnamespace AND relkind = 'r'"

HOT: Final = {"partitions", "segments", "cursors", "transaction_ids"}
"""What every push and pop looks up by its key."""

KEYS: Final = """
SELECT t.relname AS table, i.relname AS index, a.attname AS first_column, x.indisunique AS unique,
    x.indpred IS NOT NULL AS partial,
    'bucket' IN (SELECT b.attname FROM pg_attribute b WHERE b.attrelid = i.oid) AS has_bucket
FROM pg_index x
JOIN pg_class i ON i.oid = x.indexrelid
JOIN pg_class t ON t.oid = x.indrelid
JOIN pg_namespace n ON n.oid = t.relnamespace AND n.nspname = 'queen'
LEFT JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = x.indkey[0]
"""

DEFAULT_NAME: Final = r"^{table}_.*((?<!p)key|idx|check|fkey|excl|not_null)\d*$"
"""How PostgreSQL names what nobody has named. Primary keys it calls <table>_pkey, and so do we."""


async def test_bucket_leads_every_key_of_a_distributed_table_and_is_in_every_index(sql: Session) -> None:
    rows = [row for row in await sql.fetch(KEYS) if row["table"] not in REFERENCE]

    assert [tuple(row) for row in rows if row["unique"] and row["first_column"] != "bucket"] == []
    assert [tuple(row) for row in rows if not row["has_bucket"]] == []
    assert len({row["table"] for row in rows}) >= 8


async def test_nothing_that_leads_with_bucket_can_be_taken_for_the_key_of_a_hot_table(sql: Session) -> None:
    """For plans made without statistics: between the VACUUM and the ANALYZE of the first autovacuum, and they stay."""
    rows = [row for row in await sql.fetch(KEYS) if row["table"] in HOT]

    assert len(rows) > len(HOT)
    assert [
        row["index"] for row in rows if row["first_column"] == "bucket" and not row["unique"] and not row["partial"]
    ] == []


async def test_every_distributed_table_has_a_bucket_that_is_never_null(sql: Session) -> None:
    tables = await sql.fetch(TABLES)
    with_bucket = await sql.fetch(
        "SELECT c.relname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid"
        " WHERE c.relnamespace = 'queen'::regnamespace AND a.attname = 'bucket' AND a.attnotnull"
        " AND a.atttypid = 'integer'::regtype AND c.relkind = 'r'"
    )

    names = {row["relname"] for row in tables}
    assert names >= REFERENCE
    assert {row["relname"] for row in with_bucket} == names - REFERENCE


async def test_every_constraint_and_index_is_named_for_its_rule(sql: Session) -> None:
    rows = await sql.fetch(
        "SELECT t.relname AS table, c.conname AS name FROM pg_constraint c JOIN pg_class t ON t.oid = c.conrelid"
        " WHERE t.relnamespace = 'queen'::regnamespace AND c.contype <> 'n'"
        " UNION SELECT t.relname, i.relname FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid"
        " JOIN pg_class t ON t.oid = x.indrelid WHERE t.relnamespace = 'queen'::regnamespace"
    )
    matches = await sql.fetch(
        "SELECT name FROM unnest($1::text[], $2::text[]) AS given (t, name) WHERE name ~ replace($3, '{table}', t)",
        [row["table"] for row in rows],
        [row["name"] for row in rows],
        DEFAULT_NAME,
    )

    assert [row["name"] for row in matches] == []
    assert len(rows) > 20


@pytest.mark.parametrize(
    ("what", "query"),
    [
        ("triggers", "SELECT tgname FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid WHERE {queen}"),
        ("sequences", "SELECT relname FROM pg_class c WHERE {queen} AND relkind = 'S'"),
        ("unlogged tables", "SELECT relname FROM pg_class c WHERE {queen} AND relpersistence <> 'p'"),
        ("other relations", "SELECT relname FROM pg_class c WHERE {queen} AND relkind NOT IN ('r', 'i', 't')"),
        ("rules", "SELECT rulename FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class WHERE {queen}"),
        ("foreign keys", "SELECT conname FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid"
                         " WHERE {queen} AND contype = 'f'"),
    ],
)  # fmt: skip
async def test_nothing_is_used_that_cannot_be_distributed(sql: Session, what: str, query: str) -> None:
    found = await sql.fetch(query.replace("{queen}", "c.relnamespace = 'queen'::regnamespace"))

    assert [row[0] for row in found] == [], what


async def test_every_function_that_reads_a_distributed_table_keeps_to_its_indexes(sql: Session) -> None:
    """A sequential scan is never right there; a plan of another session's settings could still choose one."""
    functions = await sql.fetch(PLPGSQL)
    tables = await sql.fetch(TABLES)
    distributed = {row["relname"] for row in tables} - REFERENCE - WHOLE

    unguarded = [
        function["name"]
        for function in functions
        if any(
            f"{verb} queen.{table}" in function["body"] for table in distributed for verb in ("FROM", "JOIN", "UPDATE")
        )
        and "enable_seqscan=off" not in function["settings"]
    ]

    assert unguarded == []
    assert {"push", "claim", "ack"} <= {function["name"] for function in functions}


async def test_every_function_names_its_bucket(sql: Session) -> None:
    """One bucket a call: that is what lets a call be delegated to the node that holds it."""
    functions = await sql.fetch(PLPGSQL)
    hot = {"push", "claim", "ack", "give_back", "extend_lease", "locate", "read_segments", "ready", "expire", "purge"}
    by_name = {function["name"]: function for function in functions}

    assert hot <= by_name.keys()
    assert {name for name in hot if (by_name[name]["arguments"] or [""])[0] != "p_bucket"} == set()
    assert {name for name in hot if "NOTIFY" in by_name[name]["body"].upper().split()} == set()
