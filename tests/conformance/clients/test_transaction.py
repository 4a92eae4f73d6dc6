"""Conformance section 6: acknowledging and pushing as one step. Every pop follows at once and does not wait."""

from __future__ import annotations

import pytest

from .support import Broker, Message, data


async def two_queues(broker: Broker, **options: int) -> tuple[str, str]:
    return await broker.create("-a", **options), await broker.create("-b", **options)


async def popped(broker: Broker, queue: str, *payloads: int) -> list[Message]:
    """These payloads pushed to the queue and popped again, leased."""
    await broker.client.queue(queue).push([{"data": {"value": value}} for value in payloads])
    messages = await broker.pop(queue, len(payloads))
    assert [message["data"]["value"] for message in messages] == list(payloads)
    return messages


async def test_push_and_ack(broker: Broker) -> None:
    a, b = await two_queues(broker)
    message = (await popped(broker, a, 1))[0]

    following = {"data": {"value": message["data"]["value"] + 1}}
    answer = await broker.client.transaction().queue(b).push([following]).ack(message).commit()

    assert answer["success"] is True
    assert await broker.pop(a) == []
    assert data(await broker.pop(b)) == [{"value": 2}]


async def test_several_pushes(broker: Broker) -> None:
    a, b = await two_queues(broker)
    c = await broker.create("-c")
    message = (await popped(broker, a, 1))[0]

    step = broker.client.transaction().queue(b).push([{"data": "for b"}]).queue(c).push([{"data": "for c"}])
    await step.ack(message).commit()

    assert await broker.pop(a) == []
    assert data(await broker.pop(b)) == ["for b"]
    assert data(await broker.pop(c)) == ["for c"]


async def test_ack_with_status(broker: Broker) -> None:
    a, b = await two_queues(broker, retry_limit=0)
    message = (await popped(broker, a, 1))[0]

    await broker.client.transaction().ack(message, "failed").queue(b).push([{"data": "failed once"}]).commit()

    assert await broker.pop(a) == []
    assert data(await broker.pop(b)) == ["failed once"]


async def test_ack_and_push_are_visible_together(broker: Broker) -> None:
    a, b = await two_queues(broker)
    message = (await popped(broker, a, 1))[0]

    await broker.client.transaction().ack(message).queue(b).push([{"data": "done"}]).commit()

    assert await broker.pop(a) == []
    assert data(await broker.pop(b)) == ["done"]


async def test_push_of_a_batch(broker: Broker) -> None:
    _, b = await two_queues(broker)

    await broker.client.transaction().queue(b).push([{"data": n} for n in range(5)]).commit()

    assert data(await broker.pop(b, 10)) == [0, 1, 2, 3, 4]


async def test_acks_under_two_leases(broker: Broker) -> None:
    a, b = await two_queues(broker)
    for partition in ("one", "two"):
        await broker.client.queue(a).partition(partition).push([{"data": partition}])
    messages = [(await broker.pop(a, partition=partition))[0] for partition in ("one", "two")]
    assert messages[0]["leaseId"] != messages[1]["leaseId"]

    step = broker.client.transaction().ack(messages)
    await step.queue(b).partition("eu").push([{"data": "both"}]).commit()

    assert await broker.pop(a, 10, partitions=2) == []
    assert data(await broker.pop(b, partition="eu")) == ["both"]


async def test_within_a_consumer(broker: Broker) -> None:
    a, b = await two_queues(broker)
    await broker.client.queue(a).push([{"data": {"value": n}} for n in range(3)])

    async def handler(message: Message) -> None:
        result = {"data": message["data"]["value"] * 10}
        await broker.client.transaction().queue(b).push([result]).ack(message).commit()

    await broker.client.queue(a).batch(1).wait(False).limit(3).auto_ack(False).consume(handler)

    assert data(await broker.pop(b, 10)) == [0, 10, 20]
    assert await broker.pop(a) == []


async def test_an_empty_transaction_is_refused(broker: Broker) -> None:
    with pytest.raises(Exception, match="no operations"):
        await broker.client.transaction().commit()

    answer = await broker.http.post("/api/v1/transaction", json={"operations": []})
    assert (answer.status_code, answer.json()["error"]) == (400, "operations array cannot be empty")


async def test_acks_of_two_queues(broker: Broker) -> None:
    a, b = await two_queues(broker)
    c = await broker.create("-c")
    messages = [(await popped(broker, a, 1))[0], (await popped(broker, b, 2))[0]]

    total = {"data": sum(message["data"]["value"] for message in messages)}
    await broker.client.transaction().ack(messages).queue(c).push([total]).commit()

    assert await broker.pop(a) == []
    assert await broker.pop(b) == []
    assert data(await broker.pop(c)) == [3]


async def test_one_bad_ack_rolls_everything_back(broker: Broker) -> None:
    a, b = await two_queues(broker, lease_time=1)
    message = (await popped(broker, a, 1))[0]
    unknown = {**message, "transactionId": "never pushed"}

    step = broker.client.transaction().queue(b).push([{"data": "must not appear"}]).ack(message).ack(unknown)
    with pytest.raises(Exception, match="ACK operation failed: Message not found"):
        await step.commit()

    assert await broker.pop(b) == []
    again = await broker.wait_pop(a)  # comes back when its lease of one second ends
    assert [found["id"] for found in again] == [message["id"]]
    assert await broker.pop(b) == []


async def test_an_ack_under_a_lost_lease_rolls_everything_back(broker: Broker) -> None:
    """2.6 sends the lease with the ack; 0.15 sends it beside the operations, which is taken for a lone lease."""
    a, b = await two_queues(broker, lease_time=1)
    message = (await popped(broker, a, 1))[0]
    other = (await broker.wait_pop(a))[0]
    assert other["leaseId"] != message["leaseId"]

    step = broker.client.transaction().queue(b).push([{"data": "must not appear"}]).ack(message)
    with pytest.raises(Exception, match="Invalid or expired lease"):
        await step.commit()

    assert await broker.pop(b) == []


async def test_a_repeated_transaction_id_is_a_duplicate_and_no_failure(broker: Broker) -> None:
    """Plain HTTP: 0.15 sends no transaction id of a push inside a transaction."""
    _, b = await two_queues(broker)
    body = {
        "operations": [{"type": "push", "items": [{"queue": b, "payload": "once", "transactionId": "step-1"}]}],
        "requiredLeases": [],
    }

    first = (await broker.http.post("/api/v1/transaction", json=body)).json()
    second = (await broker.http.post("/api/v1/transaction", json=body)).json()

    assert (first["success"], second["success"]) == (True, True)
    assert second["results"][0]["status"] == "duplicate"
    assert second["results"][0]["messageId"] == first["results"][0]["messageId"]
    assert data(await broker.pop(b, 10)) == ["once"]
