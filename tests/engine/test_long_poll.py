"""Waiting pops: woken by what they wait for, in this worker or another, and by nothing else.

But for the tests of the sweep itself, the sweep is off: who would sleep until it comes, sleeps for ever.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from queen.engine.engine import LeasedBatch
from queen.model.message import AckStatus
from queen.storage.notify import Notifications

if TYPE_CHECKING:
    from tests.conftest import Broker, Popped, Session

SOON = 5.0
"""Seconds: what is not woken would sleep a minute."""


@pytest.fixture(autouse=True)
def no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("queen.engine.engine._SWEEP_SECONDS", 3600.0)


@pytest.fixture
def sweep(no_sweep: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("queen.engine.engine._SWEEP_SECONDS", 1.0)


@asynccontextmanager
async def waiting(broker: Broker, *queues: str | None, **where: Any) -> AsyncIterator[list[Popped]]:
    """Parked pops, one for each queue; at the end of the block each has to get something soon."""
    taken: list[Popped] = []

    async def consume(queue: str | None) -> None:
        taken.append(await broker.pop(queue, wait=60, **where))

    parked = broker.engine.statistics()["parked"]
    async with trio.open_nursery() as consumers:
        for queue in queues:
            consumers.start_soon(consume, queue)
        await broker.wait_parked(parked + len(queues))
        yield taken
        consumers.cancel_scope.deadline = trio.current_time() + SOON
    assert len(taken) == len(queues)
    assert all(taken)


async def listening(*brokers: Broker) -> None:
    """Until hints of others are heard."""
    for broker in brokers:
        notifications = broker.engine.store.notifications
        await broker.wait_until(partial(getattr, notifications, "listening"))


# -- woken --------------------------------------------------------------------------------------------------------


@pytest.mark.buckets
async def test_a_push_wakes_a_waiting_pop(broker: Broker) -> None:
    await broker.configure("q")

    async with waiting(broker, "q") as taken:
        await broker.push("q", 1)

    assert taken[0].data == [1]


@pytest.mark.buckets
async def test_a_push_through_another_worker_wakes_a_waiting_pop(broker: Broker, other: Broker) -> None:
    await broker.configure("q")
    await listening(broker)

    for at in range(5):
        async with waiting(broker, "q", auto_ack=True) as taken:
            await other.push("q", at)
            started = trio.current_time()
        assert taken[0].data == [at]
        assert trio.current_time() - started < 0.8


@pytest.mark.buckets
@pytest.mark.parametrize("where", [{"partition": "p"}, {"group": "g"}, {"group": "g", "partition": "p"}])
async def test_pops_of_a_partition_or_a_group_are_woken_from_everywhere(
    broker: Broker, other: Broker, where: dict[str, Any]
) -> None:
    await broker.configure("q")
    await listening(broker, other)

    for via in (broker, other):
        async with waiting(broker, "q", auto_ack=True, **where):
            await via.push("q", 1, partition="p")


@pytest.mark.buckets
@pytest.mark.parametrize("labels", [{"namespace": "n"}, {"task": "t"}, {"namespace": "n", "task": "t"}])
async def test_pops_by_label_are_woken_from_everywhere(broker: Broker, other: Broker, labels: dict[str, str]) -> None:
    for name in ("a", "b"):
        await broker.configure(name, "n", "t")
    await listening(broker, other)

    for via in (broker, other):
        for name in ("a", "b"):
            async with waiting(broker, None, auto_ack=True, **labels):
                await via.push(name, 1)


@pytest.mark.buckets
async def test_a_queue_that_is_born_elsewhere_wakes_those_who_wait_for_it(broker: Broker, other: Broker) -> None:
    await listening(broker)

    async with waiting(broker, "new.task"), waiting(broker, None, namespace="new"):
        await other.push("new.task", 1, partition="a")
        await other.push("new.task", 2, partition="b")


async def test_every_group_is_woken(broker: Broker, other: Broker) -> None:
    await broker.configure("q")
    await listening(broker)

    async with waiting(broker, "q", group="a"), waiting(broker, "q", group="b"), waiting(broker, "q"):
        await other.push("q", 1)


async def test_a_transaction_wakes_a_waiting_pop(broker: Broker, other: Broker) -> None:
    await broker.configure("q")
    await listening(broker)

    for via in (broker, other):
        async with waiting(broker, "q", auto_ack=True):
            assert (await via.engine.transact([[via.message(queue="q")]], [], None)).error is None


@pytest.mark.buckets
async def test_as_many_waiting_pops_are_woken_as_there_are_partitions_with_news(broker: Broker, other: Broker) -> None:
    await broker.configure("q")
    await listening(broker, other)

    async with waiting(broker, *["q"] * 10) as here, waiting(other, *["q"] * 10) as there:
        messages = [broker.message(queue="q", partition=str(at), payload=b"%d" % at) for at in range(20)]
        await broker.engine.push(messages, None)

    assert sorted(data for popped in here + there for data in popped.data) == list(range(20))


async def test_waiting_pops_share_what_one_partition_has_one_after_another(broker: Broker) -> None:
    await broker.configure("q")

    async with waiting(broker, *["q"] * 20, batch=1, auto_ack=True) as taken:
        await broker.push("q", *range(20))

    assert sorted(data for popped in taken for data in popped.data) == list(range(20))


RELEASES: dict[str, Callable[[Broker, Popped], Awaitable[Any]]] = {
    "ack": lambda via, popped: via.ack(popped.messages[:1], lease=popped.lease),
    "failure": lambda via, popped: via.ack(popped.messages[:1], AckStatus.FAILED, lease=popped.lease),
    "retry": lambda via, popped: via.ack(popped.messages[:1], AckStatus.RETRY, lease=popped.lease),
    "dead letter": lambda via, popped: via.ack(popped.messages[:1], AckStatus.DLQ, lease=popped.lease),
    "transaction": lambda via, popped: via.engine.transact(via.acks_of(popped.messages, lease=popped.lease), [], None),
    "give back": lambda via, popped: popped.give_back(),
}


@pytest.mark.buckets
@pytest.mark.parametrize("how", RELEASES)
async def test_the_end_of_a_lease_wakes_who_waits_for_its_partition(broker: Broker, other: Broker, how: str) -> None:
    await broker.push("q", 1, 2)
    await listening(broker, other)

    for holder, waiter in ((broker, broker), (other, broker)):
        held = await holder.pop("q", batch=1)
        async with waiting(waiter, "q", batch=1) as taken:
            await RELEASES[how](holder, held)
        await waiter.ack(taken[0].messages, AckStatus.RETRY, lease=taken[0].lease)
        await broker.push("q", 3)


async def test_the_expiry_of_a_lease_wakes_who_waits_for_its_partition(broker: Broker) -> None:
    await broker.configure("q", lease_seconds=1)
    await broker.push("q", 1)
    held = await broker.pop("q")

    async with waiting(broker, "q") as taken:
        pass

    assert taken[0].ids == held.ids


@pytest.mark.parametrize("option", ["delayed_processing_seconds", "window_buffer_seconds"])
@pytest.mark.parametrize("before", [True, False], ids=["pushed before the pop", "pushed after the pop"])
async def test_the_end_of_a_delay_or_window_wakes_who_waits(
    broker: Broker, other: Broker, option: str, before: bool
) -> None:
    options: dict[str, Any] = {option: 1}
    await broker.configure("q", **options)
    await listening(broker)
    if before:
        await other.push("q", 1)

    async with waiting(broker, "q") as taken:
        if not before:
            await other.push("q", 1)
        started = trio.current_time()

    assert taken[0].data == [1]
    assert trio.current_time() - started < 2.0


async def test_a_delay_that_is_taken_back_wakes_who_waits_for_its_end(broker: Broker, other: Broker) -> None:
    await broker.configure("q", delayed_processing_seconds=3600)
    await broker.push("q", 1)
    await listening(broker)

    async with waiting(broker, "q"):
        await other.configure("q")


@pytest.mark.buckets
async def test_a_queue_deleted_and_born_again_wakes_who_waited_for_the_old_one(broker: Broker, other: Broker) -> None:
    await broker.configure("q")
    await listening(broker)

    async with waiting(broker, "q"), waiting(broker, "q", partition="p", group="g"):
        assert await other.engine.delete_queue("q")
        await other.push("q", 1, partition="p")


# -- the sweep covers what is lost ---------------------------------------------------------------------------------


@pytest.mark.buckets
async def test_a_lost_hint_costs_a_second_at_most(
    sweep: None, broker: Broker, other: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lose(self: Notifications, keys: Any) -> None:
        pass

    monkeypatch.setattr(Notifications, "send", lose)
    await broker.configure("q", "ns")

    async with waiting(broker, "q"), waiting(broker, None, namespace="ns"), waiting(broker, "unborn"):
        await other.push("q", 1, partition="a")
        await other.push("q", 2, partition="b")
        await other.push("unborn", 3)
        started = trio.current_time()

    assert trio.current_time() - started < 2.5


async def test_a_listener_that_was_cut_off_listens_again_and_has_everybody_look(
    broker: Broker, other: Broker, sql: Session
) -> None:
    await broker.configure("q")
    await listening(broker)

    async with waiting(broker, "q"):
        await sql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND query LIKE 'LISTEN%'"
        )
        await broker.wait_until(lambda: not broker.engine.store.notifications.listening)
        await other.push("q", 1)


@pytest.mark.buckets
@pytest.mark.parametrize("auto_ack", [True, False], ids=["with autoAck", "with acks"])
async def test_what_is_pushed_after_another_worker_has_taken_all_reaches_who_waits_here(
    broker: Broker, other: Broker, auto_ack: bool
) -> None:
    """A cursor that is drained but looks ready would tell nobody of the next push."""
    await broker.configure("q")
    await listening(broker, other)

    async with waiting(broker, "q") as taken:
        async with waiting(other, "q", auto_ack=auto_ack) as there:
            await other.push("q", 1)
        if not auto_ack:
            await other.ack(there[0].messages, lease=there[0].lease)
        await other.push("q", 2)

    assert (there[0].data, taken[0].data) == ([1], [2])


@pytest.mark.parametrize("auto_ack", [True, False], ids=["with autoAck", "with acks"])
async def test_what_is_drained_while_a_push_holds_the_partition_is_looked_at_again(
    broker: Broker, sql: Session, auto_ack: bool
) -> None:
    """The cursor may not be made idle then; that it stays ready must be told to somebody."""
    await broker.push("q", 1)
    popped = await broker.pop("q", auto_ack=auto_ack)
    if auto_ack:
        await broker.push("q", 2)

    await sql.execute("BEGIN")
    await sql.execute("SELECT FROM queen.partitions FOR NO KEY UPDATE")
    if auto_ack:
        assert (await broker.pop("q", auto_ack=True)).data == [2]
    else:
        await broker.ack(popped.messages, lease=popped.lease)
    assert await sql.fetchval("SELECT ready_at IS NOT NULL FROM queen.cursors")
    await sql.execute("COMMIT")
    assert not await broker.pop("q")

    assert await sql.fetchval("SELECT ready_at IS NULL FROM queen.cursors")


async def test_as_many_waiting_pops_look_as_there_are_messages_and_hardly_more(broker: Broker) -> None:
    """One is woken by the push, the others at once by what it left. Where these fall in two claims, the first has one
    more look, lest one of the second leaves."""
    await broker.configure("q")

    async with trio.open_nursery() as consumers:
        taken: list[Popped] = []

        async def consume() -> None:
            taken.append(await broker.pop("q", batch=1, wait=60, auto_ack=True))

        for _ in range(20):
            consumers.start_soon(consume)
        await broker.wait_parked(20)
        asked, looks = broker.asked, broker.looks
        await broker.push("q", 1, 2, 3, 4)
        await broker.wait_until(lambda: len(taken) == 4)
        await broker.wait_parked(16)
        assert broker.asked - asked in (4, 5, 6)
        assert broker.looks - looks in (2, 3, 4)
        consumers.cancel_scope.cancel()

    assert sorted(popped.data for popped in taken) == [[1], [2], [3], [4]]


@pytest.mark.parametrize("auto_ack", [True, False], ids=["with autoAck", "with acks"])
async def test_who_takes_the_last_message_wakes_nobody(broker: Broker, auto_ack: bool) -> None:
    await broker.configure("q")

    async with waiting(broker, "q", "q", auto_ack=auto_ack) as taken:
        asked = broker.asked
        await broker.push("q", 1)
        await broker.wait_until(lambda: bool(taken))
        if not auto_ack:
            await broker.ack(taken[0].messages, lease=taken[0].lease)
        assert (broker.asked - asked, broker.engine.statistics()["parked"]) == (1, 1)
        await broker.push("q", 2)


# -- not woken ----------------------------------------------------------------------------------------------------


QUIET = 0.3
"""Seconds in which nothing may happen: a tick of any kind that is worth the name would."""


@pytest.mark.buckets
async def test_a_waiting_pop_looks_once_and_then_sleeps(broker: Broker) -> None:
    await listening(broker)
    await broker.push("q", 1)
    assert await broker.pop("q")
    await broker.configure("empty")

    async with trio.open_nursery() as consumers:
        for queue in ("q", "empty", "unborn"):
            for _ in range(3):
                consumers.start_soon(partial(broker.pop, queue, wait=60))
        await broker.wait_parked(9)
        looks = broker.looks
        await trio.sleep(QUIET)
        assert broker.looks == looks
        assert broker.engine.statistics()["parked"] == 9
        consumers.cancel_scope.cancel()


async def test_a_push_to_another_partition_or_queue_wakes_nobody(broker: Broker) -> None:
    await listening(broker)
    for name in ("q", "other"):
        await broker.configure(name)

    async with trio.open_nursery() as consumers:
        consumers.start_soon(lambda: broker.pop("q", partition="a", wait=60))
        await broker.wait_parked(1)
        looks = broker.looks
        await broker.push("q", 1, partition="b")
        await broker.push("other", 1, partition="a")
        await trio.sleep(QUIET)
        assert broker.looks == looks
        consumers.cancel_scope.cancel()


async def test_a_pop_that_gets_nothing_ends_with_its_timeout(broker: Broker) -> None:
    await broker.configure("q")

    for seconds in (0.0, 0.05, 0.3):
        started = trio.current_time()
        assert not await broker.pop("q", wait=seconds)
        assert seconds <= trio.current_time() - started < seconds + 0.5


# -- cancelled ----------------------------------------------------------------------------------------------------


DELAYS = (0, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01, 0.02)


async def consume(broker: Broker, owned: list[LeasedBatch], **where: Any) -> None:
    """A consumer that may be cancelled: what it owns then is in ``owned``."""
    batch = await broker.engine.pop(broker.request(queue="q", timeout_seconds=60, **where))
    assert batch is not None
    owned.append(batch)


@pytest.mark.buckets
@pytest.mark.parametrize("auto_ack", [False, True], ids=["lease", "autoAck"])
async def test_a_cancelled_waiting_pop_owns_nothing(broker: Broker, auto_ack: bool) -> None:
    """Guarantee 6; cancelled in every state of a pop that is just being woken."""
    await broker.configure("q")

    for delay in DELAYS:
        owned: list[LeasedBatch] = []
        async with trio.open_nursery() as consumer:
            consumer.start_soon(partial(consume, broker, owned, auto_ack=auto_ack))
            await broker.wait_parked(1)
            await broker.push("q", delay)
            await trio.sleep(delay)
            consumer.cancel_scope.cancel()

        if not owned:
            popped = await broker.pop("q", wait=SOON)
            assert (popped.data, popped.claims[0].attempt) == ([delay], 1)
            await broker.ack(popped.messages, lease=popped.lease)
        else:
            assert not await broker.pop("q")
            await owned[0].give_back()
            assert await broker.drain("q") == [delay]


async def test_a_cancelled_pop_passes_its_wake_up_on(broker: Broker) -> None:
    await broker.configure("q")

    async def consume_until(scope: trio.CancelScope, owned: list[LeasedBatch], gone: trio.Event) -> None:
        with scope:
            await consume(broker, owned)
        gone.set()

    for delay in DELAYS:
        owned: list[LeasedBatch] = []
        impatience, gone = trio.CancelScope(), trio.Event()
        async with trio.open_nursery() as consumer:
            consumer.start_soon(consume_until, impatience, owned, gone)  # parks first, so it is woken first
            await broker.wait_parked(1)
            async with waiting(broker, "q", auto_ack=True) as taken:
                await broker.push("q", delay)
                await trio.sleep(delay)
                impatience.cancel()
                await gone.wait()  # it may have been served at this moment
                if owned:
                    await owned[0].give_back()
        assert taken[0].data == [delay]
