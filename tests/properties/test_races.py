"""Many at once, on few partitions and two workers: nothing sleeps for ever, nothing is lost, nothing locks up.

The sweep is off: whatever a lost wake-up would leave lying is not delivered, and the test ends by its deadline.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from queen.model.message import AckStatus

if TYPE_CHECKING:
    from tests.conftest import Broker, OpenBroker, Session


@pytest.fixture(autouse=True)
def no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("queen.engine.engine._SWEEP_SECONDS", 3600.0)


@pytest.fixture(params=[1, 4])
def buckets(request: pytest.FixtureRequest) -> int:
    """Four: several partitions to a bucket, and several buckets."""
    number: int = request.param
    return number


async def listening(*brokers: Broker) -> None:
    for broker in brokers:
        await broker.wait_until(partial(getattr, broker.engine.store.notifications, "listening"))


async def assert_no_deadlock(sql: Session) -> None:
    # a backend reports what it has counted when it ends, at the latest
    await sql.wait_for("SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()")
    assert await sql.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == 0


@pytest.mark.timeout(600)  # a failure takes minutes to be made small
@given(
    partitions=st.integers(1, 3),
    pushes=st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=5, max_size=40),
    auto_ack=st.booleans(),
    by_partition=st.booleans(),
)
@settings(
    max_examples=12,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_no_message_sleeps_because_a_pop_made_its_cursor_idle_while_it_was_pushed(
    open_broker: OpenBroker,
    partitions: int,
    pushes: list[tuple[int, bool]],
    auto_ack: bool,
    by_partition: bool,
) -> None:
    """Trap of design §6. Consumers take one message at a time, so that every look may be the one that drains."""
    async with open_broker() as here, open_broker() as there:
        await listening(here, there)
        queue = f"q{partitions}"
        await here.engine.delete_queue(queue)
        await here.configure(queue)
        names = [f"p{at}" for at in range(partitions)]
        got: Counter[int] = Counter()
        everything = trio.Event()

        async def consume(via: Broker, partition: str | None) -> None:
            while True:
                popped = await via.pop(queue, partition=partition, batch=1, wait=60, auto_ack=auto_ack)
                got.update(popped.data)
                if len(got) == len(pushes):
                    everything.set()
                if popped and not auto_ack:
                    await via.ack(popped.messages, lease=popped.lease)

        async def produce(via: Broker, mine: bool) -> None:
            for at, (pause, side) in enumerate(pushes):
                if side == mine:
                    await via.push(queue, at, partition=names[at % partitions])
                    await trio.sleep(pause / 1000)

        with trio.fail_after(20):
            async with trio.open_nursery() as consumers:
                for via in (here, there):
                    for name in names:
                        consumers.start_soon(consume, via, name if by_partition else None)
                async with trio.open_nursery() as producers:
                    producers.start_soon(produce, here, True)
                    producers.start_soon(produce, there, False)
                await everything.wait()
                consumers.cancel_scope.cancel()

        assert got == Counter(range(len(pushes)))


async def test_producers_and_consumers_on_two_workers_deliver_everything_in_order_without_deadlock(
    open_broker: OpenBroker, sql: Session
) -> None:
    """With failures, retries and duplicates. Each consumer checks that what it gets follows what was completed."""
    partitions, producers, per_producer = 5, 6, 60
    done: dict[str, list[int]] = {str(partition): [] for partition in range(partitions)}
    seen: Counter[str] = Counter()
    total = producers * per_producer
    finished = trio.Event()

    async with open_broker() as here, open_broker() as there:
        await listening(here, there)
        await here.configure("q", retry_limit=1_000_000)

        async def produce(via: Broker, producer: int) -> None:
            for at in range(per_producer):
                message = via.message(
                    queue="q",
                    partition=str(at % partitions),
                    payload=b"%d" % (producer * 1000 + at),
                    transaction_id=f"{producer} {at}",
                )
                await via.engine.push([message, message], None)  # the second is a duplicate

        async def consume(via: Broker, number: int) -> None:
            for turn in range(10_000):
                popped = await via.pop("q", batch=1 + number, partitions=1 + number % 3, wait=60)
                if not popped:
                    return
                ends = {got.partition: got for got in popped}.values()  # one message of every partition ends its lease
                if (turn + number) % 5 == 0:
                    await via.ack([*ends], AckStatus.FAILED, lease=popped.lease)
                elif (turn + number) % 7 == 0:
                    await via.ack([*ends], AckStatus.RETRY, lease=popped.lease)
                else:
                    verdicts = await via.ack(popped.messages, lease=popped.lease)
                    assert all(verdict.success for verdict in verdicts)
                    for got in popped:
                        assert got.offset == len(done[got.partition]), "out of order, lost or delivered after its ack"
                        done[got.partition].append(got.data)
                        seen[got.transaction_id] += 1
                    if sum(seen.values()) == total:
                        finished.set()

        with trio.fail_after(60):
            async with trio.open_nursery() as consumers:
                for number in range(6):
                    consumers.start_soon(consume, (here, there)[number % 2], number)
                async with trio.open_nursery() as tasks:
                    for producer in range(producers):
                        tasks.start_soon(produce, (here, there)[producer % 2], producer)
                await finished.wait()
                consumers.cancel_scope.cancel()

    assert set(seen.values()) == {1}
    for numbers in done.values():
        for producer in range(producers):
            mine = [number for number in numbers if number // 1000 == producer]
            assert mine == sorted(mine)
    await assert_no_deadlock(sql)


async def test_groups_partitions_and_retention_at_once_lose_nothing(open_broker: OpenBroker, sql: Session) -> None:
    """Partitions are born, groups registered, options changed, the sweep runs: all groups still see everything."""
    groups, total = ("a", "b", "c"), 80
    got: dict[str, Counter[int]] = {group: Counter() for group in groups}
    complete = {group: trio.Event() for group in groups}

    async with open_broker() as here, open_broker() as there:
        await listening(here, there)

        async def consume(via: Broker, group: str) -> None:
            while not complete[group].is_set():
                popped = await via.pop("q", group=group, batch=3, partitions=2, wait=60)
                verdicts = await via.ack(popped.messages, lease=popped.lease, group=group)
                assert all(verdict.success for verdict in verdicts)
                got[group].update(popped.data)
                if len(got[group]) == total:
                    complete[group].set()

        async def produce(via: Broker, first: int) -> None:
            for at in range(first, total, 2):
                await via.push("q", at, partition=str(at % 11))

        async def meddle() -> None:
            for turn in range(8):
                queue = await here.configure("q", retention_enabled=True, retention_seconds=600 + turn)
                await there.engine.store.expire(queue, 3)

        with trio.fail_after(60):
            async with trio.open_nursery() as consumers:
                async with trio.open_nursery() as tasks:
                    for group in groups:
                        consumers.start_soon(consume, here, group)
                        consumers.start_soon(consume, there, group)
                    tasks.start_soon(produce, here, 0)
                    tasks.start_soon(produce, there, 1)
                    tasks.start_soon(meddle)
                for group in groups:
                    await complete[group].wait()
                consumers.cancel_scope.cancel()

    assert got == {group: Counter(range(total)) for group in groups}
    await assert_no_deadlock(sql)
