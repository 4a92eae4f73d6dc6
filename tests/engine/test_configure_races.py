"""What happens between two commits: each race is held open by a transaction beside the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

from queen.model.message import AckStatus
from queen.model.queue import StartFrom
from queen.storage.ids import bucket_of, partition_id_of

if TYPE_CHECKING:
    from tests.conftest import Broker, DatabaseClock, OpenSession, Session

pytestmark = pytest.mark.buckets

WAITING = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock')"


@asynccontextmanager
async def beside(sessions: OpenSession, statement: str, *arguments: Any) -> AsyncIterator[Callable[[], Awaitable[str]]]:
    """A transaction that has done ``statement`` and goes on until it is told to commit."""
    session = sessions()
    await session.execute("BEGIN")
    await session.fetch(statement, *arguments)
    yield lambda: session.execute("COMMIT")


async def test_a_group_registered_while_its_queue_is_deleted_leaves_nothing_behind(
    broker: Broker, sessions: OpenSession, sql: Session
) -> None:
    queue = await broker.configure("q")
    await broker.push("q", 1)
    async with (
        beside(sessions, "SELECT queen.register_group(NULL, $1, 'g', 'all', NULL)", queue.queue_id) as commit,
        trio.open_nursery() as tasks,
    ):
        tasks.start_soon(broker.engine.delete_queue, "q")
        await sql.wait_for(WAITING)
        await commit()

    assert await sql.fetchval("SELECT count(*) FROM queen.consumer_groups") == 0
    assert await sql.fetchval("SELECT count(*) FROM queen.cursors") == 0


async def test_a_group_that_comes_while_its_queue_is_deleted_is_told_so(
    broker: Broker, sessions: OpenSession, sql: Session
) -> None:
    queue = await broker.configure("q")
    answers = []

    async def register() -> None:
        answers.append(await broker.engine.store.catalogue.register(queue, "g", StartFrom(), None))

    async with beside(sessions, "SELECT queen.delete_queue(NULL, 'q')") as commit, trio.open_nursery() as tasks:
        tasks.start_soon(register)
        await sql.wait_for(WAITING)
        await commit()

    assert answers == [False]
    assert await sql.fetchval("SELECT count(*) FROM queen.consumer_groups") == 0


async def test_a_registration_does_not_wait_for_a_configure(broker: Broker, sessions: OpenSession) -> None:
    queue = await broker.configure("q")
    async with beside(sessions, "UPDATE queen.queues SET lease_seconds = 7 WHERE name = 'q' RETURNING 1") as commit:
        assert await broker.engine.store.catalogue.register(queue, "g", StartFrom(), None)
        await commit()


DELAYS: dict[str, dict[str, Any]] = {
    "delay": {"delayed_processing_seconds": 600},
    "window": {"window_buffer_seconds": 600},
}


@pytest.mark.parametrize("option", DELAYS)
async def test_a_delay_removed_while_a_push_is_not_committed_does_not_hold_its_message(
    broker: Broker, other: Broker, sessions: OpenSession, sql: Session, option: str
) -> None:
    queue = await broker.configure("q", **DELAYS[option])
    assert not await broker.pop("q", partition="p")
    await broker.push("q", "first", partition="p")
    await broker.configure("q")
    assert (await broker.pop("q", auto_ack=True)).data == ["first"]
    assert not await broker.pop("q")
    await broker.configure("q", **DELAYS[option])
    partition_id = partition_id_of(queue.queue_id, "p")
    bucket = bucket_of(partition_id, broker.engine.store.buckets)

    # the push is kept from its end by the cursor it has to wake; configure then waits for it
    async with (
        beside(
            sessions,
            "SELECT FROM queen.cursors WHERE bucket = $1 AND partition_id = $2 FOR UPDATE",
            bucket,
            partition_id,
        ) as release,
        trio.open_nursery() as tasks,
    ):
        tasks.start_soon(lambda: broker.push("q", "second", partition="p"))
        await sql.wait_for(WAITING)
        tasks.start_soon(lambda: other.configure("q"))
        await sql.wait_for(
            "SELECT count(*) = 2 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        await release()

    assert (await broker.pop("q")).data == ["second"]


@pytest.mark.parametrize("option", DELAYS)
async def test_a_pop_that_meets_a_configure_puts_nothing_off(
    broker: Broker, sessions: OpenSession, sql: Session, option: str
) -> None:
    put_off = "SELECT max(ready_at) > clock_timestamp() + interval '1 minute' FROM queen.cursors"
    queue = await broker.configure("q", **DELAYS[option])
    await broker.push("q", 1)
    assert not await broker.pop("q")
    await sql.execute("UPDATE queen.cursors SET ready_at = clock_timestamp()")
    bucket = bucket_of(partition_id_of(queue.queue_id, "Default"), broker.engine.store.buckets)

    async with beside(
        sessions, "SELECT pg_advisory_xact_lock(queen.delay_lock($1, $2))", bucket, queue.queue_id
    ) as commit:
        assert not await broker.pop("q")  # it looks, waits for nobody, and may look again
        assert not await sql.fetchval(put_off)
        await commit()

    assert not await broker.pop("q")
    assert await sql.fetchval(put_off)


async def test_a_message_that_retention_takes_before_it_is_set_aside_fails_no_neighbour(
    broker: Broker, database_clock: DatabaseClock, sessions: OpenSession, sql: Session
) -> None:
    queue = await broker.configure("q", max_wait_time_seconds=60)
    await broker.push("q", "doomed", partition="p")
    popped = await broker.pop("q", group="g", auto_ack=True)
    await broker.configure("fine")
    await broker.push("fine", 1, 2)
    neighbour = await broker.pop("fine")
    await database_clock.advance(61)
    partition_id = partition_id_of(queue.queue_id, "p")
    bucket = bucket_of(partition_id, broker.engine.store.buckets)
    acks = [
        *broker.acks_of(popped.messages, AckStatus.DLQ, group="g"),
        *broker.acks_of(neighbour.messages, lease=neighbour.lease),
    ]
    verdicts = []

    async def ack() -> None:
        verdicts.extend(await broker.engine.ack(acks))

    # the ack has found its message and waits for the cursor; retention has nothing to do there and goes ahead
    async with (
        beside(
            sessions,
            "SELECT FROM queen.cursors WHERE bucket = $1 AND partition_id = $2 FOR UPDATE",
            bucket,
            partition_id,
        ) as release,
        trio.open_nursery() as tasks,
    ):
        tasks.start_soon(ack)
        await sql.wait_for(WAITING)
        assert await broker.engine.store.expire(queue, 10) == 1
        await release()

    assert [(verdict.success, verdict.dead_lettered) for verdict in verdicts] == [(True, False)] + [(True, False)] * 2
    assert verdicts[-1].lease_released
    assert await sql.fetchval("SELECT count(*) FROM queen.dead_letters") == 0
