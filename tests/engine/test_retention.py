"""Retention and eviction: hidden from pops at once (P9, trap 14), removed by the sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.conftest import Broker, DatabaseClock, OpenBroker, OpenSession, Session

import pytest


async def stored(sql: Session) -> int:
    return int(await sql.fetchval("SELECT coalesce(sum(message_count), 0) FROM queen.segments"))


async def sweep(broker: Broker, name: str = "q") -> int:
    queue = await broker.engine.store.catalogue.find(name)
    assert queue is not None
    return await broker.engine.store.expire(queue, 100)


@pytest.mark.parametrize(
    "options",
    [{"retention_enabled": True, "retention_seconds": 60}, {"max_wait_time_seconds": 60}],
    ids=["retention", "eviction"],
)
@pytest.mark.buckets
async def test_an_expired_message_is_hidden_before_the_sweep_and_freed_by_it(
    broker: Broker, database_clock: DatabaseClock, sql: Session, options: dict[str, Any]
) -> None:
    await broker.configure("q", **options)
    await broker.push("q", "old", "older")
    await database_clock.advance(59)
    await broker.push("q", "young")
    assert await sweep(broker) == 0
    await database_clock.advance(2)

    assert await stored(sql) == 3
    assert (await broker.pop("q", group="a")).data == ["young"]
    assert (await broker.pop("q", group="b", partition="Default", auto_ack=True)).data == ["young"]
    assert await sweep(broker) == 2
    assert await stored(sql) == 1
    assert (await broker.pop("q", group="c")).data == ["young"]


async def test_a_partition_whose_messages_have_all_expired_is_idle_and_wakes_with_the_next_push(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    await broker.configure("q", max_wait_time_seconds=10)
    await broker.push("q", 1, 2)
    await database_clock.advance(11)

    assert not await broker.pop("q")
    assert await sweep(broker) == 2
    await broker.push("q", 3)
    assert (await broker.pop("q")).data == [3]


async def test_retention_that_is_not_enabled_removes_nothing(broker: Broker, database_clock: DatabaseClock) -> None:
    await broker.configure("q", retention_seconds=1, completed_retention_seconds=1)
    await broker.push("q", 1)
    await database_clock.advance(100)

    assert await sweep(broker) == 0
    assert (await broker.pop("q")).data == [1]


async def test_completed_retention_removes_what_every_group_has_consumed(
    broker: Broker, database_clock: DatabaseClock, sql: Session
) -> None:
    await broker.configure("q", retention_enabled=True, completed_retention_seconds=60)
    for at in range(4):
        await broker.push("q", at)
    for group, count in (("fast", 4), ("slow", 2)):
        await broker.pop("q", group=group, batch=count, auto_ack=True)

    assert await sweep(broker) == 0
    await database_clock.advance(61)
    assert await sweep(broker) == 2
    assert (await broker.pop("q", group="slow", auto_ack=True)).data == [2, 3]
    assert await sweep(broker) == 2
    assert await stored(sql) == 0


async def test_completed_retention_keeps_what_nobody_has_consumed(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    await broker.configure("q", retention_enabled=True, completed_retention_seconds=1)
    await broker.push("q", 1)
    await database_clock.advance(1000)

    assert await sweep(broker) == 0
    assert (await broker.pop("q")).data == [1]


async def test_what_is_under_a_lease_is_neither_removed_nor_lost_to_its_consumer(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    await broker.configure("q", max_wait_time_seconds=60, lease_seconds=600)
    await broker.push("q", *range(5))
    popped = await broker.pop("q", batch=3)
    await database_clock.advance(61)

    assert await sweep(broker) == 0
    verdicts = await broker.ack(popped.messages, lease=popped.lease)
    assert verdicts[2].lease_released
    assert not await broker.pop("q")
    assert await sweep(broker) == 5


async def test_an_expired_message_cannot_be_acked_when_it_has_been_removed(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    await broker.configure("q", max_wait_time_seconds=10)
    pushed = await broker.push("q", ids=["a", "b"])
    popped = await broker.pop("q", group="g")
    await database_clock.advance(301)
    assert await sweep(broker) == 2

    verdicts = await broker.ack(popped.messages, group="g")

    assert len(pushed) == 2
    assert [verdict.error for verdict in verdicts] == ["Message not found"] * 2


@pytest.mark.buckets
async def test_the_sweep_goes_through_more_partitions_than_one_step_holds(
    broker: Broker, database_clock: DatabaseClock, sql: Session
) -> None:
    queue = await broker.configure("q", max_wait_time_seconds=10)
    await broker.engine.push([broker.message(queue="q", partition=str(at)) for at in range(250)], None)
    await database_clock.advance(11)
    await broker.engine.push([broker.message(queue="q", partition=str(at)) for at in range(0, 250, 5)], None)

    assert await broker.engine.store.expire(queue, 20) == 250
    assert await stored(sql) == 50
    assert len(await broker.drain("q", partitions=100)) == 50


@pytest.mark.buckets
async def test_housekeeping_sweeps_by_itself(
    open_broker: OpenBroker, database_clock: DatabaseClock, sql: Session
) -> None:
    async with open_broker(retention_interval_seconds=0.05, eviction_interval_seconds=0.05) as broker:
        await broker.configure("kept", retention_enabled=True, retention_seconds=60)
        await broker.configure("evicted", max_wait_time_seconds=60)
        for name in ("kept", "evicted", "plain"):
            await broker.push(name, 1)
        await database_clock.advance(61)

        await sql.wait_for("SELECT count(*) = 1 FROM queen.segments")

    assert await sql.fetchval("SELECT q.name FROM queen.segments s JOIN queen.partitions p USING (bucket, partition_id)"
                              " JOIN queen.queues q USING (queue_id)") == "plain"  # fmt: skip


async def test_housekeeping_finishes_a_deletion_that_was_cut_short(open_broker: OpenBroker, sql: Session) -> None:
    async with open_broker(retention_interval_seconds=0.05) as broker:
        await broker.push("q", 1, 2)
        await broker.pop("q")
        await sql.execute("SELECT queen.delete_queue(NULL, 'q')")

        await sql.wait_for("SELECT NOT EXISTS (SELECT FROM queen.deleted_queues)")

    assert await stored(sql) == 0
    assert await sql.fetchval("SELECT count(*) FROM queen.cursors") == 0


@pytest.mark.buckets
async def test_a_server_leaves_the_sweep_of_a_bucket_to_the_one_that_is_at_it(
    broker: Broker, database_clock: DatabaseClock, sessions: OpenSession, sql: Session
) -> None:
    await broker.configure("q", max_wait_time_seconds=10)
    await broker.push("q", 1)
    await database_clock.advance(40 * 86_400)
    elsewhere = sessions()
    await elsewhere.execute("BEGIN")
    await elsewhere.fetch(
        "SELECT pg_advisory_xact_lock($1, bucket) FROM generate_series(0, $2) AS bucket",
        0x7175_6501,
        broker.engine.store.buckets - 1,
    )

    assert await sweep(broker) == 0
    assert await broker.engine.store.expiry.clean(30, 10) == 0
    assert await stored(sql) == 1
    await elsewhere.execute("COMMIT")
    assert await sweep(broker) == 1
