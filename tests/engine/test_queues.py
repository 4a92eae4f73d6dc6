"""Creating, configuring and deleting queues, also under the feet of another worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import msgspec
import pytest
import trio

from queen.model.queue import QueueOptions, StartFrom, StartMode

if TYPE_CHECKING:
    from tests.conftest import Broker, Session

pytestmark = pytest.mark.buckets

ALL_OPTIONS: dict[str, Any] = {
    "lease_seconds": 17,
    "retry_limit": 0,
    "retry_delay_ms": 1,
    "priority": -2,
    "delayed_processing_seconds": 3,
    "window_buffer_seconds": 4,
    "max_size": 5,
    "ttl_seconds": 6,
    "dead_letter_queue": True,
    "dlq_after_max_retries": True,
    "retention_enabled": True,
    "retention_seconds": 7,
    "completed_retention_seconds": 8,
    "max_wait_time_seconds": 9,
    "encryption_enabled": True,
    "ttl_enforced": True,
    "retry_delay_enforced": True,
}


async def test_configure_stores_every_option_and_tells_the_default_partition(broker: Broker, other: Broker) -> None:
    options = QueueOptions(**ALL_OPTIONS)
    assert set(ALL_OPTIONS) == {field.name for field in msgspec.structs.fields(QueueOptions)}

    queue, partition_id = await broker.engine.configure("q", "ns", "task", options)

    assert (queue.name, queue.namespace, queue.task, queue.options) == ("q", "ns", "task", options)
    assert str(partition_id) == broker.partition_id(queue)
    assert await other.engine.store.catalogue.find("q") == queue


async def test_configure_again_resets_what_it_does_not_name_and_keeps_what_is_in_the_queue(broker: Broker) -> None:
    first = await broker.configure("q", "ns", "task", retry_limit=9, priority=4)
    await broker.push("q", 1, 2)
    popped = await broker.pop("q", batch=1)

    second = await broker.configure("q")

    assert second.queue_id == first.queue_id
    assert second.version > first.version
    assert (second.namespace, second.task, second.options) == ("", "", QueueOptions())
    assert (await broker.ack(popped.messages, lease=popped.lease))[0].lease_released
    assert (await broker.pop("q")).data == [2]


async def test_a_queue_is_born_once_however_many_push_to_it(broker: Broker, other: Broker, sql: Session) -> None:
    async with trio.open_nursery() as producers:
        for at in range(10):
            producers.start_soon(broker.push, "q", at)
            producers.start_soon(other.push, "q", at + 10)

    assert await sql.fetchval("SELECT count(*) FROM queen.queues") == 1
    assert sorted(await broker.drain("q")) == list(range(20))


async def test_deleting_a_queue_removes_all_that_is_in_it(broker: Broker, sql: Session) -> None:
    for partition in range(20):
        await broker.push("q", 1, 2, partition=str(partition), ids=[f"{partition} a", None])
    popped = await broker.pop("q", group="g", partitions=5, start=StartFrom(StartMode.ALL))
    await broker.ack(popped.messages, None)
    await broker.engine.ack(broker.acks_of([popped[0]], lease=popped.lease, group="g"))
    await broker.push("kept", "kept")

    assert await broker.engine.delete_queue("q")

    assert not await broker.engine.delete_queue("q")
    left = {
        table: await sql.fetchval(f"SELECT count(*) FROM queen.{table}")
        for table in (
            "queues",
            "partitions",
            "segments",
            "deleted_queues",
            "transaction_ids",
            "dead_letters",
            "cursors",
        )
    }
    assert left == {
        "queues": 1,
        "partitions": 1,
        "segments": 1,
        "deleted_queues": 0,
        "transaction_ids": 0,
        "dead_letters": 0,
        "cursors": 0,
    }
    assert await sql.fetchval("SELECT count(*) FROM queen.consumer_groups") == 0
    assert (await broker.pop("kept")).data == ["kept"]


async def test_a_queue_created_anew_has_new_partitions_and_free_ids_and_no_groups(broker: Broker) -> None:
    first = await broker.push("q", "old", ids=["id"])
    assert not await broker.pop("q", group="g", start=StartFrom(StartMode.NEW))
    popped = await broker.pop("q")
    await broker.engine.delete_queue("q")

    again = await broker.push("q", "new", ids=["id"])

    assert not again[0].duplicate
    assert again[0].partition_id != first[0].partition_id
    assert (await broker.pop("q", group="g")).data == ["new"]
    assert [verdict.error for verdict in await broker.ack(popped.messages, lease=popped.lease)] == ["Message not found"]
    assert (await broker.pop("q")).data == ["new"]


async def test_what_was_leased_of_a_deleted_queue_can_neither_be_acked_nor_extended_nor_harm(broker: Broker) -> None:
    await broker.push("q", 1, 2)
    popped = await broker.pop("q")
    automatic = await broker.pop("q", group="g", auto_ack=True)
    await broker.engine.delete_queue("q")

    verdicts = await broker.ack(popped.messages, lease=popped.lease)
    extension = await broker.engine.extend_lease(popped.lease, 60)
    await popped.give_back()
    await automatic.give_back()

    assert [verdict.error for verdict in verdicts] == ["Message not found"] * 2
    assert extension.renewed == 0


# -- through another worker, whose caches are stale (trap 9) --------------------------------------------------------


async def test_a_worker_pushes_to_the_new_queue_of_a_name_it_knew(broker: Broker, other: Broker) -> None:
    for partition in ("a", "b"):
        await broker.push("q", 1, partition=partition)
    assert await other.engine.delete_queue("q")
    queue = await other.configure("q", retry_limit=7)

    (result,) = await broker.push("q", 2, partition="a")

    assert result.partition_id == broker.partition_id(queue, "a")
    assert (await other.pop("q")).data == [2]


async def test_a_worker_pushes_to_a_queue_that_another_deleted_and_so_creates_it(broker: Broker, other: Broker) -> None:
    await broker.push("q", 1)
    assert await other.engine.delete_queue("q")

    await broker.push("q", 2)

    assert (await other.pop("q")).data == [2]
    assert (await broker.pop("q", group="g")).data == [2]


@pytest.mark.parametrize("where", [{}, {"partition": "p"}, {"group": "g"}, {"group": "g", "partition": "p"}])
async def test_a_pop_that_does_not_wait_sees_the_new_queue_of_a_name_its_worker_knew(
    broker: Broker, other: Broker, where: dict[str, Any]
) -> None:
    await broker.push("q", "old", partition="p")
    await broker.pop("q", **where)
    assert await other.engine.delete_queue("q")
    assert not await broker.pop("q", **where)
    await other.push("q", "new", partition="p")

    assert (await broker.pop("q", **where)).data == ["new"]

    assert await other.engine.delete_queue("q")
    await other.push("q", "newer", partition="p")
    assert (await broker.pop("q", **where)).data == ["newer"]


async def test_a_namespace_pop_sees_the_new_queue_of_a_name_its_worker_knew(broker: Broker, other: Broker) -> None:
    for name in ("x.one", "x.two"):
        await broker.push(name, "old")
    assert await broker.pop(namespace="x")
    for name in ("x.one", "x.two"):
        assert await other.engine.delete_queue(name)
        await other.push(name, "new")

    assert [(await broker.pop(namespace="x")).data for _ in range(3)] == [["new"], ["new"], []]


async def test_a_worker_whose_queue_was_deleted_acks_what_is_in_the_new_one(broker: Broker, other: Broker) -> None:
    await broker.push("q", 1)
    assert await other.engine.delete_queue("q")
    await other.push("q", 2, 3)
    popped = await broker.pop("q")

    verdicts = await other.ack(popped.messages, lease=popped.lease)

    assert [verdict.success for verdict in verdicts] == [True, True]


async def test_options_set_through_one_worker_hold_in_the_other(broker: Broker, other: Broker) -> None:
    await broker.push("q", 1)
    await broker.pop("q", batch=1)
    await other.configure("q", retry_limit=0, lease_seconds=900)
    await broker.push("q", 2, partition="other")

    popped = await broker.pop("q")
    (verdict,) = await broker.ack(popped.messages, lease=popped.lease)

    assert popped.data == [2]
    assert verdict.lease_released


async def test_pushes_pops_and_deletions_at_once_end_in_a_queue_that_works(broker: Broker, other: Broker) -> None:
    async def produce(via: Broker, number: int) -> None:
        for at in range(15):
            await via.push("q", at, partition=str(number))

    async def consume(via: Broker) -> None:
        for _ in range(15):
            popped = await via.pop("q", partitions=3)
            await via.ack(popped.messages, lease=popped.lease if popped else None)

    async def delete(via: Broker) -> None:
        for _ in range(6):
            await via.engine.delete_queue("q")
            await via.configure("q")

    with trio.fail_after(60):
        async with trio.open_nursery() as tasks:
            for via in (broker, other):
                tasks.start_soon(produce, via, 1)
                tasks.start_soon(produce, via, 2)
                tasks.start_soon(consume, via)
                tasks.start_soon(delete, via)

    group = str(uuid4())
    await broker.engine.delete_queue("q")
    await other.push("q", "end")
    assert (await broker.pop("q", group=group)).data == ["end"]
