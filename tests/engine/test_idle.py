"""An idle server with many queues does nothing that grows with their number.

All loops run, many times a second instead of once in seconds or minutes; PostgreSQL counts the rows that they read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest
import trio

if TYPE_CHECKING:
    from tests.conftest import OpenBroker, Session

QUEUES: Final = 10_000

FILL: Final = (
    "INSERT INTO queen.queues SELECT (jsonb_populate_record(q, jsonb_build_object('queue_id', gen_random_uuid(),"
    " 'name', 'q' || n))).* FROM queen.queues q CROSS JOIN generate_series(1, $1::int) n WHERE q.name = 'model'",
    "INSERT INTO queen.queue_buckets SELECT 0, q.queue_id FROM queen.queues q WHERE q.name LIKE 'q%' AND $1::int > 0",
    "INSERT INTO queen.consumer_groups (queue_id, name, mode, created_at) SELECT q.queue_id, 'g', 'all', q.created_at"
    " FROM queen.queues q WHERE q.name LIKE 'q%' AND $1::int > 0",
    "INSERT INTO queen.partitions (bucket, partition_id, queue_id, name, next_offset, first_offset, created_at)"
    " SELECT 0, gen_random_uuid(), q.queue_id, 'Default', 1, 1, q.created_at FROM queen.queues q"
    " WHERE q.name LIKE 'q%' AND $1::int > 0",
    "INSERT INTO queen.cursors (bucket, partition_id, group_name, queue_id, committed)"
    " SELECT 0, p.partition_id, 'g', p.queue_id, 1 FROM queen.partitions p WHERE $1::int > 0 AND p.first_offset = 1",
    "INSERT INTO queen.counts (bucket, queue_id, group_name, stored, removed, erased, partitions, consumed,"
    " dead_letters) SELECT 0, q.queue_id, '', 1, 1, 0, 1, 0, 0 FROM queen.queues q"
    " WHERE q.name LIKE 'q%' AND $1::int > 0",
)

READ: Final = """
    SELECT relname AS name, seq_tup_read + coalesce(idx_tup_fetch, 0) AS rows
    FROM pg_stat_user_tables WHERE schemaname = 'queen'
"""

INTERVAL: Final = 0.1
ROUNDS: Final = 20
"""Of every loop. Half a table in them all together is less than a table in two of them."""


@pytest.fixture
def buckets() -> int:
    """One: the most rows that a bucket can have."""
    return 1


@pytest.mark.timeout(120)
async def test_what_is_done_periodically_does_not_read_all_queues(
    open_broker: OpenBroker, sql: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("queen.engine.housekeeping._FORGET_INTERVAL_SECONDS", INTERVAL)
    monkeypatch.setattr("queen.engine.engine._SWEEP_SECONDS", INTERVAL)
    monkeypatch.setattr("queen.engine.engine._SWITCHES_SECONDS", INTERVAL)
    async with open_broker() as first:
        await first.configure("model")
    for statement in FILL:
        await sql.execute(statement, QUEUES)
    await sql.execute("ANALYZE")
    before = await rows_read(sql)

    async with open_broker(
        retention_interval_seconds=INTERVAL,
        eviction_interval_seconds=INTERVAL,
        stats_interval_seconds=INTERVAL,
        metrics_sample_seconds=INTERVAL,
        partition_cleanup_days=30,
        dead_letter_retention_days=30,
    ):
        await trio.sleep(ROUNDS * INTERVAL)
    # who has gone has told PostgreSQL all that it has read
    await sql.wait_for("SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()")
    after = await rows_read(sql)

    assert {name: after[name] - before[name] for name in after if after[name] - before[name] > QUEUES / 2} == {}


async def rows_read(sql: Session) -> dict[str, int]:
    """By table, since the database was made."""
    await sql.execute("SELECT pg_stat_force_next_flush()")
    await sql.execute("SELECT pg_stat_clear_snapshot()")
    return {row["name"]: row["rows"] for row in await sql.fetch(READ)}
