"""Conformance section 2: what a push answers, what it refuses to store twice, what a pop then sees."""

from __future__ import annotations

import asyncio
import time
import uuid

from .support import Broker, data


async def test_push_message(broker: Broker) -> None:
    results = await broker.client.queue(await broker.create()).push([{"data": {"message": "Hello"}}])

    assert [result["status"] for result in results] == ["queued"]


async def test_push_duplicate_message(broker: Broker) -> None:
    queue = broker.client.queue(await broker.create())

    first = await queue.push([{"transactionId": "order-1", "data": 1}])
    second = await queue.push([{"transactionId": "order-1", "data": 1}])

    assert (first[0]["status"], second[0]["status"]) == ("queued", "duplicate")


async def test_push_duplicate_message_on_different_partition(broker: Broker) -> None:
    name = await broker.create()

    first = await broker.client.queue(name).partition("0").push([{"transactionId": "order-1", "data": 1}])
    second = await broker.client.queue(name).partition("1").push([{"transactionId": "order-1", "data": 1}])

    assert (first[0]["status"], second[0]["status"]) == ("queued", "queued")


async def test_push_pre_existing_duplicate_names_the_first_message(broker: Broker) -> None:
    name = await broker.create()
    first = await broker.client.queue(name).push([{"transactionId": "order-1", "data": "kept"}])

    second = await broker.client.queue(name).push([{"transactionId": "order-1", "data": "another payload"}])

    assert second[0]["status"] == "duplicate"
    assert second[0]["message_id"] == first[0]["message_id"]
    assert data(await broker.pop(name, 10)) == ["kept"]


async def test_a_duplicate_is_known_after_its_first_message_was_consumed(broker: Broker) -> None:
    name = await broker.create()
    first = await broker.client.queue(name).push([{"transactionId": "order-1", "data": 1}])
    await broker.ack(await broker.pop(name))

    second = await broker.client.queue(name).push([{"transactionId": "order-1", "data": 1}])

    assert (second[0]["status"], second[0]["message_id"]) == ("duplicate", first[0]["message_id"])
    assert await broker.pop(name) == []


async def test_push_intra_batch_duplicates(broker: Broker) -> None:
    name = await broker.create()
    identifier = str(uuid.uuid4())

    results = await broker.client.queue(name).push([{"transactionId": identifier, "data": n} for n in range(3)])

    assert [result["status"] for result in results] == ["queued", "duplicate", "duplicate"]
    assert len({result["message_id"] for result in results}) == 1
    assert data(await broker.pop(name, 10)) == [0]


async def test_push_concurrent_batches_to_same_key(broker: Broker) -> None:
    name = await broker.create()

    answers = await asyncio.gather(
        *(broker.client.queue(name).push([{"transactionId": "order-1", "data": n}]) for n in range(8))
    )

    results = [answer[0] for answer in answers]
    assert sorted(result["status"] for result in results) == ["duplicate"] * 7 + ["queued"]
    assert len({result["message_id"] for result in results}) == 1
    assert len(await broker.pop(name, 10)) == 1


async def test_push_buffered_message(broker: Broker) -> None:
    name = await broker.create()

    await broker.client.queue(name).buffer({"message_count": 10, "time_millis": 1000}).push([{"data": 1}])

    assert await broker.pop(name) == []
    assert data(await broker.wait_pop(name)) == [1]


async def test_push_over_the_maximum_size_is_taken_or_refused_but_breaks_nothing(broker: Broker) -> None:
    name = await broker.create(max_size=5)

    answers = [
        await broker.http.post("/api/v1/push", json={"items": [{"queue": name, "payload": n}]}) for n in range(10)
    ]

    assert all(answer.status_code < 500 for answer in answers)
    assert data(await broker.pop(name, 5)) == [0, 1, 2, 3, 4]


async def test_push_delayed_message(broker: Broker) -> None:
    name = await broker.create(delayed_processing=2)
    begun = time.monotonic()
    await broker.client.queue(name).push([{"data": 1}])

    assert await broker.pop(name) == []
    messages = await broker.wait_pop(name)

    assert data(messages) == [1]
    assert 2.0 <= time.monotonic() - begun < 7.0


async def test_push_large_payload(broker: Broker) -> None:
    name = await broker.create()
    payload = {
        "rows": [{"id": n, "name": f"row {n}", "note": "é" * 40, "values": [n, -n, n / 7]} for n in range(10_000)]
    }

    await broker.client.queue(name).push([{"data": payload}])

    assert data(await broker.wait_pop(name)) == [payload]


async def test_push_null_payload(broker: Broker) -> None:
    name = await broker.create()

    await broker.client.queue(name).push([{"data": None}])

    assert data(await broker.wait_pop(name)) == [None]


async def test_push_encrypted_payload(broker: Broker) -> None:
    name = await broker.create(encryption_enabled=True)

    await broker.client.queue(name).push([{"data": {"card": "4111 1111"}}, {"data": None}, {"data": "ü"}])

    assert data(await broker.pop(name, 10)) == [{"card": "4111 1111"}, None, "ü"]


async def test_simple_push_round_trip(broker: Broker) -> None:
    name = await broker.create()
    payload = {
        "text": 'quotes " and \\ and \n and 😀',
        "numbers": [0, -1, 1.5, 1e300],
        "nested": {"empty": {}, "no": None},
    }

    await broker.client.queue(name).push([{"data": payload}])

    assert data(await broker.pop(name)) == [payload]


async def test_push_auto_creates_queue_and_partition(broker: Broker) -> None:
    name = broker.name()

    await broker.client.queue(name).partition("eu-1").push([{"data": 1}])
    messages = await broker.pop(name, partition="eu-1")

    assert data(messages) == [1]
    assert messages[0]["partition"] == "eu-1"


async def test_push_empty_list(broker: Broker) -> None:
    assert await broker.client.queue(await broker.create()).push([]) == []


async def test_push_malformed_trace_id_is_refused_or_stored_but_corrupts_nothing(broker: Broker) -> None:
    """The Python client drops a malformed trace id, so this one is plain HTTP."""
    name = await broker.create()

    answer = await broker.http.post(
        "/api/v1/push", json={"items": [{"queue": name, "payload": "odd", "traceId": "not-a-uuid"}]}
    )
    await broker.client.queue(name).push([{"data": "good"}])

    if answer.status_code == 201:
        assert answer.json()[0]["status"] in {"queued", "failed"}
        assert data(await broker.pop(name, 10))[-1] == "good"
    else:
        assert 400 <= answer.status_code < 600
        assert data(await broker.pop(name, 10)) == ["good"]


async def test_push_trace_id_comes_back(broker: Broker) -> None:
    name = await broker.create()
    trace_id = str(uuid.uuid4())

    await broker.client.queue(name).push([{"data": 1, "traceId": trace_id}])

    assert (await broker.pop(name))[0]["traceId"] == trace_id


async def test_push_producer_sub_from_the_body_is_ignored(broker: Broker) -> None:
    name = await broker.create()
    items = [{"queue": name, "payload": 1, "producerSub": ""}, {"queue": name, "payload": 2, "producerSub": "mallory"}]

    await broker.http.post("/api/v1/push", json={"items": items})

    assert [message["producerSub"] for message in await broker.pop(name, 2)] == [None, None]
