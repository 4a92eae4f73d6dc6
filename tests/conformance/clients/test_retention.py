"""Conformance section 8, as far as it is about age: retention and eviction.

Maintenance is in test_switches.py; seek and deletion of a group are in test_groups.py.
"""

from __future__ import annotations

import asyncio

from .support import Broker, data


async def test_retention(broker: Broker) -> None:
    """The reference keeps for ten seconds and looks after fifteen; a third of it says the same.

    The server sweeps every two seconds here, as in the reference's environment.
    """
    name = await broker.create(retention_enabled=True, retention_seconds=3, completed_retention_seconds=2)
    await broker.client.queue(name).push([{"data": n} for n in range(100)])
    assert data(await broker.pop(name, 100, group="early")) == list(range(100))

    await asyncio.sleep(5)

    assert await broker.pop(name, 100) == []
    assert await broker.pop(name, 100, group="late") == []


async def test_an_id_may_be_used_again_when_its_message_is_gone(broker: Broker) -> None:
    name = await broker.create(retention_enabled=True, retention_seconds=1)
    await broker.client.queue(name).push([{"transactionId": "order-1", "data": "old"}])

    for _ in range(60):  # a sweep every two seconds, in another process
        answer = await broker.client.queue(name).push([{"transactionId": "order-1", "data": "young"}])
        if answer[0]["status"] == "queued":
            break
        await asyncio.sleep(0.5)

    assert answer[0]["status"] == "queued"
    assert data(await broker.pop(name, 10)) == ["young"]


async def test_retention_needs_its_switch(broker: Broker) -> None:
    name = await broker.create(retention_enabled=False, retention_seconds=1, completed_retention_seconds=1)
    await broker.client.queue(name).push([{"data": 1}])

    await asyncio.sleep(4)  # past the age and a sweep

    assert data(await broker.pop(name)) == [1]


async def test_a_message_that_waited_too_long_is_not_delivered(broker: Broker) -> None:
    """The sweep for it runs once a minute here: what hides the message is the pop."""
    name = await broker.create(max_wait_time_seconds=2)
    await broker.client.queue(name).push([{"data": "stale"}])

    await asyncio.sleep(2.5)
    await broker.client.queue(name).push([{"data": "fresh"}])

    assert data(await broker.pop(name, 10)) == ["fresh"]
