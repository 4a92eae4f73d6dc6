"""Where a consumer group starts, decided once and kept. Rule numbers are http-core.md §3.3."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import trio

from queen.model.queue import StartFrom, StartMode

if TYPE_CHECKING:
    from tests.conftest import Broker, DatabaseClock, Session

pytestmark = pytest.mark.buckets

NEW = StartFrom(StartMode.NEW)


def since(moment: datetime) -> StartFrom:
    return StartFrom(StartMode.FROM, moment)


async def test_s1_what_is_stored_wins_over_what_a_later_pop_asks_for(broker: Broker, other: Broker) -> None:
    await broker.push("q", 1)
    assert not await broker.pop("q", group="g", start=NEW)
    await broker.push("q", 2)

    for start in (StartFrom(), since(datetime(2000, 1, 1, tzinfo=UTC))):
        assert not await other.pop("q", group="g", partition="nowhere", start=start)
    assert (await other.pop("q", group="g")).data == [2]


async def test_s2_a_group_is_registered_by_its_first_pop_even_if_it_gets_nothing_and_for_partitions_to_come(
    broker: Broker, database_clock: DatabaseClock, sql: Session
) -> None:
    await broker.push("q", "old", partition="a")
    assert not await broker.pop("q", group="g", start=NEW)
    await database_clock.advance(10)
    await broker.push("q", "new", partition="a")
    await broker.push("q", "newer", partition="b")

    stored = await sql.fetchrow("SELECT name, mode FROM queen.consumer_groups")
    assert tuple(stored) == ("g", "new")
    assert sorted((await broker.pop("q", group="g", partitions=9)).data) == ["new", "newer"]


async def test_s2_a_group_registered_by_a_pop_of_one_partition_is_registered_for_the_queue(broker: Broker) -> None:
    await broker.push("q", "old", partition="a")
    assert not await broker.pop("q", group="g", partition="b", start=NEW)
    await broker.push("q", "new", partition="a")

    assert (await broker.pop("q", group="g")).data == ["new"]


async def test_s3_a_new_group_sees_exactly_what_is_pushed_after_its_first_pop(broker: Broker) -> None:
    for partition in range(4):
        await broker.push("q", *range(5), partition=str(partition))
    assert not await broker.pop("q", group="g", start=NEW)
    for partition in range(2, 6):
        await broker.push("q", partition, partition=str(partition))

    assert sorted(await broker.drain("q", group="g", partitions=9)) == [2, 3, 4, 5]


async def test_s3_a_group_from_a_time_sees_what_was_created_at_or_after_it(
    broker: Broker, database_clock: DatabaseClock, sql: Session
) -> None:
    for at in range(5):
        await broker.push("q", at)
        await database_clock.advance(60)
    created = [
        row["created_at"] for row in await sql.fetch("SELECT created_at FROM queen.segments ORDER BY created_at")
    ]
    microsecond = timedelta(microseconds=1)

    assert (await broker.pop("q", group="at", start=since(created[2]))).data == [2, 3, 4]
    assert (await broker.pop("q", group="after", start=since(created[2] + microsecond))).data == [3, 4]
    assert (await broker.pop("q", group="before", start=since(created[2] - microsecond))).data == [2, 3, 4]
    assert (await broker.pop("q", group="ever", start=since(datetime(1970, 1, 1, tzinfo=UTC)))).data == [0, 1, 2, 3, 4]
    assert not await broker.pop("q", group="future", start=since(datetime(2999, 1, 1, tzinfo=UTC)))


async def test_s3_a_group_from_a_future_time_sees_what_is_pushed_from_then_on(
    broker: Broker, database_clock: DatabaseClock, sql: Session
) -> None:
    start = since(await sql.fetchval("SELECT clock_timestamp() + interval '1 hour'"))
    assert not await broker.pop("unborn", group="g", start=start)
    await broker.push("q", "too early")
    assert not await broker.pop("q", group="g", start=start)
    await broker.push("q", "too early")
    assert not await broker.pop("q", group="g")

    await database_clock.advance(3601)
    await broker.push("q", "in time")

    assert (await broker.pop("q", group="g")).data == ["in time"]


async def test_s4_a_group_goes_on_from_its_cursor_whatever_it_asks_for(broker: Broker, other: Broker) -> None:
    await broker.push("q", 1, 2, 3)
    assert (await broker.pop("q", group="g", batch=1, auto_ack=True)).data == [1]

    assert (await other.pop("q", group="g", batch=1, auto_ack=True, start=NEW)).data == [2]
    assert (await other.pop("q", group="g", auto_ack=True)).data == [3]


async def test_queue_mode_starts_with_everything_whatever_it_asks_for(broker: Broker) -> None:
    await broker.push("q", 1)

    assert (await broker.pop("q", start=NEW)).data == [1]


async def test_s6_five_thousand_partitions_are_registered_at_once_and_all_that_follows_is_consumed(
    broker: Broker,
) -> None:
    names = [f"p{at}" for at in range(5000)]
    await broker.engine.push([broker.message(queue="q", partition=name, payload=b'"old"') for name in names], None)

    with trio.fail_after(10):
        assert not await broker.pop("q", group="g", start=NEW)
    await broker.engine.push([broker.message(queue="q", partition=name, payload=b'"new"') for name in names], None)

    assert await broker.drain("q", group="g", partitions=1000) == ["new"] * 5000


async def test_s8_a_group_is_not_registered_on_a_queue_that_does_not_exist(broker: Broker, sql: Session) -> None:
    assert not await broker.pop("q", group="g", start=NEW)
    assert await sql.fetchval("SELECT count(*) FROM queen.consumer_groups") == 0
    await broker.push("q", "before its first contact")

    assert not await broker.pop("q", group="g", start=NEW)
    await broker.push("q", "after")
    assert (await broker.pop("q", group="g")).data == ["after"]


async def test_a_new_group_that_waits_for_a_queue_sees_what_its_birth_brings(broker: Broker, other: Broker) -> None:
    got: list[object] = []

    async def consume() -> None:
        got.extend((await broker.pop("q", group="g", start=NEW, wait=20)).data)

    with trio.fail_after(10):
        async with trio.open_nursery() as consumer:
            consumer.start_soon(consume)
            await broker.wait_parked(1)
            await other.push("q", "first ever")

    assert got == ["first ever"]


async def test_a_namespace_pop_registers_its_group_on_every_queue_of_it(broker: Broker) -> None:
    for name in ("a", "b"):
        await broker.configure(name, "ns")
        await broker.push(name, "old")
    assert not await broker.pop(namespace="ns", group="g", start=NEW)
    for name in ("a", "b"):
        await broker.push(name, f"new in {name}")

    found = [(await broker.pop(namespace="ns", group="g")).data[0] for _ in range(2)]

    assert sorted(found) == ["new in a", "new in b"]
    assert not await broker.pop("a", group="g")


@pytest.mark.parametrize("partitions", [1, 30])
async def test_groups_that_register_while_messages_are_pushed_miss_none(
    broker: Broker, other: Broker, partitions: int
) -> None:
    """Partitions are born, groups registered and messages stored at once; a group of mode all sees every message."""
    pushed = 0

    async def produce(via: Broker, producer: int) -> None:
        nonlocal pushed
        for at in range(15):
            await via.push("q", [producer, at], partition=str((producer + at) % partitions))
            pushed += 1

    async def register(via: Broker, name: str) -> None:
        await via.pop("q", group=name, partition="nowhere")

    async with trio.open_nursery() as tasks:
        for number in range(4):
            tasks.start_soon(produce, (broker, other)[number % 2], number)
            tasks.start_soon(register, (other, broker)[number % 2], f"g{number % 3}")

    assert pushed == 60
    for number in range(3):
        assert len(await broker.drain("q", group=f"g{number}", partitions=50)) == 60
