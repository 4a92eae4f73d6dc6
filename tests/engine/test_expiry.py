"""ttl; and what expires, by whatever option, as dead letters of a queue that asks for them."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import trio

from queen.model.message import AckStatus
from queen.model.queue import QUEUE_MODE, StartFrom, StartMode
from queen.storage.lines import read_line

if TYPE_CHECKING:
    from queen.storage.dead_letters import DeadLetter
    from tests.conftest import Broker, DatabaseClock, OpenBroker, Popped, Session

pytestmark = pytest.mark.buckets

TTL: dict[str, Any] = {"ttl_seconds": 60, "ttl_enforced": True}


async def stored(sql: Session) -> int:
    return int(await sql.fetchval("SELECT coalesce(sum(message_count), 0) FROM queen.segments"))


async def sweep(broker: Broker, name: str = "q") -> int:
    queue = await broker.engine.store.catalogue.find(name)
    assert queue is not None
    return await broker.engine.store.expire(queue, 100)


async def all_buried(broker: Broker) -> None:
    """Bury, also what the engine's own task is at, which a pop has told."""

    async def nothing_left(connection: Any) -> bool:
        return not await connection.fetchval("SELECT EXISTS (SELECT FROM queen.expired_ranges)")

    await broker.engine.store.expiry.bury()
    await broker.wait_until(lambda: broker.engine.store._bridge.run(nothing_left))


async def letters(broker: Broker, **chosen: Any) -> list[DeadLetter]:
    """Those of the queue in the order of their messages, after all that is noted down has become one."""
    await all_buried(broker)
    total, found = await broker.engine.dead_letters(queue="q", limit=1000, **chosen)
    assert total == len(found)
    return sorted(found, key=lambda letter: (letter.group, letter.message_id))


def data(found: list[DeadLetter]) -> list[Any]:
    return [msgspec.json.decode(read_line(letter.line, str(letter.message_id)[:24]).data) for letter in found]


# -- ttl ------------------------------------------------------------------------------------------------------------


async def test_what_is_older_than_its_ttl_is_not_delivered_and_removed_by_the_sweep(
    broker: Broker, database_clock: DatabaseClock, sql: Session
) -> None:
    await broker.configure("q", **TTL)
    await broker.push("q", "old")
    await database_clock.advance(59)
    await broker.push("q", "young")
    await database_clock.advance(2)

    assert (await broker.pop("q")).data == ["young"]
    assert (await broker.pop("q", group="g", auto_ack=True, partition="Default")).data == ["young"]
    assert await sweep(broker) == 1
    assert await stored(sql) == 1
    assert await letters(broker) == []


async def test_a_ttl_that_nobody_asked_for_does_nothing(broker: Broker, database_clock: DatabaseClock) -> None:
    await broker.configure("q", ttl_seconds=60)
    await broker.push("q", 1)
    await database_clock.advance(100_000)

    assert await sweep(broker) == 0
    assert (await broker.pop("q")).data == [1]


async def test_a_ttl_of_zero_is_none(broker: Broker, database_clock: DatabaseClock) -> None:
    await broker.configure("q", ttl_seconds=0, ttl_enforced=True)
    await broker.push("q", 1)
    await database_clock.advance(100_000)

    assert await sweep(broker) == 0
    assert (await broker.pop("q")).data == [1]


async def test_what_was_leased_in_time_can_be_acknowledged_after_its_ttl(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    await broker.configure("q", lease_seconds=600, dead_letter_queue=True, **TTL)
    await broker.push("q", 1, 2)
    popped = await broker.pop("q")
    await database_clock.advance(61)

    assert await sweep(broker) == 0
    assert (await broker.ack(popped.messages, lease=popped.lease))[1].lease_released
    assert await letters(broker) == []
    assert await sweep(broker) == 2


async def test_the_youngest_of_ttl_eviction_and_retention_counts(broker: Broker, database_clock: DatabaseClock) -> None:
    await broker.configure(
        "q", max_wait_time_seconds=30, retention_enabled=True, retention_seconds=90, dead_letter_queue=True, **TTL
    )
    await broker.push("q", 1)
    await database_clock.advance(31)

    assert not await broker.pop("q")
    assert [letter.error for letter in await letters(broker)] == ["Expired: maxWaitTimeSeconds of 30 s is over"]


# -- dead letters of what expired -------------------------------------------------------------------------------------

OPTIONS = {
    "ttl": TTL,
    "maxWaitTimeSeconds": {"max_wait_time_seconds": 60},
    "retentionSeconds": {"retention_enabled": True, "retention_seconds": 60},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("by", ["a pop", "the sweep"])
async def test_what_expires_becomes_a_dead_letter_once_with_its_reason_and_payload(
    broker: Broker, database_clock: DatabaseClock, sql: Session, option: str, by: str
) -> None:
    await broker.configure("q", dead_letter_queue=True, encryption_enabled=by == "a pop", **OPTIONS[option])
    await broker.push("q", {"n": 1, "text": "ä\\u00e4 " * 100}, None, "x", partition="p", sub="producer")
    await broker.pop("q", group="g", batch=1, auto_ack=True)  # has consumed the first
    (message,) = (await broker.pop("q", group="g", batch=1)).messages  # and has lost the lease of the second
    await database_clock.advance(301)
    await broker.push("q", "young", partition="p")

    if by == "a pop":
        assert (await broker.pop("q", group="g")).data == ["young"]
    else:
        assert await sweep(broker) == 3
    found = await letters(broker)

    assert data(found) == [None, "x"]
    assert {letter.error for letter in found} == {f"Expired: {option} of 60 s is over"}
    assert {(letter.group, letter.partition) for letter in found} == {("g", "p")}
    assert str(found[0].message_id) == message.id
    assert read_line(found[0].line, message.id[:24]).producer_sub == "producer"
    assert await sweep(broker) == (3 if by == "a pop" else 0)
    assert await stored(sql) == 1
    assert len(await letters(broker)) == 2
    assert await sql.fetchval("SELECT count(*) FROM queen.expired_ranges") == 0


async def test_without_being_asked_nothing_becomes_a_dead_letter(
    broker: Broker, database_clock: DatabaseClock, sql: Session
) -> None:
    await broker.configure("q", **TTL)
    await broker.push("q", 1)
    await database_clock.advance(61)
    assert not await broker.pop("q")
    await broker.push("q", 2)
    await database_clock.advance(61)

    assert await sweep(broker) == 2
    assert await letters(broker) == []
    assert await sql.fetchval("SELECT count(*) FROM queen.expired_ranges") == 0


async def test_what_no_group_ever_looked_at_is_missed_by_the_consumers_without_one(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    await broker.configure("q", dead_letter_queue=True, **TTL)
    await broker.push("q", 1, 2)
    await database_clock.advance(61)

    assert await sweep(broker) == 2
    assert [letter.group for letter in await letters(broker)] == [QUEUE_MODE] * 2
    await broker.push("q", 3)
    assert (await broker.pop("q")).data == [3]


async def test_every_group_that_missed_a_message_has_a_dead_letter_of_its_own(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    await broker.configure("q", dead_letter_queue=True, **TTL)
    for group in ("none", "half", "all"):
        assert not await broker.pop("q", group=group)
    for at in range(4):
        await broker.push("q", at)
    await broker.pop("q", group="half", batch=2, auto_ack=True)
    await broker.drain("q", group="all")
    await database_clock.advance(61)

    assert await sweep(broker) == 4
    assert data(await letters(broker, group="none")) == [0, 1, 2, 3]
    assert data(await letters(broker, group="half")) == [2, 3]
    assert await letters(broker, group="all") == []


async def test_what_is_from_before_the_start_of_a_group_is_not_missed_by_it(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    await broker.configure("q", dead_letter_queue=True, **TTL)
    await broker.push("q", "before")
    await database_clock.advance(5)
    assert not await broker.pop("q", group="g", start=StartFrom(StartMode.NEW))
    await broker.push("q", "after")
    await sql_start_again(broker)
    await database_clock.advance(61)

    assert not await broker.pop("q", group="g")
    await sweep(broker)

    assert data(await letters(broker)) == ["after"]


async def sql_start_again(broker: Broker) -> None:
    """The group's cursor stands before its start, as if it had just been given one by an older server."""

    async def move(connection: Any) -> None:
        for bucket in range(broker.engine.store.buckets):
            await connection.execute(
                "UPDATE queen.cursors SET committed = 0, ready_at = clock_timestamp() WHERE bucket = $1", bucket
            )

    await broker.engine.store._bridge.run(move)


async def test_deleted_and_hand_made_dead_letters_are_not_made_again(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    await broker.configure("q", dead_letter_queue=True, retry_limit=0, **TTL)
    pushed = await broker.push("q", "deleted", "set aside", "expired")
    popped = await broker.pop("q")
    await broker.ack([popped[1]], AckStatus.DLQ, error="by hand")
    await broker.engine.admin.erase(pushed[0].partition_id, pushed[0].transaction_id)
    await database_clock.advance(301)

    assert not await broker.pop("q")
    found = await letters(broker)

    assert data(found) == ["set aside", "expired"]
    assert [letter.error for letter in found] == ["by hand", "Expired: ttl of 60 s is over"]


async def test_a_large_backlog_expires_in_steps_and_a_pop_does_not_wait_for_it(
    broker: Broker, database_clock: DatabaseClock, sql: Session
) -> None:
    await broker.configure("q", dead_letter_queue=True, **TTL)
    for _ in range(3):
        await broker.push("q", *range(700))
    assert await broker.pop("q", batch=1)
    await database_clock.advance(301)
    await broker.push("q", "young")

    assert (await broker.pop("q")).data == ["young"]
    await all_buried(broker)
    assert await sweep(broker) == 2100
    assert await stored(sql) == 1
    total, _ = await broker.engine.dead_letters(queue="q", limit=1)
    assert total == 2100


async def test_what_expired_under_a_key_that_is_missing_waits_for_it_and_holds_up_nothing_else(
    broker: Broker, open_broker: OpenBroker, database_clock: DatabaseClock, sql: Session
) -> None:
    await broker.configure("q", dead_letter_queue=True, encryption_enabled=True, **TTL)
    await broker.configure("plain", dead_letter_queue=True, **TTL)
    for name in ("q", "plain"):
        await broker.push(name, 1)
    await database_clock.advance(61)

    async with open_broker(encryption_key=None) as keyless:
        for name in ("q", "plain"):
            await sweep(keyless, name)
        assert await sql.fetchval("SELECT count(*) FROM queen.dead_letters") == 1
    assert await stored(sql) == 1
    assert await sweep(broker) == 1

    assert data(await letters(broker)) == [1]


async def test_a_pop_that_passes_what_expired_has_it_buried_by_itself(
    broker: Broker, database_clock: DatabaseClock, sql: Session
) -> None:
    await broker.configure("q", dead_letter_queue=True, **TTL)
    await broker.push("q", 1, 2)
    await database_clock.advance(61)

    assert not await broker.pop("q")

    await sql.wait_for("SELECT count(*) = 2 FROM queen.dead_letters")


async def test_two_workers_bury_everything_once(
    broker: Broker, other: Broker, database_clock: DatabaseClock, sql: Session
) -> None:
    await broker.configure("q", dead_letter_queue=True, **TTL)
    await broker.engine.push([broker.message(queue="q", partition=str(at % 30)) for at in range(600)], None)
    await database_clock.advance(61)
    async with trio.open_nursery() as both:
        for via in (broker, other):
            both.start_soon(sweep, via)
            both.start_soon(via.pop, "q")
    await all_buried(broker)

    assert await sql.fetchval("SELECT count(*) FROM queen.dead_letters") == 600
    total, _ = await broker.engine.dead_letters(queue="q", limit=1)
    assert total == 600


@pytest.mark.parametrize("seed", range(6))
async def test_every_message_is_acknowledged_or_a_dead_letter_or_still_to_come_and_one_of_them_once(
    broker: Broker, other: Broker, database_clock: DatabaseClock, seed: int
) -> None:
    """Whatever is pushed, popped, acknowledged, failed, swept and waited for, in whatever order."""
    chance = Random(seed)
    groups, names = ("g", "h"), ("a", "b", "c")
    await broker.configure("q", dead_letter_queue=True, lease_seconds=30, retry_limit=1, **TTL)
    for group in groups:
        assert not await broker.pop("q", group=group)
    pushed: list[int] = []
    acknowledged: dict[str, list[int]] = {group: [] for group in groups}
    held: list[tuple[str, Popped]] = []

    async def push(via: Broker) -> None:
        values = list(range(len(pushed), len(pushed) + chance.randint(1, 5)))
        pushed.extend(values)
        await via.push("q", *values, partition=chance.choice(names))

    async def pop(via: Broker) -> None:
        group = chance.choice(groups)
        popped = await via.pop("q", group=group, batch=chance.randint(1, 6), partitions=chance.randint(1, 3))
        if popped:
            held.append((group, popped))

    async def settle(via: Broker) -> None:
        if held:
            group, popped = held.pop(chance.randrange(len(held)))
            status = chance.choice([AckStatus.COMPLETED, AckStatus.COMPLETED, AckStatus.FAILED, AckStatus.RETRY])
            verdicts = await via.ack(popped.messages, status, lease=popped.lease, group=group)
            if status is AckStatus.COMPLETED:
                done = zip(popped, verdicts, strict=True)
                acknowledged[group] += [message.data for message, verdict in done if verdict.success]

    async def wait(via: Broker) -> None:
        await database_clock.advance(chance.choice([5, 20, 40]))

    async def clean(via: Broker) -> None:
        await sweep(via)

    for _ in range(120):
        await chance.choice([push, push, pop, pop, pop, settle, settle, wait, clean])(chance.choice([broker, other]))

    await database_clock.advance(30)  # what is leased comes again
    for group in groups:
        to_come = await broker.drain("q", group=group, partitions=3)
        dead = data(await letters(broker, group=group))
        assert sorted(acknowledged[group] + dead + to_come) == pushed


# -- whom a sweep looks at --------------------------------------------------------------------------------------------


async def test_a_sweep_looks_at_a_queue_when_something_in_it_may_be_too_old_and_not_before(
    broker: Broker, database_clock: DatabaseClock, sql: Session
) -> None:
    waiting = "SELECT count(*) FROM queen.queue_sweeps WHERE due_at > clock_timestamp()"
    buckets = broker.engine.store.buckets
    await broker.configure("plain")
    await broker.configure("q", **TTL)
    assert await sql.fetchval("SELECT count(*) FROM queen.queue_sweeps") == buckets

    async def due() -> list[str]:
        return [queue.name for queue in await broker.engine.store.expiry.due()]

    assert await due() == []
    assert await sql.fetchval(waiting) == buckets
    await database_clock.advance(30)
    await broker.push("q", 1)
    await database_clock.advance(31)
    assert await due() == []
    await database_clock.advance(30)
    assert await due() == ["q"]
    assert await due() == ["q"]  # until it has been done
    assert await sweep(broker) == 1
    assert await due() == []
    assert await sql.fetchval(waiting) == buckets


async def test_what_configure_asks_for_is_looked_at_by_the_next_sweep(
    broker: Broker, database_clock: DatabaseClock, sql: Session
) -> None:
    await broker.configure("q", ttl_seconds=100_000, ttl_enforced=True)
    await broker.push("q", 1)
    await database_clock.advance(90)
    assert await broker.engine.store.expiry.due() == []

    await broker.configure("q", **TTL)
    assert [queue.name for queue in await broker.engine.store.expiry.due()] == ["q"]
    await broker.configure("q")
    assert await broker.engine.store.expiry.due() == []
    assert await sql.fetchval("SELECT count(*) FROM queen.queue_sweeps") == 0
    await broker.configure("q", **TTL)
    await broker.engine.delete_queue("q")
    assert await sql.fetchval("SELECT count(*) FROM queen.queue_sweeps") == 0


async def test_more_queues_than_one_sweep_looks_at_are_looked_at_by_the_next(
    broker: Broker, database_clock: DatabaseClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("queen.storage.expiry.DUE_QUEUES", 2)
    for at in range(5):
        await broker.configure(f"q{at}", **TTL)
        await broker.push(f"q{at}", 1)
    await database_clock.advance(61)

    seen: set[str] = set()
    for _ in range(3):
        seen.update(queue.name for queue in await broker.engine.store.expiry.due())

    assert seen == {"q0", "q1", "q2", "q3", "q4"}
