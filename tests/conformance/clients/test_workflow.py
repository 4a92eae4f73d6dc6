"""Conformance section 5, workflow: dead letters, and work handed from queue to queue by transactions."""

from __future__ import annotations

from typing import Any

import pytest

from .support import Broker, Message, data


async def consume_until_dead(broker: Broker, retry_limit: int) -> tuple[str, list[Any]]:
    """One message whose handler always fails: the queue, and the answers to its acknowledgements."""
    name = await broker.create(retry_limit=retry_limit)
    await broker.client.queue(name).push([{"data": {"poison": True}}])
    answers: list[Any] = []

    async def handler(message: Message) -> None:
        raise ValueError("cannot be processed")

    async def give_back(message: Message, error: Exception) -> None:
        answers.append(await broker.client.ack(message, False, {"error": str(error)}))

    consumer = broker.client.queue(name).batch(1).wait(False).limit(retry_limit + 1)
    await consumer.consume(handler).on_error(give_back)
    return name, answers


@pytest.mark.parametrize("retry_limit", [1, 2])
async def test_a_message_that_always_fails_becomes_a_dead_letter(broker: Broker, retry_limit: int) -> None:
    name, answers = await consume_until_dead(broker, retry_limit)

    assert [answer["success"] for answer in answers] == [True] * (retry_limit + 1)
    assert [answer["dlq"] for answer in answers] == [False] * retry_limit + [True]
    assert await broker.pop(name) == []


async def test_a_dead_letter_is_listed_with_its_error(broker: Broker) -> None:
    name, _ = await consume_until_dead(broker, retry_limit=1)

    letters = (await broker.client.queue(name).dlq().get())["messages"]

    assert data(letters) == [{"poison": True}]
    assert "cannot be processed" in letters[0]["errorMessage"]


async def test_a_dead_letter_of_one_group_is_still_there_for_another(broker: Broker) -> None:
    name = await broker.create(retry_limit=0)
    await broker.client.queue(name).push([{"data": n} for n in range(2)])

    message = (await broker.pop(name, group="strict"))[0]
    answer = await broker.ack(message, False, group="strict", error="no")

    assert answer["dlq"] is True
    assert data(await broker.pop(name, 10, group="strict")) == [1]
    assert data(await broker.pop(name, 10, group="lenient")) == [0, 1]


async def test_complete_workflow(broker: Broker) -> None:
    init, following, final = [await broker.create(suffix) for suffix in ("-init", "-next", "-final")]
    await broker.client.queue(init).push([{"data": {"count": 0}}])

    for source, target in ((init, following), (following, final)):

        async def step(message: Message, target: str = target) -> None:
            advanced = {"data": {"count": message["data"]["count"] + 1}}
            await broker.client.transaction().queue(target).push([advanced]).ack(message).commit()

        await broker.client.queue(source).batch(1).wait(False).limit(1).auto_ack(False).consume(step)

    assert data(await broker.pop(final)) == [{"count": 2}]
    assert await broker.pop(init) == []
    assert await broker.pop(following) == []
