"""Options that the reference stores and ignores, and that are enforced here when a client sets them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from .support import IS_2, Broker, data


async def test_a_queue_takes_as_many_messages_as_it_may_hold(broker: Broker) -> None:
    name = await broker.create(max_size=3)
    await broker.client.queue(name).push([{"data": n} for n in range(3)])

    refused = await broker.http.post("/api/v1/push", json={"items": [{"queue": name, "payload": 3}]})

    assert (refused.status_code, refused.headers["Retry-After"], refused.json()["code"]) == (429, "1", "queue_full")
    assert [result["status"] for result in refused.json()["results"]] == ["failed"]
    await broker.ack(await broker.pop(name, 1))
    answer = await broker.client.queue(name).push([{"data": 4}])
    assert answer[0]["status"] == "queued"
    assert data(await broker.pop(name, 10)) == [1, 2, 4]


@pytest.mark.skipif(IS_2, reason="2.6 tries again by itself")
async def test_a_producer_is_told_that_a_queue_is_full(broker: Broker) -> None:
    name = await broker.create(max_size=1)
    await broker.client.queue(name).push([{"data": 1}])

    with pytest.raises(Exception, match="has room for 0 more"):
        await broker.client.queue(name).push([{"data": 2}])

    assert data(await broker.pop(name, 10)) == [1]


@pytest.mark.skipif(not IS_2, reason="0.15 gives up at once")
async def test_a_producer_is_held_back_until_there_is_room(broker: Broker) -> None:
    name = await broker.create(max_size=1)
    await broker.client.queue(name).push([{"data": 1}])

    async def push() -> Any:
        return await broker.client.queue(name).push([{"data": 2}])

    async with asyncio.TaskGroup() as tasks:
        pushing = tasks.create_task(push())
        await asyncio.sleep(0.5)  # it has been refused by then, in another process
        assert not pushing.done()
        await broker.ack(await broker.pop(name))

    assert pushing.result()[0]["status"] == "queued"
    assert data(await broker.pop(name, 10)) == [2]


async def test_what_outlives_its_ttl_is_not_delivered_and_becomes_a_dead_letter(broker: Broker) -> None:
    name = await broker.create(ttl=1, dead_letter_queue=True)
    payload = {"text": "ä", "list": [1, None, 2.50]}
    await broker.client.queue(name).push([{"data": payload}])
    await asyncio.sleep(1.5)

    assert await broker.pop(name, group="billing", subscription_mode="all") == []

    letters: list[Any] = []
    for _ in range(40):  # a worker, in another process, is at it
        letters = (await broker.client.queue(name).dlq("billing").get())["messages"]
        if letters:
            break
        await asyncio.sleep(0.25)
    assert [(letter["data"], letter["errorMessage"]) for letter in letters] == [
        (payload, "Expired: ttl of 1 s is over")
    ]


async def test_a_failed_batch_waits_for_its_retry_delay(broker: Broker) -> None:
    name = await broker.create(retry_delay=2000)
    await broker.client.queue(name).push([{"data": "failing"}])
    (message,) = await broker.pop(name)
    await broker.ack(message, False, error="not yet")
    await broker.client.queue(name).partition("other").push([{"data": "fine"}])

    assert data(await broker.pop(name, 10, **({"autopilot": False} if IS_2 else {}))) == ["fine"]
    assert await broker.pop(name, 10) == []
    assert data(await broker.wait_pop(name)) == ["failing"]
