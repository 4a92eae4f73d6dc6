"""Conformance section 8, maintenance: what turns the server's switches. Run last, when nobody else is on the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .support import Broker, data


@asynccontextmanager
async def switched_on(broker: Broker, *switch: str) -> AsyncIterator[None]:
    """A switch is on for as long as the block lasts, whatever happens in it."""
    path = "/".join(("/api/v1/system/maintenance", *switch))
    try:
        answer = await broker.http.post(path, json={"enabled": True})
        assert answer.status_code == 200, answer.text
        yield
    finally:
        answer = await broker.http.post(path, json={"enabled": False})
        assert answer.status_code == 200, answer.text


async def wait_for_pop(broker: Broker, name: str, payloads: list[object]) -> None:
    """Until the switch is off on every worker, which takes up to a second."""
    deadline = time.monotonic() + 20
    received: list[object] = []
    while len(received) < len(payloads) and time.monotonic() < deadline:
        messages = await broker.pop(name, 10)
        if messages:
            await broker.ack(messages)
        received += data(messages)
    assert received == payloads


async def test_while_pops_are_off_every_pop_is_empty_and_nothing_is_leased(broker: Broker) -> None:
    name = await broker.create()
    await broker.client.queue(name).push([{"data": n} for n in range(3)])

    async with switched_on(broker, "pop"):
        await asyncio.sleep(1)  # what the contract gives it to reach every worker
        begun = time.monotonic()
        assert await broker.wait_pop(name, 10, seconds=20) == []
        assert time.monotonic() - begun < 15  # it does not wait for its timeout
        assert await broker.pop(name, 10) == []
        assert (await broker.http.get("/api/v1/system/maintenance/pop")).json()["popMaintenanceMode"] is True
        answer = await broker.client.queue(name).push([{"data": 3}])
        assert answer[0]["status"] == "queued"

    await wait_for_pop(broker, name, [0, 1, 2, 3])


async def test_pops_that_wait_are_ended_when_pops_are_switched_off(broker: Broker) -> None:
    name = await broker.create()

    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(broker.wait_pop(name, 10, seconds=40))
        await asyncio.sleep(0.5)  # parked by then, in another process
        begun = time.monotonic()
        async with switched_on(broker, "pop"):
            assert await waiting == []
            assert time.monotonic() - begun < 15

    await broker.client.queue(name).push([{"data": 1}])
    await wait_for_pop(broker, name, [1])


async def test_acks_go_on_while_pops_are_off(broker: Broker) -> None:
    name = await broker.create()
    await broker.client.queue(name).push([{"data": 1}, {"data": 2}])
    messages = await broker.pop(name, 1)

    async with switched_on(broker, "pop"):
        await broker.ack(messages)

    await wait_for_pop(broker, name, [2])


async def test_a_switch_wants_to_be_told_what_to_do(broker: Broker) -> None:
    answer = await broker.http.post("/api/v1/system/maintenance/pop", json={"enabled": "yes"})

    assert (answer.status_code, answer.json()["error"]) == (400, "enabled (boolean) is required")


async def test_maintenance_mode_loses_and_doubles_nothing(broker: Broker) -> None:
    """test_maintenance_mode: a producer and a consumer, maintenance on for a while; received is produced."""
    name = await broker.create()
    produced: list[int] = []
    statuses: set[str] = set()
    received: list[object] = []
    stop = asyncio.Event()

    async def produce() -> None:
        while not stop.is_set():
            (result,) = await broker.client.queue(name).push([{"data": len(produced)}])
            produced.append(len(produced))
            statuses.add(result["status"])
            await asyncio.sleep(0.1)

    async def consume() -> None:
        deadline = time.monotonic() + 60
        while not stop.is_set() or (len(received) < len(produced) and time.monotonic() < deadline):
            messages = await broker.wait_pop(name, 10, seconds=1)
            if messages:
                await broker.ack(messages)
            received.extend(data(messages))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(produce())
        tasks.create_task(consume())
        await asyncio.sleep(1)
        async with switched_on(broker):
            await asyncio.sleep(5)
            answer = (await broker.http.get("/api/v1/system/maintenance")).json()
        await asyncio.sleep(3)
        stop.set()

    assert answer["maintenanceMode"] is True
    assert answer["bufferedMessages"] > 0
    assert statuses == {"queued", "buffered"}
    assert received == produced
    assert await broker.pop(name, 10) == []


async def test_maintenance_keeps_what_a_producer_said_and_dedups_when_it_is_over(broker: Broker) -> None:
    name = await broker.create()
    item = {"queue": name, "partition": "p", "payload": {"n": 1}, "transactionId": "once"}

    async with switched_on(broker):
        await asyncio.sleep(1)  # what the contract gives it to reach every worker
        minted = (await broker.http.post("/api/v1/push", json={"items": [{"queue": name, "payload": 0}]})).json()
        first = await broker.http.post("/api/v1/push", json={"items": [item]})
        again = await broker.http.post("/api/v1/push", json={"items": [item]})
        assert await broker.pop(name, 10) == []

    assert (first.status_code, again.status_code) == (201, 201)
    assert minted[0]["status"] == "buffered"
    assert minted[0]["transactionId"]
    for answer in (first, again):
        (result,) = answer.json()
        assert (result["status"], result["queue"], result["partition"]) == ("buffered", name, "p")
        assert result["transactionId"] == "once"
    (message,) = await broker.wait_pop(name, 10, partition="p")
    assert (message["data"], message["transactionId"]) == ({"n": 1}, "once")
    (stored,) = (await broker.http.post("/api/v1/push", json={"items": [item]})).json()
    assert stored["status"] == "duplicate"
