"""An idle server with many queues does nothing that grows with their number.

All loops run, many times a second instead of once in seconds or minutes; PostgreSQL counts the rows that they read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest
import trio

from perf.crowds import idle_queues

if TYPE_CHECKING:
    from tests.conftest import OpenBroker, Session

QUEUES: Final = 10_000

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
    for statement in idle_queues(QUEUES, "model", "q", "g"):
        await sql.execute(statement)
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
