"""The hot paths read what they need, however much lies around it: measured, not explained.

The statements live inside functions, where EXPLAIN does not reach; PostgreSQL counts the rows read by every index and
by every sequential scan. Each verb runs beside 50,000 partitions that it does not concern, four times: with plans made
when the tables were empty, had a row or two, or a few (a server that has grown since it started), and with fresh
statistics.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID, uuid4

import msgspec
import pytest
import trio

from queen.errors import QueueFull
from queen.model.message import AckStatus
from queen.model.queue import Queue, StartFrom, StartMode
from queen.model.stream import Cycle, CycleAck, StateChange, StateFilter, StreamQuery
from queen.storage.ids import partition_id_of, uuid7_texts

if TYPE_CHECKING:
    from tests.conftest import Broker, OpenBroker, Session

AROUND: Final = 50_000

LARGE: Final = (
    "partitions", "segments", "transaction_ids", "cursors", "dead_letters", "queue_buckets", "stream_partitions",
    "stream_state", "expired_ranges", "queue_rooms", "queue_sweeps", "counts",
)  # fmt: skip

FILL: Final = """
WITH born AS (
    INSERT INTO queen.partitions (bucket, partition_id, queue_id, name, next_offset, created_at, last_created_at,
        oldest_at, emptied_at)
    SELECT 0, given.partition_id, $1, given.name, 1, clock_timestamp(), clock_timestamp(), clock_timestamp(),
        clock_timestamp()
    FROM unnest($2::uuid[], $3::text[]) AS given (partition_id, name)
    RETURNING partition_id
), kept AS (
    INSERT INTO queen.segments (bucket, partition_id, base_offset, message_count, created_at, id_prefix, minted, codec,
        raw_bytes, min_id, max_id, body)
    SELECT 0, b.partition_id, 0, 1, clock_timestamp(), 1, true, 0, 100, gen_random_uuid(), gen_random_uuid(),
        convert_to('000000000000","transactionId":"', 'UTF8') || '\\x00'
        || convert_to('000000000000","traceId":null,"producerSub":null,"data":0', 'UTF8')
    FROM born b
), keyed AS (
    INSERT INTO queen.transaction_ids (bucket, partition_id, transaction_key, message_offset)
    SELECT 0, b.partition_id, 'tk', 0 FROM born b
), dead AS (
    INSERT INTO queen.dead_letters (bucket, partition_id, message_offset, group_name, queue_id, message_id,
        retry_count, created_at, failed_at, codec, minted, error, body)
    SELECT 0, b.partition_id, 0, 'idle', $1, gen_random_uuid(), 0, clock_timestamp(), clock_timestamp(), 0, true,
        'x', '0'
    FROM born b
)
INSERT INTO queen.cursors (bucket, partition_id, group_name, queue_id, committed, ready_at)
SELECT 0, b.partition_id, g.name, $1, 0, g.ready_at
FROM born b CROSS JOIN (VALUES ('idle', NULL), ('busy', clock_timestamp())) AS g (name, ready_at)
"""


FILL_STREAM: Final = """
WITH known AS (
    INSERT INTO queen.stream_partitions (bucket, query_id, partition_id)
    SELECT 0, $1, given.partition_id FROM unnest($2::uuid[]) AS given (partition_id)
    ON CONFLICT DO NOTHING
)
INSERT INTO queen.stream_state (bucket, query_id, partition_id, key, window_end, codec, value, updated_at)
SELECT 0, $1, given.partition_id, 'around'::bytea, 0, 0, '{}'::bytea, clock_timestamp()
FROM unnest($2::uuid[]) AS given (partition_id)
UNION ALL
SELECT 0, $1, $3, convert_to('open ' || n, 'UTF8'), 1e12, 0, '{}'::bytea, clock_timestamp()
FROM generate_series(1, 20000) AS n
"""


@pytest.fixture
def buckets() -> int:
    """One: the most rows that a bucket can have."""
    return 1


class Verb(NamedTuple):
    run: Callable[[Broker, int], Awaitable[None]]
    limit: int  # rows that one index may read


VERBS: Final[dict[str, Verb]] = {}


def verb(limit: int) -> Callable[[Callable[[Broker, int], Awaitable[None]]], None]:
    """What is measured. It is given a number that grows, for names of its own."""

    def add(run: Callable[[Broker, int], Awaitable[None]]) -> None:
        VERBS[run.__name__.replace("_", " ")] = Verb(run, limit)

    return add


@verb(limit=30)
async def push_to_one_partition(broker: Broker, _: int) -> None:
    await broker.push("q", *range(500), partition="mine")


@verb(limit=30)
async def push_that_makes_its_queue(broker: Broker, number: int) -> None:
    await broker.push(f"new {number}", 1)


@verb(limit=30)
async def push_new_and_repeated_uuid7_ids(broker: Broker, number: int) -> None:
    ids = uuid7_texts(100)
    partition = f"uuid7 {number}"
    await broker.push("q", ids=ids, partition=partition)
    again = await broker.push("q", ids=[*ids, *uuid7_texts(100)], partition=partition)
    assert [result.duplicate for result in again] == [True] * 100 + [False] * 100


@verb(limit=1000)
async def push_new_and_repeated_keys(broker: Broker, number: int) -> None:
    ids = [str(uuid4()) for _ in range(100)]
    partition = f"uuid4 {number}"
    await broker.push("q", ids=ids, partition=partition)
    again = await broker.push("q", ids=[*ids, "new"], partition=partition)
    assert [result.duplicate for result in again] == [True] * 100 + [False]


@verb(limit=5000)
async def push_to_many_partitions(broker: Broker, _: int) -> None:
    await broker.engine.push([broker.message(queue="q", partition=f"many {at}") for at in range(300)], None)


@verb(limit=10_000)
async def push_that_makes_partitions(broker: Broker, number: int) -> None:
    await broker.engine.push([broker.message(queue="q", partition=f"{number} {at}") for at in range(300)], None)


@verb(limit=100)
async def pop_and_ack(broker: Broker, number: int) -> None:
    await broker.push("q", *range(200), partition=f"ack {number}")
    popped = await broker.pop("q", group="idle", partition=f"ack {number}", batch=200)
    results = await broker.ack(popped.messages, lease=popped.lease, group="idle")
    assert len(results) == 200
    assert all(result.success for result in results)


@verb(limit=10_000)
async def pop_of_all_that_was_pushed_before(broker: Broker, _: int) -> None:
    while await broker.pop("q", group="idle", batch=10_000, partitions=1000, auto_ack=True):
        pass


@verb(limit=50)
async def pop_what_is_ready(broker: Broker, number: int) -> None:
    await broker.push("q", 1, partition=f"ready {number}")
    assert len(await broker.pop("q", group="idle")) == 1


@verb(limit=50)
async def pop_in_vain(broker: Broker, _: int) -> None:
    assert not await broker.pop("q", group="idle")


@verb(limit=30)
async def pop_where_all_are_ready(broker: Broker, _: int) -> None:
    await broker.pop("q", group="busy", batch=1)
    await broker.pop("q", group="busy", batch=1, auto_ack=True)


@verb(limit=3000)
async def pop_of_many_partitions(broker: Broker, number: int) -> None:
    popped = await broker.pop("q", group="busy", batch=1000, partitions=200, auto_ack=True)
    assert number < 1 or len(popped.claims) == 200


@verb(limit=3000)
async def lease_of_many_partitions_extended_and_given_back(broker: Broker, number: int) -> None:
    popped = await broker.pop("q", group="busy", batch=1000, partitions=200)
    if number == 1:
        assert (await broker.engine.extend_lease(popped.lease, 600)).renewed == 200
        await popped.give_back()


@verb(limit=100)
async def ack_into_the_dead_letter_queue(broker: Broker, number: int) -> None:
    await broker.push("q", 1, 2, partition=f"dead {number}")
    popped = await broker.pop("q", group="idle", partition=f"dead {number}")
    results = await broker.ack(popped.messages, AckStatus.DLQ, lease=popped.lease, group="idle")
    assert [result.dead_lettered for result in results] == [True, True]


@verb(limit=100)
async def transaction(broker: Broker, number: int) -> None:
    await broker.push("q", 1, partition=f"tx {number}")
    popped = await broker.pop("q", group="idle", partition=f"tx {number}")
    (ack,) = broker.acks_of(popped.messages, lease=popped.lease, group="idle")
    message = broker.message(queue="q", partition=f"tx {number}")
    result = await broker.engine.transact([[message], ack], [popped.lease], None)
    assert result.error is None


@verb(limit=30)
async def first_pop_of_a_known_group_through_another_worker(broker: Broker, number: int) -> None:
    queue = broker.engine.store.catalogue.cached("q")
    assert queue is not None
    await broker.push("q", 1, partition=f"known {number}")
    broker.engine.store.catalogue.forget_group(queue.queue_id, "idle")
    assert await broker.pop("q", group="idle", partition=f"known {number}", auto_ack=True)


@verb(limit=20)
async def sweep_of_lost_hints(broker: Broker, _: int) -> None:
    queue = broker.engine.store.catalogue.cached("q")
    assert queue is not None
    dues = await broker.engine.store.claims.ready([(queue.queue_id, group) for group in ("idle", "busy", "unknown")])
    assert 2 not in dues


@verb(limit=20)
async def retention_with_nothing_to_do(broker: Broker, _: int) -> None:
    queue = broker.engine.store.catalogue.cached("q")
    assert queue is not None
    options = msgspec.structs.replace(queue.options, retention_enabled=True, retention_seconds=3600)
    assert await broker.engine.store.expire(msgspec.structs.replace(queue, options=options), 100) == 0


@verb(limit=30)
async def push_to_a_queue_with_a_limit(broker: Broker, number: int) -> None:
    if number == 0:
        await broker.configure("limited", max_size=100_000)
    for _ in range(3):
        await broker.push("limited", *range(100))


@verb(limit=60)
async def refused_push_to_a_full_queue(broker: Broker, number: int) -> None:
    if number == 0:
        await broker.configure("full", max_size=1)
        await broker.push("full", 1)
    with pytest.raises(QueueFull):
        await broker.push("full", 2)


@verb(limit=100)
async def failed_batch_that_is_put_off(broker: Broker, number: int) -> None:
    if number == 0:
        await broker.configure("put off", retry_delay_ms=600_000, retry_delay_enforced=True)
    await broker.push("put off", 1, partition=str(number))
    popped = await broker.pop("put off", group="idle", partition=str(number))
    (result,) = await broker.ack(popped.messages, AckStatus.FAILED, lease=popped.lease, group="idle")
    assert result.lease_released
    assert not await broker.pop("put off", group="idle")


@verb(limit=300)
async def pop_and_sweep_past_what_has_expired(broker: Broker, number: int) -> None:
    if number == 0:
        await broker.configure("expiring", max_wait_time_seconds=600, dead_letter_queue=True)
    await broker.push("expiring", *range(20), partition=f"{number}")
    await age(broker, "expiring")
    assert not await broker.pop("expiring")
    await broker.push("expiring", *range(20), partition=f"swept {number}")
    await age(broker, "expiring")
    (queue,) = await broker.engine.store.expiry.due()
    await broker.engine.store.expiry.bury()  # perhaps not all: the worker is at it too
    await broker.engine.store.expire(queue, 100)


AGE: Final = (
    "UPDATE queen.segments s SET created_at = s.created_at - interval '1 hour' FROM queen.partitions p"
    " WHERE p.bucket = 0 AND p.queue_id = $1 AND s.bucket = 0 AND s.partition_id = p.partition_id",
    "UPDATE queen.partitions SET oldest_at = oldest_at - interval '1 hour' WHERE bucket = 0 AND queue_id = $1",
    "UPDATE queen.queue_sweeps SET due_at = due_at - interval '1 hour' WHERE bucket = 0 AND queue_id = $1",
)


async def age(broker: Broker, name: str) -> None:
    """As if what is in the queue had been pushed an hour ago."""
    queue = broker.engine.store.catalogue.cached(name)
    assert queue is not None

    async def shift(connection: Any) -> None:
        async with connection.transaction():
            await connection.execute("SET LOCAL enable_seqscan = off")  # this is not what is measured
            for statement in AGE:
                await connection.execute(statement, queue.queue_id)

    await broker.engine.store._bridge.run(shift)


@verb(limit=20)
async def sweeps_with_nothing_to_do(broker: Broker, _: int) -> None:
    assert await broker.engine.store.expiry.clean(30, 100) == 0
    await broker.engine.store.expiry.bury()
    await broker.engine.store.expiry.due()


@verb(limit=200)
async def a_partition_deleted_beside_them(broker: Broker, number: int) -> None:
    await broker.push("q", 1, 2, partition=f"doomed {number}")
    assert await broker.engine.admin.delete_partition("q", f"doomed {number}") == 2


@verb(limit=200)
async def a_queue_born_filled_and_deleted_beside_it(broker: Broker, number: int) -> None:
    name = f"beside {number}"
    await broker.push(name, 1, 2, 3)
    assert not await broker.pop(name, group="new", start=StartFrom(StartMode.NEW))
    assert len(await broker.pop(name)) == 3
    assert await broker.engine.delete_queue(name)


@verb(limit=200)
async def cycle_of_a_stream(broker: Broker, number: int) -> None:
    query_id = await _stream(broker)
    queue = broker.engine.store.catalogue.cached("q")
    assert queue is not None
    await broker.push("q", 1, 2, partition=f"stream {number}")
    popped = await broker.pop("q", group="idle", partition=f"stream {number}")
    cycle = Cycle(
        query_id=query_id,
        partition_id=partition_id_of(queue.queue_id, f"stream {number}"),
        group="idle",
        changes=[StateChange("a", b"1"), StateChange("b", None)],
        messages=[broker.message(queue="q", partition=f"stream {number}")],
        ack=CycleAck(transaction_id=popped[1].transaction_id, lease_id=popped.lease),
        release_lease=True,
        digest=b"digest",
    )
    for repeated in (False, True):
        result = await broker.engine.cycle_stream(cycle, None)
        assert (result.error, result.repeated) == (None, repeated)


@verb(limit=100)
async def state_of_a_stream(broker: Broker, _: int) -> None:
    query_id, partition_id = await _stream(broker), _partition_with_windows(broker)
    for wanted in (
        StateFilter(prefix="open ", ripe_until=1e11),
        StateFilter(keys=("open 5", "open 6", "nothing")),
        StateFilter(prefix="open 777"),
    ):
        assert len(await broker.engine.stream_state(query_id, partition_id, wanted)) < 50


async def _stream(broker: Broker) -> UUID:
    query = StreamQuery(name="totals", source_queue="q", sink_queue=None, config_hash="h", reset=False)
    return (await broker.engine.register_stream(query))[0]


def _partition_with_windows(broker: Broker) -> UUID:
    queue = broker.engine.store.catalogue.cached("q")
    assert queue is not None
    return partition_id_of(queue.queue_id, "windows")


async def _flush(broker: Broker) -> None:
    """Have every connection of the engine report what it has counted."""
    jobs = broker.engine.store._bridge
    reported: set[int] = set()

    async def report(connection: Any) -> None:
        # held for a moment, so that the next report goes by another connection
        reported.add(await connection.fetchval("SELECT pg_backend_pid() FROM pg_sleep(0.02)"))
        await connection.execute("SELECT pg_stat_force_next_flush()")

    while len(reported) < jobs.connections:
        async with trio.open_nursery() as connections:
            for _ in range(jobs.connections):
                connections.start_soon(jobs.run, report)


async def _counters(sql: Session) -> dict[str, int]:
    rows = await sql.fetch(
        "SELECT 'sequentially ' || relname AS name, seq_tup_read AS rows FROM pg_stat_user_tables"
        " WHERE schemaname = 'queen' AND relname = ANY ($1)"
        " UNION ALL SELECT indexrelname, idx_tup_read FROM pg_stat_user_indexes WHERE schemaname = 'queen'",
        list(LARGE),
    )
    return {row["name"]: row["rows"] for row in rows}


async def _fill(sql: Session, queue: Queue, query_id: UUID, around: int = AROUND) -> None:
    names = [f"around {at}" for at in range(around)]
    ids: list[UUID] = [partition_id_of(queue.queue_id, name) for name in names]
    await sql.execute(FILL, queue.queue_id, ids, names)
    await sql.execute(FILL_STREAM, query_id, ids, partition_id_of(queue.queue_id, "windows"))
    await sql.execute("SELECT pg_stat_force_next_flush()")


@pytest.mark.parametrize(
    "statistics", ["of an empty database", "of a row or two", "of a few rows", "of sizes alone", "fresh"]
)
async def test_no_verb_reads_what_does_not_concern_it(open_broker: OpenBroker, sql: Session, statistics: str) -> None:
    # a report of the worker would be measured too
    async with open_broker(db_pool_size=2, stats_interval_seconds=3600) as broker:
        queue = await broker.configure("q", lease_seconds=600)
        for group in ("idle", "busy"):
            assert not await broker.pop("q", group=group)
        if statistics == "of a row or two":
            await broker.push("q", 1)
            await sql.execute("ANALYZE")
        for verb in VERBS.values():
            await verb.run(broker, 0)
        if statistics == "of a few rows":
            await sql.execute("ANALYZE")
        if statistics == "of sizes alone":  # as between the two halves of the first autovacuum
            await sql.execute("VACUUM")
        if statistics not in ("of an empty database", "fresh"):
            for number in range(2, 8):  # more often than PostgreSQL plans a statement for one execution only
                for verb in VERBS.values():
                    await verb.run(broker, -number)
        await _flush(broker)
        await _fill(sql, queue, await _stream(broker))
        if statistics == "fresh":
            await sql.execute("ANALYZE")
        excesses: dict[str, dict[str, int]] = {}

        before = await _counters(sql)
        for name, verb in VERBS.items():
            await sql.execute(
                "VACUUM (INDEX_CLEANUP ON) queen.cursors, queen.partitions"
            )  # entries left behind by the verb before
            await verb.run(broker, 1)
            await _flush(broker)
            after = await _counters(sql)
            read = {counter: rows - before[counter] for counter, rows in after.items()}
            before = after
            limits = {counter: 0 if counter.startswith("sequentially") else verb.limit for counter in read}
            excess = {counter: rows for counter, rows in read.items() if rows > limits[counter]}
            if excess:
                excesses[name] = excess

    assert not excesses, "\n".join(f"{verb}: {read}" for verb, read in excesses.items())


async def test_a_queue_is_made_beside_many_cursors_with_plans_for_a_few(open_broker: OpenBroker, sql: Session) -> None:
    """Once this looked through all cursors of the bucket for each of them: 30 s among 5,000."""
    async with open_broker(db_pool_size=2, stats_interval_seconds=3600) as broker:
        queue = await broker.configure("q")
        assert not await broker.pop("q", group="idle")
        await sql.execute("ANALYZE")
        for number in range(4):  # on all connections
            await broker.push(f"before {number}", 1)
        await _flush(broker)
        await _fill(sql, queue, await _stream(broker), 2000)
        before = await _counters(sql)

        await broker.push("after", 1)

        await _flush(broker)
        after = await _counters(sql)
    assert {
        name: after[name] - before[name] for name in after if "cursors" in name and after[name] - before[name] > 30
    } == {}
