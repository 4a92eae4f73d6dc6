"""The metrics of all workers: writing this one's, reading all of them; and the switches of the cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import msgspec

from queen.model.metrics import (
    TALLIES,
    WORK,
    DeadLetterSummary,
    Leases,
    ParkedPoint,
    Process,
    ProcessState,
    QueuePoint,
    Samples,
    Tally,
    Window,
    WorkerPoint,
)
from queen.storage.bridge import Bridge
from queen.storage.connect import Connection
from queen.storage.counts import ALL_SUMS

SPANS: Final = (1, 15, 360)
"""Minutes that rows of the series cover."""

FORGET_SECONDS: Final = 3600
"""After which a process that is gone is forgotten."""

MAX_LEASES: Final = 10_000
MAX_DEAD_LETTERS: Final = 2000
"""Rows of a bucket that a page sums or groups."""

TOP_ERRORS: Final = 10

MAX_SERIES_QUEUES: Final = 100
"""Queues that a page of series shows when it is asked for none in particular: the busiest."""

_RECORD_QUEUES: Final = "SELECT queen.record_queues(NULL, $1, $2)"
_RECORD_WORKER: Final = (
    "SELECT queen.record_worker(NULL, $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)"
)
_PROCESSES: Final = """
    SELECT p.* FROM queen.processes p
    WHERE p.bucket = 0 AND p.seen_at > clock_timestamp() - make_interval(secs => $1)
    ORDER BY p.hostname, p.worker_id, p.pid
"""
_COLUMNS: Final = ", ".join(f"coalesce(sum(s.{name}), 0)::bigint AS {name}" for name in TALLIES)
_BIN: Final = "date_bin(make_interval(mins => $4), s.at, '2000-01-01T00:00:00Z')"
_SERIES_WHERE: Final = " WHERE s.bucket = 0 AND s.span = $1 AND s.at >= $2 AND s.at <= $3"
_ALL_QUEUES: Final = (
    f"SELECT {_BIN} AS bin, NULL::text AS queue, {_COLUMNS}, max(s.lag_max_ms) AS lag_max_ms FROM queen.queue_series s"
    + _SERIES_WHERE
    + " AND s.queue_id = '00000000-0000-0000-0000-000000000000' GROUP BY 1 ORDER BY 1 DESC"
)
_QUEUES: Final = (
    f"SELECT {_BIN} AS bin, q.name AS queue, {_COLUMNS}, max(s.lag_max_ms) AS lag_max_ms"
    " FROM queen.queue_series s JOIN queen.queues q ON q.queue_id = s.queue_id"
    + _SERIES_WHERE
    + " AND s.queue_id = ANY ($5) GROUP BY 1, 2 ORDER BY 1 DESC, 2"
)
_BUSIEST: Final = (
    "SELECT s.queue_id FROM queen.queue_series s"
    + _SERIES_WHERE
    + " AND s.queue_id <> '00000000-0000-0000-0000-000000000000' GROUP BY s.queue_id"
    " ORDER BY sum(s.push_messages + s.pop_messages + s.pop_empty) DESC LIMIT $4"
)
_WORKERS: Final = "SELECT s.* FROM queen.worker_series s" + _SERIES_WHERE + " ORDER BY s.at"
_PARKED: Final = (
    f"SELECT {_BIN} AS bin, q.name AS queue, s.hostname, s.worker_id, max(s.parked) AS parked"
    " FROM queen.parked_series s JOIN queen.queues q ON q.queue_id = s.queue_id"
    + _SERIES_WHERE
    + " AND ($5::text IS NULL OR q.name = $5) GROUP BY 1, 2, 3, 4 ORDER BY 1 DESC, 2, 3, 4 LIMIT 20000"
)
_SWITCHES: Final = "SELECT s.name FROM queen.switches s WHERE s.enabled"
_SWITCH: Final = """
    INSERT INTO queen.switches AS s (name, enabled, changed_at) VALUES ($1, $2, clock_timestamp())
    ON CONFLICT ON CONSTRAINT switches_pkey DO UPDATE SET enabled = excluded.enabled, changed_at = excluded.changed_at
"""
_LEASES: Final = """
    SELECT count(DISTINCT c.lease_id) AS leases, count(*) AS partitions,
        coalesce(sum(c.lease_end - c.lease_first), 0)::bigint AS messages,
        coalesce(sum(c.acked), 0)::bigint AS acked
    FROM (
        SELECT cu.lease_id, cu.lease_first, cu.lease_end,
            (SELECT sum(upper(r) - lower(r)) FROM unnest(cu.acked) r) AS acked
        FROM queen.cursors cu
        WHERE cu.bucket = $1 AND cu.lease_id IS NOT NULL AND cu.lease_expires_at > clock_timestamp()
            AND cu.lease_epoch = $2
        LIMIT $3
    ) c
"""
_DEAD_TOTAL: Final = "SELECT coalesce(sum(s.dead_letters), 0)::bigint FROM (" + ALL_SUMS + ") s"
_DEAD_ERRORS: Final = """
    WITH newest AS MATERIALIZED (SELECT * FROM queen.newest_dead_letters($1, $2))
    SELECT d.error, count(*) AS letters, (SELECT count(DISTINCT n.partition_id) FROM newest n) AS partitions
    FROM newest d GROUP BY d.error ORDER BY 2 DESC LIMIT 100
"""
_DEAD_BY_QUEUE: Final = (
    "SELECT q.name, sum(s.dead_letters)::bigint AS letters FROM ("
    + ALL_SUMS
    + ") s JOIN queen.queues q ON q.queue_id = s.queue_id GROUP BY q.name HAVING sum(s.dead_letters) > 0"
    " ORDER BY 2 DESC, 1 LIMIT 1000"
)
POSTGRES: Final = {
    "database": """
        SELECT datname AS name, pg_database_size(datname) AS "sizeBytes", numbackends AS connections,
            xact_commit AS commits, xact_rollback AS rollbacks, deadlocks, temp_bytes AS "tempBytes",
            version() AS version
        FROM pg_stat_database WHERE datname = current_database()
    """,
    "databaseCache": """
        SELECT blks_hit AS hits, blks_read AS reads,
            round(100.0 * blks_hit / greatest(blks_hit + blks_read, 1), 2)::float8 AS "hitPercent"
        FROM pg_stat_database WHERE datname = current_database()
    """,
    "tableCache": """
        SELECT relname AS name, heap_blks_hit AS hits, heap_blks_read AS reads,
            round(100.0 * heap_blks_hit / greatest(heap_blks_hit + heap_blks_read, 1), 2)::float8 AS "hitPercent"
        FROM pg_statio_user_tables WHERE schemaname = 'queen' ORDER BY heap_blks_hit + heap_blks_read DESC LIMIT 50
    """,
    "indexCache": """
        SELECT indexrelname AS name, relname AS table, idx_blks_hit AS hits, idx_blks_read AS reads,
            round(100.0 * idx_blks_hit / greatest(idx_blks_hit + idx_blks_read, 1), 2)::float8 AS "hitPercent"
        FROM pg_statio_user_indexes WHERE schemaname = 'queen' ORDER BY idx_blks_hit + idx_blks_read DESC LIMIT 50
    """,
    "cacheSummary": """
        SELECT coalesce(sum(heap_blks_hit), 0)::bigint AS "tableHits",
            coalesce(sum(heap_blks_read), 0)::bigint AS "tableReads",
            coalesce(sum(idx_blks_hit), 0)::bigint AS "indexHits",
            coalesce(sum(idx_blks_read), 0)::bigint AS "indexReads"
        FROM pg_statio_user_tables WHERE schemaname = 'queen'
    """,
    "deadTuples": """
        SELECT relname AS name, n_live_tup AS live, n_dead_tup AS dead,
            round(100.0 * n_dead_tup / greatest(n_live_tup + n_dead_tup, 1), 2)::float8 AS "deadPercent"
        FROM pg_stat_user_tables WHERE schemaname = 'queen' ORDER BY n_dead_tup DESC LIMIT 50
    """,
    "hotUpdates": """
        SELECT relname AS name, n_tup_upd AS updates, n_tup_hot_upd AS "hotUpdates",
            round(100.0 * n_tup_hot_upd / greatest(n_tup_upd, 1), 2)::float8 AS "hotPercent"
        FROM pg_stat_user_tables WHERE schemaname = 'queen' AND n_tup_upd > 0 ORDER BY n_tup_upd DESC LIMIT 50
    """,
    "activeQueries": """
        SELECT pid, state, wait_event AS "waitEvent",
            round(extract(epoch FROM clock_timestamp() - query_start), 3)::float8 AS seconds, left(query, 200) AS query
        FROM pg_stat_activity
        WHERE datname = current_database() AND state <> 'idle' AND pid <> pg_backend_pid()
        ORDER BY query_start LIMIT 50
    """,
    "autovacuumStatus": """
        SELECT relname AS name, last_autovacuum AS "lastVacuum", last_autoanalyze AS "lastAnalyze",
            autovacuum_count AS vacuums, autoanalyze_count AS analyzes
        FROM pg_stat_user_tables WHERE schemaname = 'queen' ORDER BY relname
    """,
    "bufferConfig": """
        SELECT name, setting, unit FROM pg_settings
        WHERE name IN ('shared_buffers', 'effective_cache_size', 'work_mem', 'maintenance_work_mem', 'wal_buffers')
        ORDER BY name
    """,
    "tableSizes": """
        SELECT c.relname AS name, pg_total_relation_size(c.oid) AS "totalBytes", pg_table_size(c.oid) AS "tableBytes",
            pg_indexes_size(c.oid) AS "indexBytes"
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = 'queen' AND c.relkind IN ('r', 'p') ORDER BY 2 DESC LIMIT 50
    """,
}
"""What PostgreSQL says of itself, by the subject under which it is shown."""


class Report(msgspec.Struct, kw_only=True):
    """What a worker has to say since the last time."""

    process_id: UUID
    hostname: str
    worker_id: str
    pid: int
    started_at: datetime
    state: ProcessState
    work: dict[str, int]
    lag_max_ms: int
    samples: Samples
    everything: Tally
    queues: dict[str, Tally]


class Metrics:
    """The metrics in PostgreSQL."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    # -- writing --------------------------------------------------------------------------------------------------

    async def record(self, report: Report) -> None:
        """Write what a worker has to say, in one commit."""
        rows: list[tuple[str | None, Tally]] = [(None, report.everything), *report.queues.items()]
        parked: dict[str, int] = {}
        for waiting in report.state.waiting:
            parked[waiting.queue] = parked.get(waiting.queue, 0) + waiting.pops

        async def write(connection: Connection) -> None:
            async with connection.transaction():
                await connection.execute(
                    _RECORD_WORKER,
                    report.process_id,
                    report.hostname,
                    report.worker_id,
                    report.pid,
                    report.started_at,
                    msgspec.json.encode(report.state).decode(),
                    report.samples.count,
                    list(WORK),
                    [report.work.get(name, 0) for name in WORK],
                    report.lag_max_ms,
                    report.samples.sums,
                    report.samples.leasts,
                    report.samples.greatests,
                    report.samples.lasts,
                    list(parked),
                    list(parked.values()),
                )
                await connection.execute(
                    _RECORD_QUEUES,
                    [name for name, _ in rows],
                    [number for _, tally in rows for number in msgspec.structs.astuple(tally)],
                )

        await self._bridge.run(write)

    async def leave(self, process_id: UUID) -> None:
        """A worker ends: it is not to be counted among the living any more."""

        async def write(connection: Connection) -> None:
            await connection.execute("DELETE FROM queen.processes WHERE bucket = 0 AND process_id = $1", process_id)

        await self._bridge.run(write)

    async def forget(self, retention_days: Mapping[int, int]) -> None:
        """Remove what is older than its span is kept (span → days), and processes that are long gone."""

        async def processes(connection: Connection) -> None:
            await connection.execute(
                "DELETE FROM queen.processes WHERE bucket = 0"
                " AND seen_at < clock_timestamp() - make_interval(secs => $1)",
                FORGET_SECONDS,
            )

        await self._bridge.run(processes)
        for span, days in retention_days.items():

            async def step(connection: Connection) -> bool:
                return await connection.fetchval(  # type: ignore[no-any-return]
                    "SELECT queen.forget_series($1, clock_timestamp() - make_interval(days => $2))",
                    span,  # noqa: B023  awaited here
                    days,  # noqa: B023
                )

            while await self._bridge.run(step):
                pass

    # -- reading --------------------------------------------------------------------------------------------------

    async def processes(self, live_seconds: float) -> list[Process]:
        """The workers of all servers on this database that have spoken in the last ``live_seconds``."""

        async def read(connection: Connection) -> list[Process]:
            return [_process(row) for row in await connection.fetch(_PROCESSES, float(live_seconds))]

        return await self._bridge.run(read, writes=False)

    async def cluster(self) -> dict[str, int]:
        """What all workers together have done since the database was made."""

        async def read(connection: Connection) -> dict[str, int]:
            rows = await connection.fetch("SELECT name, value FROM queen.cluster_counters WHERE bucket = 0")
            return {row["name"]: row["value"] for row in rows}

        return await self._bridge.run(read, writes=False)

    async def everything(self, window: Window) -> list[QueuePoint]:
        """What was done on all queues together, newest first."""

        async def read(connection: Connection) -> list[QueuePoint]:
            rows = await connection.fetch(_ALL_QUEUES, *_reach(window), window.minutes)
            return [_queue_point(row) for row in rows]

        return await self._bridge.run(read, writes=False)

    async def queues(self, window: Window, queue: str | None) -> list[QueuePoint]:
        """What was done on a queue, or on each of the busiest, newest first."""

        async def read(connection: Connection) -> list[QueuePoint]:
            reach = _reach(window)
            if queue is not None:
                ids = await connection.fetch("SELECT queue_id FROM queen.queues WHERE name = $1", queue)
            else:
                ids = await connection.fetch(_BUSIEST, *reach, MAX_SERIES_QUEUES)
            rows = await connection.fetch(_QUEUES, *reach, window.minutes, [row["queue_id"] for row in ids])
            return [_queue_point(row) for row in rows]

        return await self._bridge.run(read, writes=False)

    async def workers(self, window: Window) -> list[WorkerPoint]:
        """Each worker in each point of time, oldest first."""

        async def read(connection: Connection) -> Sequence[Any]:
            rows: Sequence[Any] = await connection.fetch(_WORKERS, *_reach(window))
            return rows

        points: dict[tuple[datetime, str, str], WorkerPoint] = {}
        for row in await self._bridge.run(read, writes=False):
            at = bin_of(row["at"], window)
            key = (at, row["hostname"], row["worker_id"])
            points[key] = _merge(points.get(key), at, row)
        return list(points.values())

    async def parked(self, window: Window, queue: str | None) -> list[ParkedPoint]:
        """How many pops waited, by queue and worker, newest first."""

        async def read(connection: Connection) -> list[ParkedPoint]:
            rows = await connection.fetch(_PARKED, *_reach(window), window.minutes, queue)
            return [
                ParkedPoint(
                    at=row["bin"],
                    queue=row["queue"],
                    hostname=row["hostname"],
                    worker_id=row["worker_id"],
                    parked=row["parked"],
                )
                for row in rows
            ]

        return await self._bridge.run(read, writes=False)

    async def leases(self, buckets: int) -> Leases:
        """The live leases, of at most MAX_LEASES cursors a bucket."""

        async def read(connection: Connection) -> Leases:
            rows = [
                await connection.fetchrow(_LEASES, bucket, connection.epoch, MAX_LEASES) for bucket in range(buckets)
            ]
            return Leases(
                leases=sum(row["leases"] for row in rows),
                partitions=sum(row["partitions"] for row in rows),
                messages=sum(row["messages"] for row in rows),
                acked=sum(row["acked"] for row in rows),
            )

        return await self._bridge.run(read, writes=False)

    async def dead_letters(self, buckets: int) -> DeadLetterSummary:
        """How many dead letters there are, and what the newest MAX_DEAD_LETTERS of each bucket are about."""

        async def read(connection: Connection) -> DeadLetterSummary:
            total = await connection.fetchval(_DEAD_TOTAL)
            errors: dict[str, int] = {}
            partitions = 0
            for bucket in range(buckets):
                here = 0
                for row in await connection.fetch(_DEAD_ERRORS, bucket, MAX_DEAD_LETTERS):
                    errors[row["error"]] = errors.get(row["error"], 0) + row["letters"]
                    here = row["partitions"]
                partitions += here
            most = sorted(errors.items(), key=lambda pair: (-pair[1], pair[0]))[:TOP_ERRORS]
            return DeadLetterSummary(total=total, partitions=partitions, errors=tuple(most))

        return await self._bridge.run(read, writes=False)

    async def dead_letters_by_queue(self) -> dict[str, int]:
        """Dead letters of the queues that have any, the most first, at most a thousand queues."""

        async def read(connection: Connection) -> dict[str, int]:
            return {row["name"]: row["letters"] for row in await connection.fetch(_DEAD_BY_QUEUE)}

        return await self._bridge.run(read, writes=False)

    async def postgres(self) -> dict[str, list[dict[str, Any]]]:
        """What PostgreSQL says of itself, by subject: rows with the names of their columns."""

        async def read(connection: Connection) -> dict[str, list[dict[str, Any]]]:
            return {
                subject: [dict(row) for row in await connection.fetch(query)] for subject, query in POSTGRES.items()
            }

        return await self._bridge.run(read, writes=False)

    # -- switches -------------------------------------------------------------------------------------------------

    async def switches(self) -> frozenset[str]:
        """The switches that are on."""

        async def read(connection: Connection) -> frozenset[str]:
            return frozenset(row["name"] for row in await connection.fetch(_SWITCHES))

        return await self._bridge.run(read, writes=False)

    async def switch(self, name: str, *, enabled: bool) -> None:
        """Turn a switch, for every server on this database and over restarts."""

        async def write(connection: Connection) -> None:
            await connection.execute(_SWITCH, name, enabled)

        await self._bridge.run(write)


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def bin_of(at: datetime, window: Window) -> datetime:
    """The beginning of the point that a moment belongs to; the same bins as in SQL."""
    seconds = window.minutes * 60
    return at - (at - _EPOCH) % timedelta(seconds=seconds)  # in whole numbers: a float rounds up into the year 10000


def _reach(window: Window) -> tuple[int, datetime, datetime]:
    """Which rows serve a window: the widest span that divides its points."""
    span = max(span for span in SPANS if window.minutes % span == 0)
    return span, bin_of(window.start, window), window.end


def _queue_point(row: Any) -> QueuePoint:
    tally = Tally(lag_max_ms=row["lag_max_ms"], **{name: row[name] for name in TALLIES})
    return QueuePoint(at=row["bin"], queue=row["queue"], tally=tally)


def _process(row: Any) -> Process:
    return Process(
        process_id=row["process_id"],
        hostname=row["hostname"],
        worker_id=row["worker_id"],
        pid=row["pid"],
        started_at=row["started_at"],
        seen_at=row["seen_at"],
        state=msgspec.json.decode(row["state"], type=ProcessState),
    )


def _merge(point: WorkerPoint | None, at: datetime, row: Any) -> WorkerPoint:
    work = dict(zip(WORK, row["counters"], strict=False))
    samples = Samples(
        count=row["samples"],
        sums=row["sums"],
        leasts=row["leasts"],
        greatests=row["greatests"],
        lasts=row["lasts"],
    )
    lag_max_ms = row["lag_max_ms"]
    if point is not None:
        merged = point.samples
        merged.merge(samples)
        samples = merged
        work = {name: point.work.get(name, 0) + work.get(name, 0) for name in WORK}
        lag_max_ms = max(lag_max_ms, point.lag_max_ms)
    return WorkerPoint(
        at=at,
        hostname=row["hostname"],
        worker_id=row["worker_id"],
        pid=row["pid"],
        work=work,
        lag_max_ms=lag_max_ms,
        samples=samples,
    )
