"""Selection and leases: what a pop sees and takes, and what others then see. Rule numbers are http-core.md §3.2."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import trio

if TYPE_CHECKING:
    from tests.conftest import Broker, DatabaseClock, Popped, Session


async def test_p1_pending_is_what_follows_the_cursor_in_push_order(broker: Broker) -> None:
    await broker.push("q", *range(5))
    first = await broker.pop("q", batch=3)
    await broker.ack(first.messages, lease=first.lease)

    assert first.data == [0, 1, 2]
    assert (await broker.pop("q")).data == [3, 4]


@pytest.mark.buckets
async def test_p2_a_leased_partition_yields_nothing_to_its_group_and_everything_to_others(broker: Broker) -> None:
    await broker.push("q", 1, 2, 3)

    first = await broker.pop("q", batch=1)

    assert first.data == [1]
    assert not await broker.pop("q")
    assert not await broker.pop("q", partition="Default")
    assert not await broker.pop("q", auto_ack=True)
    assert (await broker.pop("q", group="billing")).data == [1, 2, 3]
    assert not await broker.pop("q", group="billing")
    assert (await broker.pop("q", group="audit")).data == [1, 2, 3]


@pytest.mark.buckets
async def test_p3_a_pop_takes_one_partition_even_if_its_batch_is_not_filled(broker: Broker) -> None:
    for partition in "abcd":
        await broker.push("q", *range(5), partition=partition)

    seen = [(await broker.pop("q", batch=100)).partitions for _ in range(4)]

    assert all(len(partitions) == 1 for partitions in seen)
    assert sorted(partition for (partition,) in seen) == list("abcd")
    assert not await broker.pop("q", batch=100)


@pytest.mark.buckets
async def test_p3_the_batch_is_the_sum_over_all_partitions_and_fills_one_after_another(broker: Broker) -> None:
    for partition in "abcd":
        await broker.push("q", *[[partition, at] for at in range(5)], partition=partition)

    popped = await broker.pop("q", batch=12, partitions=10)

    assert len(popped) == 12
    assert [claim.end - claim.first for claim in popped.claims] == [5, 5, 2]
    rest = await broker.pop("q", batch=12, partitions=10)
    assert [claim.end - claim.first for claim in rest.claims] == [5]


@pytest.mark.buckets
async def test_p3_no_more_partitions_are_claimed_than_asked_for(broker: Broker) -> None:
    for partition in range(12):
        await broker.push("q", partition, partition=str(partition))

    taken = [sorted((await broker.pop("q", batch=100, partitions=5)).data) for _ in range(4)]

    assert [len(data) for data in taken] == [5, 5, 2, 0]
    assert sorted(itertools.chain.from_iterable(taken)) == list(range(12))


@pytest.mark.buckets
async def test_p3_a_pop_of_one_partition_ignores_the_number_of_partitions(broker: Broker) -> None:
    await broker.push("q", 1, partition="a")
    await broker.push("q", 2, partition="b")

    popped = await broker.pop("q", partition="b", partitions=9)

    assert (popped.partitions, popped.data) == (["b"], [2])


@pytest.mark.buckets
async def test_p4_all_partitions_of_a_pop_share_a_lease_that_each_ends_by_its_own_count(broker: Broker) -> None:
    for partition in "ab":
        await broker.push("q", 1, 2, 3, partition=partition)
    popped = await broker.pop("q", batch=5, partitions=2)
    one, two = ([got for got in popped if got.partition == name] for name in popped.partitions)

    results = await broker.ack(one, lease=popped.lease)
    assert [result.lease_released for result in results] == [False, False, True]
    assert not await broker.pop("q", partition=two[0].partition)

    results = await broker.ack(two, lease=popped.lease)
    assert [result.lease_released for result in results] == [False, True]
    assert (await broker.pop("q", partition=two[0].partition)).data == [3]


@pytest.mark.buckets
async def test_p5_the_answer_is_grouped_by_partition_and_in_order_inside(broker: Broker) -> None:
    for at in range(30):
        await broker.push("q", at, partition=str(at % 6))

    popped = await broker.pop("q", batch=100, partitions=6)

    order = [got.partition for got in popped]
    assert [name for at, name in enumerate(order) if at == 0 or order[at - 1] != name] == popped.partitions
    for partition in range(6):
        mine = [got for got in popped if got.partition == str(partition)]
        assert [got.data for got in mine] == list(range(partition, 30, 6))
        assert [got.offset for got in mine] == list(range(5))


@pytest.mark.buckets
async def test_p6_an_expired_lease_gives_the_same_messages_to_the_next_consumer(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    await broker.configure("q", lease_seconds=30)
    await broker.push("q", 1, 2, 3)
    first = await broker.pop("q", batch=2)

    await database_clock.advance(29)
    assert not await broker.pop("q")
    await database_clock.advance(2)
    second = await broker.pop("q", batch=2)

    assert second.ids == first.ids
    assert second.lease != first.lease
    assert [(popped.claims[0].attempt, popped.claims[0].retry_count) for popped in (first, second)] == [(1, 0), (2, 0)]
    results = await broker.ack(first.messages, lease=first.lease)
    assert [result.error for result in results] == ["Invalid or expired lease"] * 2


async def test_p6_a_lease_time_of_zero_is_a_minute(broker: Broker, database_clock: DatabaseClock) -> None:
    await broker.configure("q", lease_seconds=0)
    await broker.push("q", 1)
    await broker.pop("q")

    await database_clock.advance(58)
    assert not await broker.pop("q")
    await database_clock.advance(3)
    assert await broker.pop("q")


async def test_p6_what_was_acked_before_the_lease_expired_is_not_delivered_again(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    await broker.push("q", *range(5))
    first = await broker.pop("q")
    await broker.ack(first.messages[:2], lease=first.lease)

    await database_clock.advance(301)

    assert (await broker.pop("q")).data == [2, 3, 4]


async def test_p7_a_delayed_message_is_invisible_until_it_is_old_enough(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    await broker.configure("q", delayed_processing_seconds=60)
    await broker.push("q", "old")
    await database_clock.advance(40)
    await broker.push("q", "young")

    assert not await broker.pop("q")
    await database_clock.advance(21)
    first = await broker.pop("q")
    assert first.data == ["old"]
    await broker.ack(first.messages, lease=first.lease)
    assert not await broker.pop("q")
    await database_clock.advance(40)
    assert (await broker.pop("q")).data == ["young"]


async def test_p7_the_delay_holds_for_every_message_of_a_batch(broker: Broker, database_clock: DatabaseClock) -> None:
    await broker.configure("q", delayed_processing_seconds=60)
    for at in range(5):
        await broker.push("q", at)
        await database_clock.advance(15)

    assert (await broker.pop("q", auto_ack=True)).data == [0, 1]
    assert not await broker.pop("q", auto_ack=True)
    await database_clock.advance(30)
    assert (await broker.pop("q", auto_ack=True)).data == [2, 3]


@pytest.mark.buckets
async def test_p8_a_window_hides_the_partition_while_its_newest_message_is_young(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    await broker.configure("q", window_buffer_seconds=60)
    await broker.push("q", 1)
    await broker.push("q", "elsewhere", partition="quiet")
    await database_clock.advance(50)
    await broker.push("q", 2)

    await database_clock.advance(15)
    assert (await broker.pop("q", partitions=9)).data == ["elsewhere"]
    await broker.push("q", 3)
    await database_clock.advance(55)
    assert not await broker.pop("q", partitions=9)
    await database_clock.advance(6)
    assert (await broker.pop("q", partitions=9)).data == [1, 2, 3]


async def test_p8_a_window_is_over_for_what_is_leased_when_more_comes(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    await broker.configure("q", window_buffer_seconds=60)
    await broker.push("q", 1, 2)
    await database_clock.advance(61)
    first = await broker.pop("q", batch=1)
    await broker.push("q", 3)
    await broker.ack(first.messages, lease=first.lease)

    assert not await broker.pop("q")
    await database_clock.advance(61)
    assert (await broker.pop("q")).data == [2, 3]


@pytest.mark.buckets
@pytest.mark.parametrize("option", ["delayed_processing_seconds", "window_buffer_seconds"])
async def test_a_queue_without_delay_or_window_is_normal_again_at_once(
    broker: Broker, other: Broker, option: str
) -> None:
    """Trap 10: create() resets the options it does not name, perhaps through another worker."""
    options: dict[str, Any] = {option: 3600}
    await broker.configure("q", **options)
    await broker.push("q", 1)
    assert not await broker.pop("q")

    await other.configure("q")

    assert (await broker.pop("q")).data == [1]


@pytest.mark.parametrize("option", ["delayed_processing_seconds", "window_buffer_seconds"])
async def test_a_delay_or_window_set_later_holds_for_what_is_there(
    broker: Broker, database_clock: DatabaseClock, option: str
) -> None:
    await broker.push("q", 1)
    options: dict[str, Any] = {option: 60}
    await broker.configure("q", **options)

    assert not await broker.pop("q")
    await database_clock.advance(61)
    assert (await broker.pop("q")).data == [1]


@pytest.mark.buckets
async def test_p10_every_partition_has_its_turn(broker: Broker) -> None:
    for partition in range(8):
        await broker.push("q", *range(4), partition=str(partition))

    turns: list[str] = []
    for _ in range(32):
        popped = await broker.pop("q", batch=1)
        turns += popped.partitions
        await broker.ack(popped.messages, lease=popped.lease)

    assert Counter(turns) == {str(partition): 4 for partition in range(8)}


async def test_p10_one_busy_partition_does_not_starve_another(broker: Broker) -> None:
    await broker.push("q", *range(100), partition="busy")
    await broker.push("q", "seldom", partition="seldom")

    turns = [(await broker.pop("q", batch=1, auto_ack=True)).partitions[0] for _ in range(20)]

    assert "seldom" in turns


@pytest.mark.buckets
async def test_p10_namespace_pops_serve_the_queue_of_highest_priority_first(broker: Broker) -> None:
    for name, priority in (("low", 1), ("high", 10), ("middle", 5), ("negative", -3)):
        await broker.configure(name, "ns", "work", priority=priority)
        for partition in range(3):
            await broker.push(name, name, partition=str(partition))

    popped: list[str] = []
    while taken := await broker.pop(namespace="ns", auto_ack=True):
        popped += taken.data

    assert popped == ["high"] * 3 + ["middle"] * 3 + ["low"] * 3 + ["negative"] * 3


async def test_p10_of_equal_priority_the_queue_that_has_waited_longest_comes_first(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    for name in ("a", "b", "c"):
        await broker.configure(name, "ns")
        assert not await broker.pop(namespace="ns")
    for name in ("b", "c", "a"):
        await broker.push(name, name)
        await database_clock.advance(5)

    assert [(await broker.pop(namespace="ns")).data for _ in range(3)] == [["b"], ["c"], ["a"]]


@pytest.mark.buckets
async def test_namespace_and_task_pops_see_the_queues_with_all_labels_given(broker: Broker) -> None:
    for name, namespace, task in (("1", "n", "t"), ("2", "n", "u"), ("3", "m", "t"), ("4", "n", "t")):
        await broker.configure(name, namespace, task)

    async def all_of(namespace: str | None, task: str | None) -> list[str]:
        group = f"{namespace} {task}"
        for name in "1234":
            await broker.push(name, name, partition=group)
        found: list[str] = []
        while popped := await broker.pop(namespace=namespace, task=task, group=group, auto_ack=True):
            found += [got.queue for got in popped if got.partition == group]
        return sorted(found)

    assert await all_of("n", None) == ["1", "2", "4"]
    assert await all_of(None, "t") == ["1", "3", "4"]
    assert await all_of("n", "t") == ["1", "4"]
    assert await all_of("n", "x") == []


@pytest.mark.buckets
async def test_a_namespace_pop_fills_its_batch_from_several_queues(broker: Broker) -> None:
    for at in range(6):
        await broker.configure(f"q{at}", "ns", priority=-at)
        await broker.push(f"q{at}", [at, 0], [at, 1])

    popped = await broker.pop(namespace="ns", batch=9, partitions=10)

    assert popped.data == [[at, half] for at in range(5) for half in (0, 1)][:9]
    assert [claim.queue for claim in popped.claims] == [f"q{at}" for at in range(5)]


@pytest.mark.buckets
async def test_a_queue_that_leaves_a_namespace_is_not_in_it_any_more(broker: Broker, other: Broker) -> None:
    await broker.configure("q", "ns")
    await broker.push("q", 1)
    await other.configure("q", "elsewhere")

    assert not await broker.pop(namespace="ns")
    assert (await broker.pop(namespace="elsewhere")).data == [1]


@pytest.mark.buckets
async def test_p11_competing_consumers_get_every_message_once_and_in_order(broker: Broker, other: Broker) -> None:
    for partition in range(5):
        await broker.push("q", *range(40), partition=str(partition))
    seen: dict[str, list[int]] = {str(partition): [] for partition in range(5)}

    async def consume(via: Broker) -> None:
        while sum(map(len, seen.values())) < 200:
            popped = await via.pop("q", batch=7, wait=0.1)
            for got in popped:
                seen[got.partition].append(got.data)
            if popped:
                await via.ack(popped.messages, lease=popped.lease)

    with trio.fail_after(20):
        async with trio.open_nursery() as consumers:
            for via in (broker, other) * 3:
                consumers.start_soon(consume, via)

    assert seen == {str(partition): list(range(40)) for partition in range(5)}


async def test_p12_auto_ack_moves_the_cursor_and_leaves_nothing_to_ack(broker: Broker) -> None:
    await broker.push("q", *range(5))

    first = await broker.pop("q", batch=2, auto_ack=True)

    assert first.batch is not None
    assert first.batch.lease_id is None
    assert (await broker.pop("q", batch=2)).data == [2, 3]


@pytest.mark.buckets
async def test_p14_an_unknown_queue_or_partition_yields_nothing(broker: Broker) -> None:
    await broker.configure("q")

    assert not await broker.pop("unknown")
    assert not await broker.pop("unknown", partition="p")
    assert not await broker.pop("q", partition="unknown")
    assert not await broker.pop(namespace="unknown")
    assert not await broker.pop(task="unknown")
    assert not await broker.pop("q", group="unknown")


async def test_an_empty_pop_creates_no_queue(broker: Broker, sql: Session) -> None:
    await broker.pop("unknown")

    assert await sql.fetchval("SELECT count(*) FROM queen.queues") == 0


async def test_a_batch_of_one_walks_through_segments_of_many(broker: Broker) -> None:
    await broker.push("q", *range(6))
    await broker.push("q", *range(6, 12))

    taken: list[int] = []
    while popped := await broker.pop("q", batch=1):
        taken += popped.data
        await broker.ack(popped.messages, lease=popped.lease)

    assert taken == list(range(12))


async def test_batches_that_cut_segments_anywhere_lose_and_repeat_nothing(broker: Broker) -> None:
    pushed = 0
    for size in (1, 7, 100, 1, 1, 33, 500):
        await broker.push("q", *range(pushed, pushed + size))
        pushed += size

    taken: list[int] = []
    for batch in [1, 2, 50, 3, 300, 1, 13] * 3:
        popped = await broker.pop("q", batch=batch, auto_ack=True)
        taken += popped.data
    taken += await broker.drain("q")

    assert taken == list(range(pushed))


@pytest.mark.buckets
async def test_many_partitions_with_bodies_large_and_small_come_whole(broker: Broker) -> None:
    for partition in range(20):
        await broker.push(
            "q", *["x" * (40_000 * (partition % 3)) + str(at) for at in range(4)], partition=str(partition)
        )

    popped = await broker.pop("q", batch=1000, partitions=50)

    assert len(popped) == 80
    for partition in range(20):
        mine = [got.data for got in popped if got.partition == str(partition)]
        assert mine == ["x" * (40_000 * (partition % 3)) + str(at) for at in range(4)]


@pytest.mark.buckets
async def test_what_is_given_back_is_delivered_again_with_the_attempt_uncounted(broker: Broker) -> None:
    for partition in "ab":
        await broker.push("q", 1, 2, partition=partition)
    first = await broker.pop("q", partitions=2)

    await first.give_back()
    second = await broker.pop("q", partitions=2)

    assert sorted(second.ids) == sorted(first.ids)
    assert [claim.attempt for claim in second.claims] == [1, 1]
    results = await broker.ack(first.messages, lease=first.lease)
    assert [result.success for result in results] == [False] * 4


async def test_an_auto_ack_that_is_given_back_is_rewound(broker: Broker) -> None:
    await broker.push("q", 1, 2, 3)
    first = await broker.pop("q", batch=2, auto_ack=True)

    await first.give_back()

    assert (await broker.pop("q", auto_ack=True)).data == [1, 2, 3]


async def test_an_auto_ack_that_others_have_passed_is_not_rewound(broker: Broker) -> None:
    await broker.push("q", 1, 2, 3)
    first = await broker.pop("q", batch=1, auto_ack=True)
    await broker.pop("q", batch=1, auto_ack=True)

    await first.give_back()

    assert (await broker.pop("q", auto_ack=True)).data == [3]


async def test_a_lease_that_ended_is_not_given_back_from_under_the_next(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    await broker.push("q", 1)
    first = await broker.pop("q")
    await database_clock.advance(301)
    second = await broker.pop("q")

    await first.give_back()

    assert not await broker.pop("q")
    assert (await broker.ack(second.messages, lease=second.lease))[0].success


@pytest.mark.buckets
async def test_a_pop_beside_a_look_that_holds_the_cursor_still_sees_what_was_pushed(
    broker: Broker, sql: Session
) -> None:
    """Another worker's look may hold the cursor for the time of a commit; wait=false is not answered "nothing"."""
    await broker.push("q", 1)
    await broker.pop("q", auto_ack=True)
    await broker.push("q", 2)
    await sql.execute("BEGIN")
    await sql.execute("SELECT FROM queen.cursors FOR NO KEY UPDATE")
    popped: list[Popped] = []

    async def consume() -> None:
        popped.append(await broker.pop("q"))

    async with trio.open_nursery() as consumer:
        looks = broker.looks
        consumer.start_soon(consume)
        await broker.wait_until(lambda: bool(popped) or broker.looks > looks + 1)
        await sql.execute("COMMIT")

    assert popped[0].data == [2]
