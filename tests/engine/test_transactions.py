"""Pushes and acks in one commit, or nothing and the reason. Rule numbers are http-core.md §6."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
import trio

from queen.errors import EncryptionUnavailable
from queen.model.message import Ack, AckResult, AckStatus, PushResult

if TYPE_CHECKING:
    from tests.conftest import Broker, DatabaseClock, OpenBroker

pytestmark = pytest.mark.buckets

NOT_FOUND = "ACK operation failed: Message not found"
LOST = "ACK operation failed: Invalid or expired lease"


async def test_t1_an_ack_that_fails_undoes_the_pushes_and_the_other_acks(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    await broker.push("a", 1)
    popped = await broker.pop("a")
    unknown = Ack(transaction_id=str(uuid4()), partition_id=popped[0].partition_id)

    result = await broker.engine.transact(
        [[broker.message(queue="b")], *broker.acks_of(popped.messages), unknown], [], None
    )

    assert (result.error, result.results) == (NOT_FOUND, ())
    assert not await broker.pop("b")
    assert not await broker.pop("a")
    await database_clock.advance(301)
    assert (await broker.pop("a")).ids == popped.ids


@pytest.mark.parametrize("lease", ["5f0c8c1e-3a52-4d0e-9b57-6f1c2d9e7a40", "no uuid"])
async def test_t1_a_lost_lease_undoes_everything(broker: Broker, lease: str) -> None:
    await broker.push("a", 1)
    popped = await broker.pop("a")

    by_ack = await broker.engine.transact(
        [[broker.message(queue="b")], *broker.acks_of(popped.messages, lease=lease)], [], None
    )
    by_requirement = await broker.engine.transact([[broker.message(queue="b")]], [lease], None)

    assert (by_ack.error, by_requirement.error) == (LOST, LOST)
    assert not await broker.pop("b")
    assert (await broker.ack(popped.messages, lease=popped.lease))[0].lease_released


async def test_t1_an_unknown_status_undoes_everything(broker: Broker) -> None:
    await broker.push("a", 1)
    popped = await broker.pop("a")

    result = await broker.engine.transact(
        [[broker.message(queue="b")], *broker.acks_of(popped.messages, None)], [], None
    )

    assert result.error is not None
    assert not await broker.pop("b")


async def test_t1_an_encrypted_queue_without_a_key_undoes_everything(open_broker: OpenBroker) -> None:
    async with open_broker(encryption_key=None) as broker:
        await broker.configure("secret", encryption_enabled=True)
        await broker.push("a", 1)
        popped = await broker.pop("a")

        with pytest.raises(EncryptionUnavailable):
            await broker.engine.transact(
                [broker.acks_of(popped.messages)[0], [broker.message(queue="b"), broker.message(queue="secret")]],
                [],
                None,
            )

        assert not await broker.pop("b")
        assert (await broker.ack(popped.messages, lease=popped.lease))[0].lease_released


async def test_results_come_flattened_in_the_order_of_the_operations(broker: Broker) -> None:
    await broker.push("a", 1, 2)
    popped = await broker.pop("a")
    acks = broker.acks_of(popped.messages, lease=popped.lease)
    pushes = [broker.message(queue="b", payload=b"%d" % at) for at in range(5)]

    result = await broker.engine.transact([pushes[:2], acks[0], pushes[2:4], pushes[4:], acks[1]], [], "alice")

    assert result.error is None
    kinds = [PushResult, PushResult, AckResult, PushResult, PushResult, PushResult, AckResult]
    assert [type(entry) for entry in result.results] == kinds
    assert isinstance(result.results[6], AckResult)
    assert result.results[6].lease_released
    stored = await broker.pop("b")
    assert [(got.data, got.producer_sub) for got in stored] == [(at, "alice") for at in range(5)]
    assert stored.ids == [entry.message_id for entry in result.results if isinstance(entry, PushResult)]
    assert not await broker.pop("a")


async def test_t2_an_ack_needs_no_pop_before_it(broker: Broker) -> None:
    pushed = await broker.push("a", 1, 2, 3)

    result = await broker.engine.transact(
        [Ack(transaction_id=pushed[1].transaction_id, partition_id=pushed[1].partition_id)], [], None
    )

    assert result.error is None
    assert (await broker.pop("a")).data == [3]


@pytest.mark.parametrize("status", [AckStatus.FAILED, AckStatus.DLQ])
async def test_t3_a_failure_goes_straight_to_the_dead_letter_queue(broker: Broker, status: AckStatus) -> None:
    await broker.configure("a", retry_limit=3)
    await broker.push("a", 1, 2)
    popped = await broker.pop("a")

    result = await broker.engine.transact(
        broker.acks_of([popped[0]], status, lease=popped.lease, error="no good"), [], None
    )

    (entry,) = result.results
    assert isinstance(entry, AckResult)
    assert (entry.success, entry.dead_lettered) == (True, True)
    total, (letter,) = await broker.engine.dead_letters(queue="a")
    assert (total, letter.error, str(letter.message_id)) == (1, "no good", popped[0].id)
    assert (await broker.ack([popped[1]], lease=popped.lease))[0].lease_released


async def test_t4_every_ack_names_its_group(broker: Broker) -> None:
    await broker.push("a", 1)
    popped = [await broker.pop("a", group=group) for group in ("x", "y")]
    acks = [
        broker.acks_of(taken.messages, lease=taken.lease, group=group)[0]
        for taken, group in zip(popped, ("x", "y"), strict=True)
    ]

    assert (await broker.engine.transact(acks, [], None)).error is None

    assert [len(await broker.pop("a", group=group)) for group in ("x", "y", "z")] == [0, 0, 1]


async def test_t5_the_only_required_lease_is_that_of_acks_without_one(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    await broker.push("a", 1, 2)
    first = await broker.pop("a")
    acks = broker.acks_of(first.messages)

    assert (await broker.engine.transact([acks[0]], [first.lease], None)).error is None
    await database_clock.advance(301)
    expired = await broker.engine.transact([acks[1]], [first.lease], None)
    second = await broker.pop("a")

    assert expired.error == LOST
    assert (await broker.engine.transact([acks[1]], [first.lease], None)).error == LOST
    assert (await broker.engine.transact([acks[1]], [second.lease], None)).error is None


async def test_t6_an_id_used_before_is_a_duplicate_and_the_rest_is_applied(broker: Broker) -> None:
    first = await broker.push("b", 1, ids=["known"])
    await broker.push("a", 1)
    popped = await broker.pop("a")
    messages = [broker.message(queue="b", transaction_id=text) for text in ("known", "new", "new")]

    result = await broker.engine.transact([messages, *broker.acks_of(popped.messages)], [], None)

    entries = [entry for entry in result.results if isinstance(entry, PushResult)]
    assert [entry.duplicate for entry in entries] == [True, False, True]
    assert entries[0].message_id == first[0].message_id
    assert [got.transaction_id for got in await broker.pop("b")] == ["known", "new"]
    assert not await broker.pop("a")


async def test_t6_a_transaction_repeated_after_a_lost_answer_is_harmless(broker: Broker) -> None:
    await broker.push("a", 1, 2)
    popped = await broker.pop("a")
    operations: list[Any] = [
        [broker.message(queue="b", transaction_id=f"b-{at}") for at in range(3)],
        *broker.acks_of(popped.messages, lease=popped.lease),
    ]

    first = await broker.engine.transact(operations, [], None)
    again = await broker.engine.transact(operations, [], None)

    assert (first.error, again.error) == (None, None)
    assert len(await broker.pop("b")) == 3


async def test_t7_what_a_transaction_pushed_is_seen_at_once_by_every_worker(broker: Broker, other: Broker) -> None:
    assert not await other.pop("b", group="g")

    for at in range(10):
        await broker.engine.transact([[broker.message(queue="b", payload=b"%d" % at)]], [], None)
        assert (await other.pop("b", group="g", auto_ack=True)).data == [at]


async def test_t8_a_transaction_encrypts_as_a_push_does(broker: Broker) -> None:
    await broker.configure("secret", encryption_enabled=True)

    await broker.engine.transact([[broker.message(queue="secret", payload=b'"text"')]], [], None)

    assert (await broker.pop("secret")).data == ["text"]


async def test_a_transaction_over_many_queues_partitions_and_groups_is_one(broker: Broker, other: Broker) -> None:
    for partition in range(10):
        await broker.push("in", partition, partition=str(partition))
    popped = await broker.pop("in", partitions=10)
    messages = [broker.message(queue=f"out{at % 3}", partition=str(at), payload=b"%d" % at) for at in range(30)]

    result = await other.engine.transact(
        [messages, *broker.acks_of(popped.messages, lease=popped.lease)], [popped.lease], None
    )

    assert result.error is None
    assert sum(entry.lease_released for entry in result.results if isinstance(entry, AckResult)) == 10
    found = [data for number in range(3) for data in await broker.drain(f"out{number}", partitions=30)]
    assert sorted(found) == list(range(30))
    assert not await broker.pop("in")


async def test_transactions_that_pass_messages_round_a_ring_lose_and_repeat_none(broker: Broker, other: Broker) -> None:
    """Every queue is pushed to and acked by several at once: locks are taken in one order, and conflicts are undone."""
    queues = ["a", "b", "c"]
    for queue in queues:
        await broker.push(queue, *[[queue, at] for at in range(4)])
    moves = 0

    async def carry(via: Broker, start: int) -> None:
        nonlocal moves
        while moves < 40:
            for at in range(3):
                source, target = queues[(start + at) % 3], queues[(start + at + 1) % 3]
                popped = await via.pop(source, batch=1)
                if popped:
                    message = via.message(queue=target, payload=b"[1]", transaction_id=popped[0].id + str(at))
                    result = await via.engine.transact(
                        [[message], *via.acks_of(popped.messages, lease=popped.lease)], [popped.lease], None
                    )
                    assert result.error is None
                    moves += 1

    with trio.fail_after(30):
        async with trio.open_nursery() as carriers:
            for number in range(4):
                carriers.start_soon(carry, (broker, other)[number % 2], number)

    left = [len(await broker.drain(queue)) for queue in queues]
    assert sum(left) == 12
