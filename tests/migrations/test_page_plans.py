"""No page of the admin API reads all partitions, messages or dead letters, however many there are: measured.

See test_plans.py for how. The queue that is looked at is the one with everything in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from queen.auth.access import open_access
from queen.config.settings import Settings
from queen.routes import ROUTES
from queen.routes.call import Call, Context, Counters
from queen.storage.ids import partition_id_of

from .test_plans import AROUND, _counters, _fill, _flush, _stream

if TYPE_CHECKING:
    from tests.conftest import Broker, OpenBroker, Session

COUNTED: Final = """
INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
VALUES (0, 1, $1, $2, ''), (0, 4, $1, $2, ''), (0, 6, $1, $2, 'idle')
"""
IDLE_QUEUES: Final = 2000
LINE: Final = '012345678901","transactionId":"x","traceId":null,"producerSub":null,"data":1'

PAGES: Final[Mapping[str, int]] = {
    # path and query → rows that one index may read
    "/api/v1/resources/queues": 3000,
    "/api/v1/resources/queues/q": 5000,
    "/api/v1/resources/queues/q/depth": 9000,
    "/api/v1/resources/queues/q/depth?group=busy": 5000,
    "/api/v1/resources/queues/q/depth?group=idle": 5000,
    "/api/v1/resources/partitions?queue=q": 500,
    "/api/v1/resources/partitions": 3000,
    "/api/v1/resources/partitions?minDepth=1": 9000,
    "/api/v1/resources/namespaces": 100,
    "/api/v1/resources/tasks": 100,
    "/api/v1/resources/overview": 5000,
    "/api/v1/messages?queue=q": 5000,
    "/api/v1/messages": 5000,
    "/api/v1/messages?queue=q&partition=around 7": 50,
    "/api/v1/messages?queue=q&status=completed": 5000,
    "/api/v1/dlq?queue=q": 300,
    "/api/v1/dlq": 300,
    "/api/v1/dlq?queue=q&partition=around 7": 50,
    "/api/v1/dlq?consumerGroup=idle": 300,
    "/api/v1/consumer-groups": 5000,
    "/api/v1/consumer-groups/lagging?minLagSeconds=0": 5000,
    "/api/v1/consumer-groups/busy": 5000,
    "/api/v1/status": 12_000,
    "/api/v1/status/queues": 3000,
    "/api/v1/status/queues/q": 5000,
    "/api/v1/status/queues/q/messages": 5000,
    "/api/v1/status/analytics": 100,
    "/api/v1/analytics/worker-metrics": 5000,
    "/api/v1/analytics/system-metrics": 100,
    "/api/v1/analytics/queue-lag": 100,
    "/api/v1/analytics/queue-ops": 100,
    "/api/v1/analytics/queue-parked-replicas": 100,
    "/api/v1/analytics/retention": 100,
    "/api/v1/traces/names": 100,
    "/api/v1/traces/by-name/n": 100,
    "/api/v1/messages/PARTITION/a": 100,
    "/api/v1/traces/PARTITION/a": 100,
    "/metrics": 10,
    "/metrics/prometheus": 100,
}

BY_QUEUE: Final = ("sequentially counts",)
"""A row for each queue and group that has messages: pages over all queues sum it up as a whole."""


@pytest.fixture
def buckets() -> int:
    """One: the most rows that a bucket can have."""
    return 1


async def _show(context: Context, target: str) -> None:
    """Answer a page as its route does."""
    path, _, query = target.partition("?")
    parts = path.split("/")
    for route in ROUTES:
        wanted = route.path.split("/")
        if route.method == "GET" and len(wanted) == len(parts):
            names = {w[1:-1]: part for w, part in zip(wanted, parts, strict=True) if w.startswith("<")}
            if all(w == part or w.startswith("<") for w, part in zip(wanted, parts, strict=True)):
                call = Call(parameters=names, query=query.replace(" ", "%20").encode())
                assert (await route.handler(context, call)).status == 200, target
                return
    raise AssertionError(f"no route for {target}")


async def _prepare(broker: Broker, sql: Session) -> str:
    queue = await broker.configure("q", lease_seconds=600)
    (result, *_) = await broker.push("q", ids=["a"])
    for group in ("idle", "busy"):
        await broker.pop("q", group=group, batch=1, auto_ack=True)
    await _flush(broker)
    await _fill(sql, queue, await _stream(broker))
    await sql.execute(COUNTED, queue.queue_id, AROUND)
    for table in ("segments", "dead_letters"):
        await sql.execute(f"UPDATE queen.{table} SET body = convert_to($1, 'UTF8') WHERE body = '0'", LINE)
    await sql.execute(
        "INSERT INTO queen.queues SELECT gen_random_uuid(), 'idle ' || n, '', '', 1, 300, 3, 1000, 0, 0, 0, 0, 3600,"
        " false, false, false, 0, 0, 0, false, clock_timestamp() FROM generate_series(1, $1) n",
        IDLE_QUEUES,
    )
    await sql.execute("VACUUM (INDEX_CLEANUP ON) queen.segments, queen.dead_letters")
    await sql.execute("SELECT pg_stat_force_next_flush()")
    assert result.partition_id == str(partition_id_of(queue.queue_id, "Default"))
    return result.partition_id


@pytest.mark.parametrize("statistics", ["of an empty database", "fresh"])
async def test_no_page_reads_everything(
    open_broker: OpenBroker, sql: Session, settings: Settings, statistics: str
) -> None:
    async with open_broker(db_pool_size=2) as broker, open_access(settings.jwt) as access:
        context = Context(broker.engine, settings, Counters(), trio.current_time(), access)
        await broker.configure("q", lease_seconds=600)
        (result,) = await broker.push("q", ids=["a"])
        for target in PAGES:  # plans are made now, and kept
            await _show(context, target.replace("PARTITION", result.partition_id))
        partition_id = await _prepare(broker, sql)
        if statistics == "fresh":
            await sql.execute("ANALYZE")
        excesses: dict[str, dict[str, int]] = {}

        before: dict[str, Any] = await _counters(sql)
        for target, limit in PAGES.items():
            await _show(context, target.replace("PARTITION", partition_id))
            await _flush(broker)
            after = await _counters(sql)
            read = {counter: rows - before[counter] for counter, rows in after.items()}
            before = after
            excess = {
                counter: rows
                for counter, rows in read.items()
                if rows > (0 if counter.startswith("sequentially") and counter not in BY_QUEUE else limit)
            }
            if excess:
                excesses[target] = excess

    assert excesses == {}
