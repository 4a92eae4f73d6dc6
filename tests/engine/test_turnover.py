"""Small pushes, acks and pops that wait at the same time are one write, in that order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import msgspec
import pytest
import trio

from queen.errors import QueueFull
from queen.model.message import AckStatus
from queen.model.queue import QUEUE_MODE
from queen.storage.claims import ClaimOutcome, ClaimRequest
from queen.storage.ids import uuid7_texts
from queen.storage.pushes import PushRequest

if TYPE_CHECKING:
    from tests.conftest import Broker, DatabaseClock, OpenBroker, Session


@pytest.fixture
def buckets() -> int:
    """One: with more the two are written apart."""
    return 1


async def turn_over(broker: Broker, items: list[Any]) -> list[Any]:
    """One write of these."""
    return list(await broker.engine._write_turnover(items))


async def claim_of(broker: Broker, queue: str, batch: int = 1) -> ClaimRequest:
    found = await broker.engine.store.catalogue.find(queue)
    assert found is not None
    return ClaimRequest(
        queues=(found,), group=QUEUE_MODE, partition_id=None, batch=batch, partitions=1, lease_id=uuid4()
    )


async def test_a_pop_gets_what_an_ack_of_the_same_write_has_freed(broker: Broker, sql: Session) -> None:
    await broker.push("q", 1, 2)
    popped = await broker.pop("q", batch=1)
    acks = broker.acks_of(popped.messages, AckStatus.COMPLETED, lease=popped.lease)
    claims = [await claim_of(broker, "q"), await claim_of(broker, "q")]
    before = await sql.fetchval("SELECT xmin::text FROM queen.cursors")

    first, results, second = await turn_over(broker, [claims[0], acks, claims[1]])

    assert isinstance(first, ClaimOutcome)
    assert isinstance(second, ClaimOutcome)
    assert [(result.success, result.lease_released) for result in results] == [(True, True)]
    assert [(claim.first, claim.end) for claim in first.claims] == [(1, 2)]
    assert not second.claims
    assert await sql.fetchval("SELECT lease_id FROM queen.cursors") == claims[0].lease_id
    assert await sql.fetchval("SELECT xmin::text FROM queen.cursors") != before


_LOCATE_IS_CANCELLED = """
    DO $do$
    DECLARE signature text := (
        SELECT format('queen.locate(%s) RETURNS %s', pg_get_function_arguments(oid), pg_get_function_result(oid))
        FROM pg_proc WHERE oid = 'queen.locate'::regproc
    );
    BEGIN
        ALTER FUNCTION queen.locate RENAME TO locate_as_it_was;
        EXECUTE 'CREATE FUNCTION ' || signature || ' LANGUAGE plpgsql AS '
            || quote_literal('BEGIN RAISE EXCEPTION USING ERRCODE = ''query_canceled''; END');
    END
    $do$
"""


@pytest.mark.parametrize(
    "harm", [_LOCATE_IS_CANCELLED, "ALTER FUNCTION queen.locate RENAME TO locate_as_it_was"], ids=["late", "broken"]
)
async def test_a_push_stays_stored_when_what_follows_its_commit_fails(
    broker: Broker, database_clock: DatabaseClock, sql: Session, harm: str
) -> None:
    await broker.configure("q", lease_seconds=10)
    await broker.push("q", 1)
    popped = await broker.pop("q")
    await database_clock.advance(11)
    assert await broker.pop("q")  # by somebody else: the first lease is lost
    acks = broker.acks_of(popped.messages, AckStatus.COMPLETED, lease=popped.lease)
    await sql.execute(harm)  # lost leases are looked up with it after the commit

    pushed, answers = await turn_over(broker, [push_of(broker, 2), acks])

    assert [result.duplicate for result in pushed] == [False]
    assert [(answer.success, answer.error) for answer in answers] == [(False, "Invalid or expired lease")]
    assert await sql.fetchval("SELECT count(*) FROM queen.segments") == 2


async def test_many_pops_each_get_a_partition_of_their_own(broker: Broker) -> None:
    for partition in "abcde":
        await broker.push("q", 1, 2, partition=partition)
    assert await broker.pop("q", batch=1, auto_ack=True, partition="a")

    outcomes = await turn_over(broker, [await claim_of(broker, "q") for _ in range(6)])

    claims = [outcome.claims for outcome in outcomes if isinstance(outcome, ClaimOutcome)]
    got = sorted((claim.partition, claim.first, claim.end) for taken in claims for claim in taken)
    assert got == [("a", 1, 2), ("b", 0, 1), ("c", 0, 1), ("d", 0, 1), ("e", 0, 1)]
    assert sorted(len(taken) for taken in claims) == [0, 1, 1, 1, 1, 1]


async def test_a_lost_lease_is_told_and_does_not_keep_a_pop_from_its_message(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    await broker.configure("q", lease_seconds=10)
    await broker.push("q", 1)
    popped = await broker.pop("q")
    await database_clock.advance(11)
    acks = broker.acks_of(popped.messages, AckStatus.COMPLETED, lease=popped.lease)

    results, outcome = await turn_over(broker, [acks, await claim_of(broker, "q")])

    assert isinstance(outcome, ClaimOutcome)
    assert [result.error for result in results] == ["Invalid or expired lease"]
    assert [(claim.first, claim.end, claim.attempt) for claim in outcome.claims] == [(0, 1, 2)]


def push_of(broker: Broker, *payloads: object, partition: str = "Default", ids: list[str] | None = None) -> PushRequest:
    given: list[str | None] = [*ids] if ids else [None] * len(payloads)
    return PushRequest(
        [
            broker.message(queue="q", partition=partition, payload=msgspec.json.encode(payload), transaction_id=text)
            for payload, text in zip(payloads, given, strict=True)
        ],
        None,
    )


async def test_a_pop_gets_what_was_pushed_and_freed_in_the_same_write(broker: Broker, sql: Session) -> None:
    await broker.push("q", "a", partition="one")
    await broker.push("q", "b", partition="two")
    popped = await broker.pop("q", partition="one")
    acks = broker.acks_of(popped.messages, AckStatus.COMPLETED, lease=popped.lease)
    items = [push_of(broker, "c", "d", partition="one"), acks, *[await claim_of(broker, "q", 10) for _ in range(3)]]

    pushed, results, *outcomes = await turn_over(broker, items)

    assert isinstance(pushed, list)
    assert isinstance(results, list)
    assert [result.duplicate for result in pushed] == [False, False]
    assert [result.success for result in results] == [True]
    claims = [claim for outcome in outcomes if isinstance(outcome, ClaimOutcome) for claim in outcome.claims]
    assert sorted((claim.partition, claim.first, claim.end) for claim in claims) == [("one", 1, 3), ("two", 0, 1)]
    commits = await sql.fetch(
        "SELECT xmin::text FROM queen.segments WHERE message_count = 2 UNION SELECT xmin::text FROM queen.cursors"
    )
    assert len(commits) == 1
    assert sum(isinstance(outcome, ClaimOutcome) and not outcome.claims for outcome in outcomes) == 1


async def test_pushes_that_need_more_than_storing_are_left_to_their_own_way(broker: Broker) -> None:
    ids = uuid7_texts(2)
    await broker.push("q", "a", ids=ids[:1])
    await broker.push("q", "of a group that is known")
    assert await broker.pop("q", batch=1, auto_ack=True)

    pushed, outcome = await turn_over(broker, [push_of(broker, "a", "b", ids=ids), await claim_of(broker, "q")])

    assert pushed is None  # one of them is stored already
    assert isinstance(outcome, ClaimOutcome)
    assert [(claim.first, claim.end) for claim in outcome.claims] == [(1, 2)]
    assert [result.duplicate for result in await broker.push("q", "a", "b", ids=ids)] == [True, False]


@pytest.mark.parametrize(
    "options", [{"max_size": 10}, {"delayed_processing_seconds": 5}, {"window_buffer_seconds": 5}], ids=str
)
async def test_a_queue_that_asks_for_more_has_its_pushes_alone(broker: Broker, options: dict[str, Any]) -> None:
    await broker.push("q", 1)
    assert broker.engine.store.pushes.is_common(push_of(broker, 2))
    assert not broker.engine.store.pushes.is_common(push_of(broker, 2, partition="not there yet"))

    await broker.configure("q", **options)

    assert not broker.engine.store.pushes.is_common(push_of(broker, 2))
    assert (await broker.push("q", 2))[0].duplicate is False


async def test_a_queue_configured_by_another_worker_is_looked_at_again(broker: Broker, open_broker: OpenBroker) -> None:
    await broker.push("q", 1)
    async with open_broker() as other:
        await other.configure("q", max_size=1)
        # what this worker believes of the queue is not true any more, and it may not have heard of that yet
        full: list[QueueFull] = []

        async def push() -> None:
            try:
                await broker.push("q", 2)
            except QueueFull as error:
                full.append(error)

        async with trio.open_nursery() as requests:
            for _ in range(3):
                requests.start_soon(broker.pop, "q")
                requests.start_soon(push)
    assert len(full) == 3


async def test_small_pushes_go_with_pops_and_each_has_its_own_answer(broker: Broker, sql: Session) -> None:
    for number in range(20):
        await broker.push("q", "first", partition=str(number))
    pushed: dict[int, str] = {}
    popped: list[Any] = []

    async def push(number: int) -> None:
        for turn in range(5):
            (result,) = await broker.push("q", [number, turn], partition=str(number))
            pushed[number * 5 + turn] = result.message_id

    async def pop() -> None:
        for _ in range(6):
            batch = await broker.pop("q", batch=1, wait=5)
            popped.extend(batch.data)
            await broker.ack(batch.messages, lease=batch.lease)

    async with trio.open_nursery() as crowd:
        for number in range(20):
            crowd.start_soon(push, number)
            crowd.start_soon(pop)

    assert len(set(pushed.values())) == 100
    assert len(popped) == 120
    for number in range(20):
        assert [turn for n, turn in (p for p in popped if p != "first") if n == number] == list(range(5))
    stored = await sql.fetch("SELECT DISTINCT xmin::text FROM queen.segments")
    assert len(stored) < 120  # or nothing was folded


async def test_a_small_push_does_not_wait_for_a_large_pop(broker: Broker, sql: Session) -> None:
    await broker.push("q", 1)
    assert await broker.pop("q")

    async def pop() -> None:
        await broker.pop("q", batch=1000)

    await sql.execute("BEGIN")
    await sql.execute("LOCK TABLE queen.consumer_groups IN ACCESS EXCLUSIVE MODE")  # pops look there
    async with trio.open_nursery() as consumers:
        consumers.start_soon(pop)
        await sql.wait_for("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
        with trio.fail_after(10):
            assert not (await broker.push("q", 2))[0].duplicate
        await sql.execute("ROLLBACK")


@pytest.mark.parametrize("batch", [1, 1000])
async def test_a_waiting_pop_gets_what_is_pushed_in_the_same_commit(broker: Broker, sql: Session, batch: int) -> None:
    await broker.push("q", "to begin with")
    await broker.pop("q", auto_ack=True)
    await broker.pop("q", group="g", auto_ack=True)
    popped: dict[str, list[Any]] = {}

    async def pop(group: str, partition: str | None) -> None:
        batch_of = await broker.pop("q", group=group, batch=batch, wait=30, auto_ack=True, partition=partition)
        popped[group] = batch_of.data

    async with trio.open_nursery() as consumers:
        consumers.start_soon(pop, QUEUE_MODE, None)
        consumers.start_soon(pop, "g", "Default")
        await broker.wait_parked(2)
        await broker.push("q", "now")

    assert popped == {QUEUE_MODE: ["now"], "g": ["now"]}
    commits = "SELECT xmin::text FROM queen.cursors UNION SELECT xmin::text FROM queen.segments WHERE base_offset = 1"
    assert len(await sql.fetch(commits)) == 1


async def test_a_waiting_pop_waits_on_while_somebody_holds_the_lease(broker: Broker) -> None:
    await broker.push("q", 1)
    held = await broker.pop("q")
    popped: list[Any] = []

    async def pop() -> None:
        popped.extend((await broker.pop("q", wait=30)).data)

    async with trio.open_nursery() as consumers:
        for _ in range(2):
            consumers.start_soon(pop)
        await broker.wait_parked(2)
        for number in (2, 3):
            await broker.push("q", number)
            await broker.wait_parked(2)
        assert not popped
        await broker.push("q", 4, partition="another")
        await broker.ack(held.messages, lease=held.lease)

    assert sorted(popped) == [2, 3, 4]
