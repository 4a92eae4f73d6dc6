"""Partitions that go: long empty ones by themselves, any by order; and one of the same name that comes after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from queen.model.message import AckStatus
from queen.model.stream import Cycle, StateChange, StreamQuery
from queen.model.trace import NewTrace
from queen.storage.ids import partition_id_of, uuid7_texts

if TYPE_CHECKING:
    from tests.conftest import Broker, DatabaseClock, OpenBroker, Session

pytestmark = pytest.mark.buckets

DAY = 86_400


async def partitions(sql: Session) -> list[str]:
    return [row["name"] for row in await sql.fetch("SELECT name FROM queen.partitions ORDER BY name")]


async def emptied(broker: Broker, clock: DatabaseClock, *names: str, days: float = 31) -> None:
    """Partitions of q whose messages have expired, so many days ago."""
    queue = await broker.configure("q", max_wait_time_seconds=60)
    await broker.engine.push([broker.message(queue="q", partition=name) for name in names], None)
    await broker.pop("q", partitions=100, auto_ack=True)
    await clock.advance(61)
    assert await broker.engine.store.expire(queue, 100) == len(names)
    await clock.advance(days * DAY)


async def test_a_partition_that_is_empty_for_long_is_removed_with_its_cursors(
    broker: Broker, database_clock: DatabaseClock, sql: Session
) -> None:
    await emptied(broker, database_clock, "a", "b")
    await broker.push("q", 1, partition="c")

    assert await broker.engine.store.expiry.clean(30, 100) == 2

    assert await partitions(sql) == ["Default", "c"]
    assert await sql.fetchval("SELECT count(*) FROM queen.cursors") == 2
    assert await broker.engine.store.expiry.clean(30, 100) == 0


async def test_one_that_is_empty_since_a_while_or_full_again_stays(
    broker: Broker, database_clock: DatabaseClock, sql: Session
) -> None:
    await emptied(broker, database_clock, "filled again", "empty", days=29)
    await broker.push("q", 1, partition="filled again")
    await broker.configure("q")
    await database_clock.advance(0.9 * DAY)
    assert await broker.engine.store.expiry.clean(30, 100) == 0
    await database_clock.advance(0.2 * DAY)

    assert await broker.engine.store.expiry.clean(30, 1) == 1
    assert await partitions(sql) == ["Default", "filled again"]
    assert (await broker.pop("q")).data == [1]


async def test_what_a_partition_means_to_somebody_keeps_it(
    broker: Broker, database_clock: DatabaseClock, sql: Session
) -> None:
    queue = await broker.configure("q", max_wait_time_seconds=60, retry_limit=0)
    for name in ("dead letters", "stream", "nothing"):
        await broker.push("q", 1, partition=name)
    popped = await broker.pop("q", partition="dead letters")
    await broker.ack(popped.messages, AckStatus.FAILED, lease=popped.lease)
    query_id, _ = await broker.engine.register_stream(
        StreamQuery(name="totals", source_queue="q", sink_queue=None, config_hash="h", reset=False)
    )
    cycle = Cycle(
        query_id=query_id,
        partition_id=partition_id_of(queue.queue_id, "stream"),
        group="g",
        changes=[StateChange("key", b"1")],
        messages=[],
        ack=None,
        release_lease=False,
        digest=None,
    )
    assert (await broker.engine.cycle_stream(cycle, None)).error is None
    await database_clock.advance(61)
    await broker.engine.store.expire(queue, 100)
    await database_clock.advance(31 * DAY)

    assert await broker.engine.store.expiry.clean(30, 100) == 1
    assert await partitions(sql) == ["Default", "dead letters", "stream"]


async def test_the_default_partition_stays(broker: Broker, database_clock: DatabaseClock, sql: Session) -> None:
    await emptied(broker, database_clock, "Default")

    assert await broker.engine.store.expiry.clean(30, 100) == 0
    assert await partitions(sql) == ["Default"]


async def test_a_partition_that_comes_again_begins_anew(
    broker: Broker, other: Broker, database_clock: DatabaseClock, sql: Session
) -> None:
    ids = uuid7_texts(1)
    await broker.configure("q", max_wait_time_seconds=60)
    await broker.push("q", ids=ids, partition="p")
    assert len(await other.pop("q", group="g", auto_ack=True)) == 1
    queue = await broker.engine.store.catalogue.find("q")
    assert queue is not None
    await database_clock.advance(61)
    await broker.engine.store.expire(queue, 100)
    await database_clock.advance(31 * DAY)
    assert await broker.engine.store.expiry.clean(30, 100) == 1

    for via in (broker, other):  # both believe that they know it
        (result,) = await via.push("q", ids=ids if via is broker else uuid7_texts(1), partition="p")
        assert not result.duplicate
    got = await other.pop("q", group="g")

    assert [message.offset for message in got] == [0, 1]
    assert (await broker.pop("q", group="new")).data == got.data


async def test_what_is_cached_of_a_removed_partition_is_not_delivered_from_the_new_one(broker: Broker) -> None:
    queue = await broker.configure("q")
    large = ["x" * 3000 + str(at) for at in range(40)]  # too large to come with the claim
    await broker.push("q", *large, partition="p")
    assert len(await broker.pop("q", batch=1)) == 1  # the rest of the segment is cached

    assert await broker.engine.store.expiry.drop_partition(queue, "p") == 40
    await broker.push("q", *large[::-1], partition="p")

    assert (await broker.pop("q", batch=40)).data == large[::-1]


async def test_a_partition_is_deleted_with_all_that_hangs_on_it(broker: Broker, sql: Session) -> None:
    queue = await broker.configure("q", retry_limit=0)
    await broker.push("q", *range(5), partition="p", ids=[None, "key", *uuid7_texts(3)])
    await broker.push("q", "kept", partition="other")
    popped = await broker.pop("q", partition="p", batch=2)
    await broker.ack([popped[0]], AckStatus.FAILED, lease=popped.lease)
    trace = NewTrace(
        transaction_id=popped[1].transaction_id, partition_id=popped[1].partition_id, data=b"{}", names=("n",)
    )
    assert await broker.engine.admin.record_trace(trace) is not None

    assert await broker.engine.admin.delete_partition("q", "p") == 5

    assert await partitions(sql) == ["Default", "other"]
    for table in ("transaction_ids", "dead_letters", "traces"):
        assert await sql.fetchval(f"SELECT count(*) FROM queen.{table}") == 0
    verdicts = await broker.ack(popped.messages, lease=popped.lease)
    assert [verdict.error for verdict in verdicts] == ["Message not found"] * 2
    assert (await broker.engine.extend_lease(popped.lease, 10)).renewed == 0
    assert (await broker.pop("q", partitions=10)).data == ["kept"]
    assert await broker.engine.admin.delete_partition("q", "p") is None
    assert await broker.engine.admin.delete_partition("unknown", "p") is None
    (status,) = await broker.engine.store.counts.queues(name=queue.name)
    assert (status.count.total, status.count.partitions, status.count.dead_letters) == (1, 2, 0)


async def test_the_sums_are_right_after_partitions_have_gone(
    broker: Broker, database_clock: DatabaseClock, sql: Session
) -> None:
    await emptied(broker, database_clock, *map(str, range(10)))
    await broker.configure("q")
    assert await broker.engine.store.expiry.clean(30, 3) == 10
    await broker.push("q", 1, 2, partition="live")
    assert not await broker.pop("q", group="new", partition="nowhere")

    (status,) = await broker.engine.store.counts.queues(name="q")

    assert (status.count.total, status.count.partitions) == (2, 2)
    assert {group: status.count.ahead(group) for group in status.groups} == {"__QUEUE_MODE__": 2, "new": 2}


async def test_partitions_go_and_come_under_pushes_pops_and_registrations(
    broker: Broker, other: Broker, sql: Session
) -> None:
    queue = await broker.configure("q")
    pushed: list[Any] = []

    async def produce(via: Broker, name: str) -> None:
        for at in range(20):
            await via.push("q", f"{name}{at}", partition=str(at % 2))
            pushed.append(at)

    async def consume(via: Broker, group: str) -> None:
        for _ in range(20):
            popped = await via.pop("q", group=group, partitions=2)
            await via.ack(popped.messages, lease=popped.lease if popped else None, group=group)

    async def drop(via: Broker) -> None:
        for at in range(10):
            await via.engine.store.expiry.drop_partition(queue, str(at % 2))

    with trio.fail_after(60):
        async with trio.open_nursery() as tasks:
            for via, name in ((broker, "a"), (other, "b")):
                tasks.start_soon(produce, via, name)
                tasks.start_soon(consume, via, f"group {name}")
                tasks.start_soon(consume, via, "shared")
                tasks.start_soon(drop, via)

    for at in range(2):
        await broker.engine.store.expiry.drop_partition(queue, str(at))
    await broker.push("q", "end", partition="0")
    for group in ("group a", "group b", "shared"):
        assert (await other.pop("q", group=group)).data == ["end"]
    assert await sql.fetchval("SELECT count(*) FROM queen.cursors c WHERE NOT EXISTS (SELECT FROM queen.partitions p"
                              " WHERE p.bucket = c.bucket AND p.partition_id = c.partition_id)") == 0  # fmt: skip
    (status,) = await broker.engine.store.counts.queues(name="q")
    assert status.count.total == 1


async def test_the_service_removes_them_by_itself(
    open_broker: OpenBroker, database_clock: DatabaseClock, sql: Session
) -> None:
    async with open_broker(partition_cleanup_days=0) as setup:
        await emptied(setup, database_clock, "a", "b")
    async with open_broker(retention_interval_seconds=0.05):
        await sql.wait_for("SELECT count(*) = 1 FROM queen.partitions")
