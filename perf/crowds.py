"""Many of one thing: pops that wait, groups, partitions. What they cost is measured elsewhere.

Ten thousand connections of :mod:`perf.wire` would hold 2.5 GB of buffers; here one that waits is a socket and a task.
"""

from __future__ import annotations

import socket
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit
from uuid import UUID, uuid5

import trio

from perf.server import Database
from perf.wire import Connection, get

PARK_SECONDS = 300  # how long the pops wait, and how long anything here may take
AT_ONCE = 64  # connections opened at a time: fewer than a backlog holds


class Crowd:
    """Pops that were sent; each is answered once."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.messages = 0
        self.errors: Counter[str] = Counter()
        self._answered = 0
        self._all = trio.Event()

    def answered(self, answer: bytes) -> None:
        if answer.startswith(b"HTTP/1.1 200 "):
            self.messages += answer.count(b'"transactionId":')
        else:
            self.errors[repr(answer[:100])] += 1
        self._answered += 1
        if self._answered == self.size:
            self._all.set()

    async def wait_all_answered(self) -> None:
        """Until the last has its answer."""
        with trio.fail_after(PARK_SECONDS):
            await self._all.wait()


@asynccontextmanager
async def parked(url: str, queue: str, count: int) -> AsyncIterator[Crowd]:
    """``count`` pops of one message each that wait at the server. The queue has one message, which one of them gets:
    the consumer group is registered by it, and all are parked when the block begins."""
    crowd = Crowd(count)
    request = get(url, f"/api/v1/pop/queue/{queue}?batch=1&autoAck=true&wait=true&timeout={PARK_SECONDS * 1000}")
    parts = urlsplit(url)
    turn = trio.CapacityLimiter(AT_ONCE)
    sent = trio.Event()
    waiting = count

    async def pop() -> None:
        nonlocal waiting
        connection = trio.socket.socket(socket.AF_INET)
        try:
            async with turn:
                await connection.connect((parts.hostname, parts.port))
                await connection.send(request)
            waiting -= 1
            if waiting == 0:
                sent.set()
            crowd.answered(await connection.recv(8192))
        except OSError as error:
            crowd.answered(repr(error).encode())
        finally:
            connection.close()

    async with trio.open_nursery() as pops:
        for _ in range(count):
            pops.start_soon(pop)
        with trio.fail_after(PARK_SECONDS):
            await sent.wait()
            while await _parked(url, queue) < count - 1:  # noqa: ASYNC110  the server's own figure: nobody tells of it
                await trio.sleep(0.5)
        yield crowd
        pops.cancel_scope.cancel()


async def _parked(url: str, queue: str) -> int:
    """How many pops wait at the server, as it says."""
    connection = await Connection.open(url)
    try:
        await connection.exchange(get(url, "/metrics/prometheus"))
        name = f'queen_queue_parked_consumers{{queue="{queue}"}}'.encode()
        figures = [line for line in connection.body().splitlines() if line.startswith(name)]
        return sum(int(float(line.rsplit(b" ", 1)[1])) for line in figures)
    finally:
        connection.close()


def idle_queues(count: int, like: str, prefix: str, group: str) -> Sequence[str]:
    """Statements that make queues as they are when what was pushed is consumed and gone: with the options of one that
    is there, a partition each, and a group with its cursor. Bucket 0 is all there is."""
    ours = f"q.name ~ '^{prefix}[0-9]+$'"
    return (
        "INSERT INTO queen.queues SELECT (jsonb_populate_record(q, jsonb_build_object('queue_id', gen_random_uuid(),"
        f" 'name', '{prefix}' || n))).* FROM queen.queues q CROSS JOIN generate_series(1, {count}) n"
        f" WHERE q.name = '{like}'",
        f"INSERT INTO queen.queue_buckets SELECT 0, q.queue_id FROM queen.queues q WHERE {ours}",
        "INSERT INTO queen.consumer_groups (queue_id, name, mode, created_at)"
        f" SELECT q.queue_id, '{group}', 'all', q.created_at FROM queen.queues q WHERE {ours}",
        "INSERT INTO queen.partitions (bucket, partition_id, queue_id, name, next_offset, first_offset, created_at)"
        f" SELECT 0, gen_random_uuid(), q.queue_id, 'Default', 1, 1, q.created_at FROM queen.queues q WHERE {ours}",
        "INSERT INTO queen.cursors (bucket, partition_id, group_name, queue_id, committed)"
        f" SELECT 0, p.partition_id, '{group}', p.queue_id, 1 FROM queen.partitions p"
        f" JOIN queen.queues q ON q.queue_id = p.queue_id WHERE {ours}",
        "INSERT INTO queen.counts (bucket, queue_id, group_name, stored, removed, erased, partitions, consumed,"
        f" dead_letters) SELECT 0, q.queue_id, '', 1, 1, 0, 1, 0, 0 FROM queen.queues q WHERE {ours}",
    )


async def register(url: str, queue: str, groups: Sequence[str | None]) -> None:
    """Have consumer groups known on a queue, by a pop of one message; None: without a group."""
    connection = await Connection.open(url)
    try:
        for group in groups:
            name = "" if group is None else f"&consumerGroup={group}&subscriptionMode=all"
            await connection.exchange(get(url, f"/api/v1/pop/queue/{queue}?batch=1&autoAck=true{name}"))
    finally:
        connection.close()


async def add_partitions(database: Database, queue: str, count: int) -> None:
    """Idle partitions as pushes and pops would have left them: a row each, and a cursor for each group."""
    queue_id = UUID(await database.psql(f"SELECT queue_id FROM queen.queues WHERE name = '{queue}'"))
    with tempfile.NamedTemporaryFile("w", prefix="queen-bench-", suffix=".csv") as file:  # psql, a child, reads it
        file.writelines(f"{uuid5(queue_id, f'idle {number}')},idle {number}\n" for number in range(count))
        file.flush()
        await database.psql("CREATE TABLE bench_partitions (partition_id uuid, name text)")
        await database.psql(f"\\copy bench_partitions FROM '{file.name}' WITH (FORMAT csv)")
    await database.psql(
        "INSERT INTO queen.partitions (bucket, partition_id, queue_id, name, created_at)"
        f" SELECT 0, partition_id, '{queue_id}', name, clock_timestamp() FROM bench_partitions"
    )
    await database.psql(
        "INSERT INTO queen.cursors (bucket, partition_id, group_name, queue_id, committed)"
        " SELECT 0, b.partition_id, g.name, g.queue_id, 0 FROM bench_partitions b"
        f" CROSS JOIN queen.consumer_groups g WHERE g.queue_id = '{queue_id}'"
    )
    await database.psql(
        "INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)"
        f" VALUES (0, 4, '{queue_id}', {count}, '')"
    )
    await database.psql("DROP TABLE bench_partitions")
    await database.psql("VACUUM ANALYZE queen.partitions, queen.cursors")
    await database.psql("CHECKPOINT")
    with trio.fail_after(PARK_SECONDS):  # what the loading leaves to do is no part of the figure
        while await database.psql("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'autovacuum:%'") != "0":  # noqa: ASYNC110
            await trio.sleep(0.5)
