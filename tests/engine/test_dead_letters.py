"""Dead letters keep the message as it was, and outlive it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import msgspec
import pytest

from queen.model.message import AckStatus

if TYPE_CHECKING:
    from queen.storage.dead_letters import DeadLetter
    from tests.conftest import Broker, DatabaseClock


def envelope(letter: DeadLetter) -> dict[str, Any]:
    """The message inside, as the wire makes it."""
    prefix = str(letter.message_id)[:24].encode()
    found: dict[str, Any] = msgspec.json.decode(b'{"id":"' + prefix + letter.line.replace(b"\0", prefix) + b"}")
    return found


@pytest.mark.buckets
async def test_a_dead_letter_keeps_payload_ids_producer_times_and_reason(broker: Broker) -> None:
    await broker.configure("q", "ns", "task", retry_limit=1)
    trace, text = str(uuid4()), 'odd "id" ☃'
    payload = {"total": [1, None, "ü"], "large": "x" * 2000}
    await broker.engine.push(
        [
            broker.message(queue="q", partition="p", payload=b"1"),
            broker.message(
                queue="q", partition="p", payload=msgspec.json.encode(payload), transaction_id=text, trace_id=trace
            ),
        ],
        "alice",
    )
    popped = await broker.pop("q", group="g")
    await broker.ack([popped[0]], lease=popped.lease, group="g")
    await broker.ack([popped[1]], AckStatus.FAILED, lease=popped.lease, group="g", error="first")
    again = await broker.pop("q", group="g")
    await broker.ack(again.messages, AckStatus.FAILED, lease=again.lease, group="g", error="the reason\nin two lines")

    total, (letter,) = await broker.engine.dead_letters(queue="q")

    assert total == 1
    assert envelope(letter) == {
        "id": popped[1].id,
        "transactionId": text,
        "traceId": trace,
        "producerSub": "alice",
        "data": payload,
    }
    assert (letter.queue, letter.namespace, letter.task, letter.partition, letter.group) == (
        "q",
        "ns",
        "task",
        "p",
        "g",
    )
    assert (letter.error, letter.retry_count) == ("the reason\nin two lines", 1)
    assert (str(letter.partition_id), letter.created_at) == (popped[1].partition_id, popped[1].created_at)
    assert letter.failed_at > letter.created_at


async def test_a_dead_letter_of_a_minted_message_has_its_id(broker: Broker) -> None:
    (pushed,) = await broker.push("q", {"a": 1})
    popped = await broker.pop("q")
    await broker.ack(popped.messages, AckStatus.DLQ, lease=popped.lease)

    _, (letter,) = await broker.engine.dead_letters(queue="q")

    assert envelope(letter)["id"] == envelope(letter)["transactionId"] == pushed.message_id
    assert envelope(letter)["data"] == {"a": 1}


async def test_a_dead_letter_outlives_its_message(broker: Broker, database_clock: DatabaseClock) -> None:
    queue = await broker.configure("q", retention_enabled=True, retention_seconds=60)
    await broker.push("q", "kept")
    popped = await broker.pop("q")
    await broker.ack(popped.messages, AckStatus.DLQ, lease=popped.lease)
    await database_clock.advance(61)
    assert await broker.engine.store.expire(queue, 100) == 1

    total, (letter,) = await broker.engine.dead_letters(queue="q")

    assert (total, envelope(letter)["data"]) == (1, "kept")


@pytest.mark.buckets
async def test_dead_letters_are_listed_newest_first_in_pages_and_by_where_and_when(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    moments = []
    for at in range(6):
        partition, group = "ab"[at % 2], "gh"[at // 3]
        await broker.push("q", at, partition=partition)
        popped = await broker.pop("q", group=group, partition=partition, batch=1)
        await broker.ack(popped.messages, AckStatus.DLQ, lease=popped.lease, group=group)
        _, letters = await broker.engine.dead_letters(queue="q", limit=1)
        moments.append(letters[0].failed_at)

    async def found(**where: Any) -> list[tuple[str, str]]:
        total, letters = await broker.engine.dead_letters(queue="q", **where)
        assert total >= len(letters)
        return [(letter.partition, letter.group) for letter in letters]

    everything = await found()
    assert everything == [("b", "h"), ("a", "h"), ("b", "h"), ("a", "g"), ("b", "g"), ("a", "g")]
    assert await found(limit=2, offset=1) == everything[1:3]
    assert await found(partition="a") == [each for each in everything if each[0] == "a"]
    assert await found(group="h", partition="b") == [("b", "h")] * 2
    assert await found(failed_from=moments[2], failed_to=moments[4]) == everything[1:4]
    assert await broker.engine.dead_letters(queue="unknown") == (0, [])
