"""The kept sums say what a count of everything would say, whatever happens at the same time."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
import trio

from queen.model.message import Ack, AckStatus, PopRequest
from queen.model.queue import QUEUE_MODE
from queen.storage.groups import Target
from queen.storage.lines import read_line
from tests.conftest import Broker, DatabaseClock, OpenBroker, Session

QUEUES = ("a", "b")
PARTITIONS = ("1", "2", "3")
GROUPS = (QUEUE_MODE, "g", "h")

_TRUTH = """
    SELECT q.name AS queue, '' AS group_name, sum(p.next_offset)::bigint AS stored,
        sum(p.first_offset)::bigint AS removed, sum(p.erased)::bigint AS erased, count(*) AS partitions,
        0::bigint AS consumed, 0::bigint AS dead_letters
    FROM queen.partitions p JOIN queen.queues q ON q.queue_id = p.queue_id GROUP BY q.name
    UNION ALL
    SELECT q.name, t.group_name, 0, 0, 0, 0, sum(t.consumed)::bigint, sum(t.dead)::bigint
    FROM (
        SELECT c.queue_id, c.group_name, c.committed AS consumed, 0 AS dead FROM queen.cursors c
        UNION ALL SELECT d.queue_id, d.group_name, 0, 1 FROM queen.dead_letters d
    ) t JOIN queen.queues q ON q.queue_id = t.queue_id GROUP BY q.name, t.group_name
"""


async def assert_counts_are_true(broker: Broker, sql: Session) -> None:
    counted: dict[tuple[str, str], tuple[int, ...]] = {}
    for status in await broker.engine.store.counts.queues():
        count = status.count
        counted[status.queue.name, ""] = (count.stored, count.removed, count.erased, count.partitions, 0, 0)
        for name, group in count.groups.items():
            counted[status.queue.name, name] = (0, 0, 0, 0, group.consumed, group.dead_letters)
    true = {
        (row["queue"], row["group_name"]): tuple(row.values())[2:]
        for row in await sql.fetch(_TRUTH)
        if any(tuple(row.values())[2:])
    }
    assert {key: numbers for key, numbers in counted.items() if any(numbers)} == true


async def _take(broker: Broker, queue: str, batch: int, group: str, *, auto_ack: bool = False) -> list[Ack]:
    """Pop, and an ack for each message that is still there to be read: others may erase them meanwhile."""
    taken = await broker.engine.pop(PopRequest(queue=queue, batch=batch, group=group, auto_ack=auto_ack))
    if taken is None:
        return []
    acks = []
    async for piece in taken.slices():
        acks += [
            Ack(
                transaction_id=read_line(line, piece.id_prefix).transaction_id,
                partition_id=str(piece.claim.partition_id),
                lease_id=None if taken.lease_id is None else str(taken.lease_id),
                group=group,
            )
            for line in piece.lines.split(b"\n")
        ]
    return acks


async def _do_something(broker: Broker, chance: random.Random) -> None:
    queue, partition, group = chance.choice(QUEUES), chance.choice(PARTITIONS), chance.choice(GROUPS)
    what = chance.randrange(20)
    admin = broker.engine.admin
    if what < 7:
        ids = [f"{chance.random()}" for _ in range(chance.randint(1, 5))] if chance.random() < 0.3 else None
        await broker.push(queue, *range(len(ids) if ids else chance.randint(1, 5)), partition=partition, ids=ids)
    elif what < 12:
        acks = await _take(broker, queue, chance.randint(1, 6), group)
        if acks:
            status = chance.choice((*[AckStatus.COMPLETED] * 3, AckStatus.FAILED, AckStatus.DLQ, AckStatus.RETRY))
            some = acks[: chance.randint(1, len(acks))]
            await broker.engine.ack([msgspec.structs.replace(ack, status=status) for ack in some])
    elif what < 14:
        request = PopRequest(queue=queue, batch=chance.randint(1, 6), group=group, auto_ack=chance.random() < 0.5)
        taken = await broker.engine.pop(request)
        if taken is not None and chance.random() < 0.5:
            await taken.give_back()
    elif what == 14:
        to = chance.choice((Target("start"), Target("end"), Target("offset", offset=chance.randint(0, 9))))
        await admin.move_group(group, queue, to, partition if chance.random() < 0.5 else None)
    elif what == 15:
        await admin.forget_group(group, queue)
    elif what == 16:
        for ack in await _take(broker, queue, 1, group):
            await admin.erase(ack.partition_id, ack.transaction_id)
    elif what == 17:
        for ack in await _take(broker, queue, 1, group):
            if await admin.set_aside(ack.partition_id, ack.transaction_id):
                await admin.retry(ack.partition_id, ack.transaction_id)
    elif what == 18:
        await admin.clear(queue, partition if chance.random() < 0.5 else None)
    else:
        await broker.engine.monitor.fold()


@pytest.mark.parametrize("seed", range(4))
async def test_the_sums_are_true_after_anything(
    seed: int, broker: Broker, open_broker: OpenBroker, sql: Session
) -> None:
    for queue in QUEUES:
        await broker.configure(queue, retry_limit=1)

    async def work(worker: Broker, number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        for _ in range(40):
            await _do_something(worker, chance)

    async with open_broker() as other, trio.open_nursery() as workers:
        for number in range(4):
            workers.start_soon(work, (broker, other)[number % 2], number)

    await assert_counts_are_true(broker, sql)
    await broker.engine.monitor.fold()
    assert await sql.fetchval("SELECT count(*) FROM queen.count_changes") == 0
    await assert_counts_are_true(broker, sql)


async def test_retention_takes_the_cursors_with_it(broker: Broker, sql: Session, database_clock: DatabaseClock) -> None:
    queue = await broker.configure("q", retention_enabled=True, retention_seconds=60)
    await broker.push("q", *range(5))
    await broker.pop("q", group="slow", batch=1, auto_ack=True)
    (message,) = await broker.pop("q", batch=1, auto_ack=True)
    assert await broker.engine.admin.erase(message.partition_id, message.transaction_id)
    await database_clock.advance(100)
    await broker.push("q", 5, 6)

    assert await broker.engine.store.expire(queue, 10) == 5

    await assert_counts_are_true(broker, sql)
    (status,) = await broker.engine.store.counts.queues(name="q")
    assert (status.six.total, status.six.pending, status.count.ahead("slow")) == (2, 2, 2)
    assert (await broker.pop("q", group="slow")).data == [5, 6]


async def test_a_deleted_queue_leaves_no_count(broker: Broker, sql: Session) -> None:
    await broker.push("q", 1, 2)
    await broker.engine.monitor.fold()
    await broker.push("q", 3)

    await broker.engine.delete_queue("q")

    assert await broker.engine.store.counts.queues() == []
    for table in ("counts", "count_changes", "traces", "trace_names", "trace_totals"):
        assert await sql.fetchval(f"SELECT count(*) FROM queen.{table}") == 0


async def test_changes_of_a_queue_that_is_gone_are_dropped_by_the_fold(broker: Broker, sql: Session) -> None:
    await broker.push("q", 1)
    await broker.engine.delete_queue("q")
    await sql.execute(
        "INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)"
        " VALUES (0, 1, gen_random_uuid(), 7, '')"
    )

    await broker.engine.monitor.fold()

    assert await sql.fetchval("SELECT count(*) FROM queen.counts") == 0


async def test_two_workers_that_fold_at_once_count_once(broker: Broker, open_broker: OpenBroker, sql: Session) -> None:
    async with open_broker() as other:
        for number in range(10):
            await broker.push("q", number)
            async with trio.open_nursery() as folders:
                for worker in (broker, other):
                    folders.start_soon(worker.engine.monitor.fold)

    await broker.engine.monitor.fold()
    await assert_counts_are_true(broker, sql)


async def test_what_is_counted_survives_a_report_that_could_not_be_written(broker: Broker, sql: Session) -> None:
    await sql.wait_for("SELECT count(*) > 0 FROM queen.processes")  # the worker's own first report is not the one meant
    await broker.push("q", 1, 2, 3)
    await sql.execute("ALTER TABLE queen.processes ADD CONSTRAINT no_reports CHECK (false) NOT VALID")
    with pytest.raises(Exception, match="no_reports"):
        await broker.engine.monitor.report()
    await sql.execute("ALTER TABLE queen.processes DROP CONSTRAINT no_reports")

    await broker.engine.monitor.report()

    rows: list[Any] = await sql.fetch(
        "SELECT span, sum(push_messages)::int AS messages FROM queen.queue_series WHERE queue_id <> $1 GROUP BY span",
        "00000000-0000-0000-0000-000000000000",
    )
    assert {row["span"]: row["messages"] for row in rows} == {1: 3, 15: 3, 360: 3}
    assert (await broker.engine.admin.cluster())["push_messages"] == 3
