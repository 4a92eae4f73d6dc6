"""Conformance section 4: the consume loop of the clients (pop, handler, acknowledge) in all its arrangements."""

from __future__ import annotations

import asyncio
from typing import Any

from .support import Broker, Message, as_list, collect_into, data


async def test_consumer(broker: Broker) -> None:
    name = await broker.create()
    await broker.client.queue(name).push([{"data": {"n": 1}}])
    received: list[Any] = []

    await broker.client.queue(name).wait(False).limit(1).consume(collect_into(received))

    assert received == [{"n": 1}]
    assert await broker.pop(name) == []


async def test_consumer_with_partition(broker: Broker) -> None:
    name = await broker.create()
    received: dict[str, list[Any]] = {"first": [], "second": []}
    for partition in received:
        items = [{"data": f"{partition} {n}"} for n in range(100)]
        await broker.client.queue(name).partition(partition).push(items)

    for partition, messages in received.items():
        queue = broker.client.queue(name).partition(partition)
        await queue.batch(100).wait(False).limit(1).consume(collect_into(messages))

    for partition, messages in received.items():
        assert messages == [f"{partition} {n}" for n in range(100)]


async def test_consumer_is_handed_a_batch(broker: Broker) -> None:
    name = await broker.create()
    await broker.client.queue(name).push([{"data": n} for n in range(3)])
    calls: list[list[Any]] = []

    async def handler(messages: list[Message]) -> None:
        calls.append(data(messages))

    await broker.client.queue(name).batch(10).wait(False).limit(1).consume(handler)

    assert calls == [[0, 1, 2]]


async def test_consumer_ordering(broker: Broker) -> None:
    name = await broker.create()
    for n in range(100):
        await broker.client.queue(name).push([{"data": n}])
    received: list[Any] = []

    await broker.client.queue(name).batch(1).wait(False).limit(100).consume(collect_into(received))

    assert received == list(range(100))


async def test_consumer_of_a_queue_deleted_and_made_again(broker: Broker) -> None:
    name = await broker.create()
    await broker.client.queue(name).push([{"data": "old"} for _ in range(5)])
    await broker.ack(await broker.pop(name, 2))
    await broker.client.queue(name).delete()
    await broker.client.queue(name).create()
    await broker.client.queue(name).push([{"data": n} for n in range(3)])
    calls: list[list[Any]] = []

    async def handler(messages: list[Message]) -> None:
        calls.append(data(messages))

    await broker.client.queue(name).batch(10).wait(False).limit(1).consume(handler)

    assert calls == [[0, 1, 2]]


async def test_ten_consumers_of_one_partition_keep_its_order(broker: Broker) -> None:
    name = await broker.create()
    for n in range(100):
        await broker.client.queue(name).push([{"data": n}])
    received: list[Any] = []

    consumer = broker.client.queue(name).concurrency(10).batch(1).limit(10)
    await consumer.consume(collect_into(received))

    assert received == list(range(100))


async def test_ten_consumers_keep_the_order_of_buffered_pushes(broker: Broker) -> None:
    name = await broker.create()
    for n in range(100):
        await broker.client.queue(name).buffer({"message_count": 20, "time_millis": 1000}).push([{"data": n}])
    await broker.client.queue(name).flush_buffer()
    received: list[Any] = []

    consumer = broker.client.queue(name).concurrency(10).batch(10).limit(10).wait(True).timeout_millis(2000)
    done = asyncio.Event()

    async def handler(delivery: Message | list[Message]) -> None:
        received.extend(data(as_list(delivery)))
        if len(received) >= 100:
            done.set()

    await consumer.consume(handler, signal=done)

    # The client sends its first 20 and the other 80 at once, on two connections: which comes first, it does not say.
    stored = data(await broker.pop(name, 100, group="reader", subscription_mode="all"))
    assert received == stored
    assert [n for n in stored if n < 20] == list(range(20))
    assert [n for n in stored if n >= 20] == list(range(20, 100))


async def test_every_consumer_group_gets_every_message(broker: Broker) -> None:
    name = await broker.create()
    await broker.client.queue(name).push([{"data": n} for n in range(100)])
    received: dict[str, list[Any]] = {"billing": [], "shipping": []}

    for group, messages in received.items():
        queue = broker.client.queue(name).group(group).subscription_mode("from_beginning")
        await queue.batch(100).wait(False).limit(1).consume(collect_into(messages))

    assert received == {"billing": list(range(100)), "shipping": list(range(100))}


async def test_ten_thousand_messages_acknowledged_by_hand(broker: Broker) -> None:
    name = await broker.create()
    await broker.client.queue(name).push([{"data": {"id": n}} for n in range(10_000)])
    received: list[int] = []
    sizes: list[int] = []

    async def handler(messages: list[Message]) -> None:
        received.extend(message["data"]["id"] for message in messages)
        sizes.append(len(messages))
        await broker.ack(messages)

    consumer = broker.client.queue(name).batch(1000).wait(False).limit(10_000).auto_ack(False)
    await consumer.consume(handler)

    assert received == list(range(10_000))
    assert sizes == [1000] * 10
    assert await broker.pop(name) == []


async def test_a_batch_is_delivered_again_until_its_handler_succeeds(broker: Broker) -> None:
    name = await broker.create(retry_limit=3)
    await broker.client.queue(name).push([{"data": n} for n in range(100)])
    attempts: list[list[Any]] = []

    async def handler(messages: list[Message]) -> None:
        attempts.append(data(messages))
        if len(attempts) < 3:
            raise ValueError("not yet")

    await broker.client.queue(name).batch(100).wait(False).limit(300).consume(handler)

    assert attempts == [list(range(100))] * 3
    assert await broker.pop(name) == []


async def test_a_renewed_lease_outlives_its_length(broker: Broker) -> None:
    name = await broker.create(lease_time=2)
    await broker.client.queue(name).push([{"data": 1}])
    seen_by_others: list[Message] = []

    async def handler(delivery: Message | list[Message]) -> None:
        await asyncio.sleep(4)  # twice the lease: the point of the case
        seen_by_others.extend(await broker.pop(name))
        await broker.ack(delivery)

    consumer = broker.client.queue(name).batch(1).limit(1).auto_ack(False).renew_lease(True, 1000)
    await consumer.consume(handler)

    assert seen_by_others == []
    assert await broker.pop(name) == []


async def test_consumer_of_several_partitions_at_once(broker: Broker) -> None:
    name = await broker.create()
    for partition in ("a", "b", "c"):
        await broker.client.queue(name).partition(partition).push([{"data": f"{partition}{n}"} for n in range(4)])
    calls: list[list[Message]] = []

    async def handler(messages: list[Message]) -> None:
        calls.append(messages)

    await broker.client.queue(name).batch(100).partitions(3).wait(False).limit(1).consume(handler)

    assert [len(call) for call in calls] == [12]
    assert len({message["partitionId"] for message in calls[0]}) == 3
    assert len({message["leaseId"] for message in calls[0]}) == 1
    assert await broker.pop(name) == []


async def test_consumer_of_a_namespace(broker: Broker) -> None:
    label = broker.name("-label")
    for suffix, namespace in (("-one", label), ("-two", label), ("-other", f"{label}-other")):
        name = broker.name(suffix)
        await broker.client.queue(name).namespace(namespace).create()
        await broker.client.queue(name).push([{"data": suffix}])
    received: list[Any] = []

    await broker.client.queue().namespace(label).batch(10).wait(False).limit(2).consume(collect_into(received))

    assert sorted(received) == ["-one", "-two"]
    assert data(await broker.pop(name)) == ["-other"]


async def test_consumer_of_a_task(broker: Broker) -> None:
    label = broker.name("-label")
    for suffix, namespace, task in (("-one", "n", label), ("-two", "m", label), ("-other", "n", f"{label}-other")):
        name = broker.name(suffix)
        await broker.client.queue(name).namespace(namespace).task(task).create()
        await broker.client.queue(name).push([{"data": suffix}])
    received: list[Any] = []

    await broker.client.queue().task(label).batch(10).wait(False).limit(2).consume(collect_into(received))

    assert sorted(received) == ["-one", "-two"]
    assert data(await broker.pop(name)) == ["-other"]
