"""maxSize: a queue takes so many messages that its slowest group has not consumed, and not one more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from queen.errors import QueueFull
from queen.model.message import AckStatus
from queen.model.stream import Cycle, CycleAck, StateChange, StreamQuery
from queen.storage.ids import partition_id_of, uuid7_texts
from queen.storage.pushes import PushRequest

if TYPE_CHECKING:
    from tests.conftest import Broker, Session

pytestmark = pytest.mark.buckets


async def stored(sql: Session) -> int:
    return int(await sql.fetchval("SELECT coalesce(sum(message_count), 0) FROM queen.segments"))


async def test_a_full_queue_refuses_a_push_whole_and_takes_it_when_there_is_room(broker: Broker, sql: Session) -> None:
    await broker.configure("q", max_size=5)
    await broker.push("q", 1, 2, 3)

    with pytest.raises(QueueFull) as caught:
        await broker.push("q", 4, 5, 6)

    assert (caught.value.status, caught.value.queues, caught.value.retry_after_seconds) == (429, ("q",), 1)
    assert "room for 2 more of its 5" in caught.value.detail
    assert await stored(sql) == 3
    await broker.push("q", 4, 5)
    assert (await broker.pop("q", batch=3, auto_ack=True)).data == [1, 2, 3]
    await broker.push("q", 6, 7, 8)
    with pytest.raises(QueueFull):
        await broker.push("q", 9)
    assert await broker.drain("q") == [4, 5, 6, 7, 8]


async def test_without_a_limit_nothing_is_refused(broker: Broker) -> None:
    await broker.configure("q")
    await broker.push("q", *range(2000))

    assert len(await broker.drain("q")) == 2000


async def test_more_than_the_limit_at_once_never_fits_and_says_so(broker: Broker) -> None:
    await broker.configure("q", max_size=2)

    with pytest.raises(QueueFull, match="push fewer"):
        await broker.push("q", 1, 2, 3)


async def test_the_slowest_group_counts(broker: Broker) -> None:
    await broker.configure("q", max_size=4)
    for group in ("fast", "slow"):
        assert not await broker.pop("q", group=group)
    await broker.push("q", 1, 2, 3, 4)
    await broker.drain("q", group="fast")

    with pytest.raises(QueueFull):
        await broker.push("q", 5)

    assert (await broker.pop("q", group="slow", batch=1, auto_ack=True)).data == [1]
    await broker.push("q", 5)


async def test_all_partitions_count_together(broker: Broker) -> None:
    await broker.configure("q", max_size=10)
    for at in range(10):
        await broker.push("q", at, partition=str(at))

    with pytest.raises(QueueFull):
        await broker.push("q", 10, partition="new")


async def test_a_push_that_is_repeated_is_told_its_duplicates_however_full_the_queue_is(broker: Broker) -> None:
    ids = uuid7_texts(3)
    await broker.configure("q", max_size=3)
    first = await broker.push("q", ids=ids)

    again = await broker.push("q", ids=ids)

    assert [result.duplicate for result in again] == [True] * 3
    assert [result.message_id for result in again] == [result.message_id for result in first]
    with pytest.raises(QueueFull):
        await broker.push("q", ids=[*ids, "new"])


async def test_a_push_to_several_queues_is_refused_whole_when_one_is_full(broker: Broker, sql: Session) -> None:
    await broker.configure("full", max_size=1)
    await broker.configure("free")
    await broker.push("full", 1)

    with pytest.raises(QueueFull) as caught:
        await broker.engine.push([broker.message(queue="free"), broker.message(queue="full")], None)

    assert caught.value.queues == ("full",)
    assert await stored(sql) == 1


async def test_producers_at_once_fill_it_to_the_last_place_and_no_further(
    broker: Broker, other: Broker, sql: Session
) -> None:
    await broker.configure("q", max_size=50)
    await broker.configure("beside")
    refused: list[int] = []

    async def produce(via: Broker, at: int) -> None:
        try:
            await via.push("q", at, at, partition=str(at % 3))
        except QueueFull:
            refused.append(at)

    async with trio.open_nursery() as producers:
        for at in range(20):
            producers.start_soon(produce, broker, at)
            producers.start_soon(produce, other, at)
            producers.start_soon(broker.push, "beside", at)

    assert len(refused) == 40 - 25
    assert len(await broker.drain("q", partitions=3)) == 50
    assert len(await broker.drain("beside")) == 20
    assert await stored(sql) == 70


async def test_a_limit_that_is_taken_away_or_raised_holds_at_once(broker: Broker) -> None:
    await broker.configure("q", max_size=1)
    await broker.push("q", 1)
    with pytest.raises(QueueFull):
        await broker.push("q", 2)
    await broker.configure("q", max_size=2)
    await broker.push("q", 2)
    with pytest.raises(QueueFull):
        await broker.push("q", 3)
    await broker.configure("q")

    await broker.push("q", *range(3, 10))


@pytest.mark.parametrize("removed", ["cleared", "expired"])
async def test_what_is_removed_makes_room(broker: Broker, database_clock: Any, removed: str) -> None:
    queue = await broker.configure("q", max_size=2, max_wait_time_seconds=60)
    await broker.push("q", 1, 2)
    if removed == "cleared":
        await broker.engine.admin.clear("q", None)
    else:
        await database_clock.advance(61)
        await broker.engine.store.expire(queue, 10)

    await broker.push("q", 3, 4)
    with pytest.raises(QueueFull):
        await broker.push("q", 5)


async def test_a_transaction_that_finds_no_room_is_rolled_back_and_says_why(broker: Broker) -> None:
    await broker.configure("full", max_size=1)
    await broker.push("full", 1)
    await broker.push("source", "work")
    popped = await broker.pop("source")
    acks = broker.acks_of(popped.messages, lease=popped.lease)

    result = await broker.engine.transact([[broker.message(queue="full")], *acks], [], None)

    assert result.error is not None
    assert "'full' has room for 0 more" in result.error
    assert (await broker.ack(popped.messages, lease=popped.lease))[0].success


async def test_a_transaction_makes_the_room_it_needs(broker: Broker) -> None:
    await broker.configure("q", max_size=1)
    await broker.push("q", "first")
    popped = await broker.pop("q")
    acks = broker.acks_of(popped.messages, lease=popped.lease)

    result = await broker.engine.transact([[broker.message(queue="q", payload=b'"next"')], *acks], [], None)

    assert result.error is None
    assert (await broker.pop("q")).data == ["next"]


async def test_a_dead_letter_that_finds_no_room_stays_one(broker: Broker) -> None:
    await broker.configure("q", max_size=1, retry_limit=0)
    await broker.push("q", "poison")
    popped = await broker.pop("q")
    assert (await broker.ack(popped.messages, AckStatus.FAILED, lease=popped.lease))[0].dead_lettered
    await broker.push("q", "next")

    with pytest.raises(QueueFull):
        await broker.engine.admin.retry(popped[0].partition_id, popped[0].transaction_id)

    total, _ = await broker.engine.dead_letters(queue="q")
    assert total == 1


async def test_a_stream_step_that_finds_no_room_in_its_sink_is_refused_whole(broker: Broker, sql: Session) -> None:
    await broker.configure("sink", max_size=1)
    await broker.push("sink", 1)
    source = await broker.configure("source")
    await broker.push("source", "event")
    query_id, _ = await broker.engine.register_stream(
        StreamQuery(name="s", source_queue="source", sink_queue="sink", config_hash="h", reset=False)
    )
    popped = await broker.pop("source", group="s")
    cycle = Cycle(
        query_id=query_id,
        partition_id=partition_id_of(source.queue_id, "Default"),
        group="s",
        changes=[StateChange("key", b"1")],
        messages=[broker.message(queue="sink")],
        ack=CycleAck(transaction_id=popped[0].transaction_id, lease_id=popped.lease),
        release_lease=True,
        digest=b"digest",
    )

    refused = await broker.engine.cycle_stream(cycle, None)

    assert refused.error is not None
    assert "'sink' has room for 0 more" in refused.error
    assert await sql.fetchval("SELECT count(*) FROM queen.stream_state") == 0
    await broker.drain("sink")
    assert (await broker.engine.cycle_stream(cycle, None)).error is None
    assert len(await broker.drain("sink")) == 1


async def test_what_was_promised_is_stored_however_full_the_queue_is(broker: Broker) -> None:
    await broker.configure("q", max_size=1)
    await broker.push("q", 1)
    message = broker.message(queue="q", payload=b'"promised"')

    ((stored,), _) = await broker.engine.store.pushes.push([PushRequest([message], None, promised=True)])

    assert not isinstance(stored, QueueFull)
    with pytest.raises(QueueFull):
        await broker.push("q", 2)
    assert await broker.drain("q") == [1, "promised"]
