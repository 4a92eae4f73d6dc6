"""Conformance section 7: where a new consumer group starts.

The reference waits ten seconds between the old messages and the first pop of a `new` group. Here nothing waits: a push
that was answered is older than any group that asks afterwards, on whichever worker, and waiting would hide it if not.
"""

from __future__ import annotations

import asyncio
import time

import pytest

from .support import MANY_PARTITIONS, Broker, Message, as_list, data

OLD = list(range(5))
NEW = [100, 101, 102]


async def push(broker: Broker, queue: str, payloads: list[int]) -> None:
    await broker.client.queue(queue).push([{"data": payload} for payload in payloads])


async def read(broker: Broker, queue: str, group: str, **choices: str) -> list[int]:
    """What the group is given now, acknowledged."""
    messages = await broker.pop(queue, 100, group=group, **choices)
    if messages:
        await broker.ack(messages, group=group)
    return data(messages)


async def test_mode_new(broker: Broker) -> None:
    name = await broker.create()
    await push(broker, name, OLD)

    assert await read(broker, name, "everything", subscription_mode="all") == OLD
    assert await read(broker, name, "news", subscription_mode="new") == []
    await push(broker, name, NEW)

    assert await read(broker, name, "everything") == NEW
    assert await read(broker, name, "news") == NEW


@pytest.mark.parametrize("mode", ["new", "new-only"])
async def test_mode_new_alone(broker: Broker, mode: str) -> None:
    name = await broker.create()
    await push(broker, name, OLD)

    assert await read(broker, name, "news", subscription_mode=mode) == []
    await push(broker, name, NEW)

    assert await read(broker, name, "news") == NEW


async def test_from_now(broker: Broker) -> None:
    name = await broker.create()
    await push(broker, name, OLD)

    assert await read(broker, name, "news", subscription_from="now") == []
    await push(broker, name, NEW)

    assert await read(broker, name, "news") == NEW


async def test_from_a_time(broker: Broker) -> None:
    name = await broker.create()
    await push(broker, name, OLD)
    oldest_new = await broker.client.queue(name).push([{"data": NEW[0]}])
    await push(broker, name, NEW[1:])
    everything = await broker.pop(name, 100, group="everything")
    moment = next(m["createdAt"] for m in everything if m["id"] == oldest_new[0]["message_id"])

    assert await read(broker, name, "since", subscription_from=moment) == NEW


async def test_mode_all(broker: Broker) -> None:
    name = await broker.create()
    await push(broker, name, OLD)

    assert await read(broker, name, "first", subscription_mode="all") == OLD
    assert await read(broker, name, "second", subscription_mode="all") == OLD


async def test_server_default(broker: Broker) -> None:
    name = await broker.create()
    await push(broker, name, OLD)

    assert await read(broker, name, "default") == OLD
    assert await read(broker, name, "news", subscription_mode="new") == []
    await push(broker, name, NEW)

    assert await read(broker, name, "default") == NEW
    assert await read(broker, name, "news") == NEW


async def test_the_stored_mode_covers_partitions_made_later(broker: Broker) -> None:
    name = await broker.create()
    await push(broker, name, OLD)
    assert await read(broker, name, "news", subscription_mode="new") == []

    await broker.client.queue(name).partition("later").push([{"data": 1}])

    assert await read(broker, name, "news", subscription_mode="all") == [1]


@pytest.mark.seconds(300)
async def test_a_group_that_starts_new_on_many_partitions(broker: Broker) -> None:
    """5,000 partitions as in the reference on one combination, 1,000 on the others."""
    count = MANY_PARTITIONS
    client = broker.connect(keep_alive=True)
    name = await broker.create()

    async def push_everywhere(kind: str) -> None:
        for first in range(0, count, 500):
            items = [{"queue": name, "partition": f"p{n}", "payload": f"{kind} {n}"} for n in range(first, first + 500)]
            assert (await broker.http.post("/api/v1/push", json={"items": items})).status_code == 201

    async def consume(concurrency: int, batch: int, partitions: int, group: str | None) -> list[str]:
        received: list[str] = []
        done = asyncio.Event()

        async def handler(delivery: Message | list[Message]) -> None:
            received.extend(data(as_list(delivery)))
            if len(received) >= count:
                done.set()

        builder = client.queue(name).concurrency(concurrency).batch(batch).partitions(partitions)
        if group:
            builder = builder.group(group)
        await builder.idle_millis(5_000).timeout_millis(1_000).consume(handler, signal=done)
        return received

    await push_everywhere("old")
    assert sorted(await consume(10, 100, 100, None)) == sorted(f"old {n}" for n in range(count))

    begun = time.monotonic()
    assert await broker.pop(name, 100, group="news", subscription_mode="new") == []
    assert time.monotonic() - begun < 10

    await push_everywhere("new")
    assert sorted(await consume(10, 1, 1, "news")) == sorted(f"new {n}" for n in range(count))
    assert await broker.pop(name, 100, group="news", partitions=100) == []
