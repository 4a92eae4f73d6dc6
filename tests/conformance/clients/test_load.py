"""Conformance section 5, load: the reference's 100,000 messages on one combination, a fifth of them on the others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from .support import LOAD, Broker, Message

PUSH = 100  # messages per request, as in the reference
CONSUMERS = 10

pytestmark = pytest.mark.seconds(300)


async def push_load(client: Any, name: str) -> None:
    """One producer, one request after another: the order of the messages is the order of the numbers."""
    for first in range(0, LOAD, PUSH):
        await client.queue(name).push([{"data": {"id": n}} for n in range(first, first + PUSH)])


async def consume_load(client: Any, name: str, **choices: str) -> list[int]:
    """Ten consumers, batches of 100, until every message has come; the numbers in the order they were handed over."""
    received: list[int] = []
    done = asyncio.Event()

    async def handler(messages: list[Message]) -> None:
        received.extend(message["data"]["id"] for message in messages)
        if len(received) >= LOAD:
            done.set()

    builder = client.queue(name).concurrency(CONSUMERS).batch(100).timeout_millis(2000)
    for method, value in choices.items():
        builder = getattr(builder, method)(value)
    await builder.consume(handler, signal=done)
    return received


async def test_load(broker: Broker) -> None:
    client = broker.connect(keep_alive=True)
    name = await broker.create()
    await push_load(client, name)

    received = await consume_load(client, name)

    assert len(received) == LOAD
    assert received == list(range(LOAD))
    assert await broker.pop(name) == []


async def test_load_of_two_consumer_groups(broker: Broker) -> None:
    client = broker.connect(keep_alive=True)
    name = await broker.create()
    await push_load(client, name)

    first, second = await asyncio.gather(
        consume_load(client, name, group="first"), consume_load(client, name, group="second")
    )

    assert first == list(range(LOAD))
    assert second == list(range(LOAD))


async def test_the_empty_string_is_the_name_of_a_queue(broker: Broker) -> None:
    """The reference configures it in passing; no client can push to it, so it cannot disturb another test."""
    answer = await broker.client.queue("").create()

    assert (answer["configured"], answer["queue"]) == (True, "")
