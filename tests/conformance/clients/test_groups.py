"""Conformance section 8, groups: what was consumed can be had again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from .support import Broker, data

PAYLOADS = list(range(10))


async def consumed(broker: Broker, group: str) -> str:
    """A queue of ten messages that the group has consumed."""
    name = await broker.create()
    await broker.client.queue(name).push([{"data": payload} for payload in PAYLOADS])
    messages = await broker.pop(name, 10, group=group)
    assert data(messages) == PAYLOADS
    await broker.ack(messages, group=group)
    assert await broker.pop(name, 10, group=group) == []
    return name


async def test_seeking_backwards_allows_to_consume_again(broker: Broker) -> None:
    name = await consumed(broker, "readers")
    before = datetime.now(UTC) - timedelta(minutes=1)

    await broker.client.admin.seek_consumer_group("readers", name, {"timestamp": before.isoformat()})

    assert data(await broker.pop(name, 10, group="readers")) == PAYLOADS


async def test_deleting_a_group_allows_to_consume_again(broker: Broker) -> None:
    group = broker.name("-group")  # the client deletes it on every queue, so it is this test's own
    name = await consumed(broker, group)

    await broker.client.delete_consumer_group(group, delete_metadata=True)

    assert data(await broker.pop(name, 10, group=group)) == PAYLOADS
