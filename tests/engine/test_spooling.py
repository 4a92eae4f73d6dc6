"""Pushes while PostgreSQL is away or push maintenance is on: kept, answered, and stored in their turn, once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import trio

from queen.config.settings import Settings
from queen.engine.engine import open_engine
from queen.engine.spooling import TURN_SECONDS
from queen.errors import EncryptionUnavailable, Overloaded, SpoolFull, StartupError, StorageUnavailable
from queen.model.message import AckStatus, Buffered, PushResult
from queen.storage.pulse import Pulse
from queen.storage.pushes import Flush

if TYPE_CHECKING:
    from tests.conftest import Broker, OpenBroker, Outage, Session


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    """Those of a worker of a server with a spool."""
    return msgspec.structs.replace(settings, spool_dir=tmp_path / "spool", spool_interval_seconds=0.01)


async def push(
    broker: Broker,
    queue: str,
    *values: Any,
    partition: str = "Default",
    ids: Sequence[str | None] | None = None,
    sub: str | None = None,
) -> list[PushResult] | Buffered:
    texts: Sequence[str | None] = ids or [None] * len(values)
    messages = [
        broker.message(queue=queue, partition=partition, payload=msgspec.json.encode(value), transaction_id=text)
        for value, text in zip(values, texts, strict=True)
    ]
    return await broker.engine.push(messages, sub)


async def keep(broker: Broker, queue: str, *values: Any, **others: Any) -> list[str | None]:
    """Push what has to go to the spool. Returns the transaction ids."""
    results = await push(broker, queue, *values, **others)
    assert isinstance(results, Buffered)
    return results.transaction_ids


async def drained(*brokers: Broker) -> None:
    await brokers[0].wait_until(lambda: not any(broker.engine.spooling.active for broker in brokers), 20)


async def begin_maintenance(*brokers: Broker) -> None:
    await brokers[0].engine.pause_pushes(paused=True)
    await brokers[0].wait_until(lambda: all(broker.engine.spooling.maintenance for broker in brokers), 1)


async def end_maintenance(*brokers: Broker) -> None:
    await brokers[0].engine.pause_pushes(paused=False)
    await drained(*brokers)


# -- an outage ----------------------------------------------------------------------------------------------------


@pytest.mark.buckets
async def test_a_push_while_postgresql_is_away_is_kept_and_delivered_when_it_is_back(
    broker: Broker, outage: Outage
) -> None:
    await broker.push("q", 1)

    await outage.begin()
    for number in (2, 3):
        await keep(broker, "q", number)
        await keep(broker, "q", number, partition="other")
    await outage.end()
    await drained(broker)

    assert await broker.drain("q", partition="Default") == [1, 2, 3]
    assert await broker.drain("q", partition="other") == [2, 3]
    assert not isinstance(await push(broker, "q", 4), Buffered)


async def test_a_later_push_through_another_worker_does_not_overtake(
    broker: Broker, other: Broker, outage: Outage
) -> None:
    await other.push("q", 0)
    await outage.begin()
    await keep(broker, "q", *range(1, 500))
    await outage.end()
    await other.wait_until(lambda: not other.engine.store.away)

    await push(other, "q", 500)  # to the spool or, if that was quick, after it
    await drained(broker, other)

    assert await broker.drain("q") == list(range(501))


async def test_what_a_worker_spooled_is_drained_by_another_when_it_is_gone(
    open_broker: OpenBroker, broker: Broker, outage: Outage
) -> None:
    await outage.begin()
    async with open_broker() as gone:
        ids = await keep(gone, "q", 1, 2)
    await outage.end()
    await drained(broker)

    popped = await broker.pop("q")
    assert popped.data == [1, 2]
    assert [got.transaction_id for got in popped] == ids


async def test_a_worker_starts_while_postgresql_is_away(open_broker: OpenBroker, outage: Outage) -> None:
    async with open_broker() as before:
        await before.push("q", 1)
    await outage.begin()

    async with open_broker() as broker:
        await keep(broker, "q", 2)
        with pytest.raises(StorageUnavailable):
            await broker.pop("q")
        await outage.end()
        await drained(broker)

        assert await broker.drain("q") == [1, 2]


async def test_the_same_push_is_stored_once_whether_it_went_to_the_spool_or_not(broker: Broker, outage: Outage) -> None:
    ids = ["order-1", "0190b5a4-7c3e-7000-8000-000000000001"]
    await push(broker, "q", "a", "b", ids=ids)

    await outage.begin()
    again = await keep(broker, "q", "a", "b", ids=ids)
    new = await keep(broker, "q", "c", "c", ids=["order-2", "order-2"])
    await keep(broker, "q", "c", ids=["order-2"])
    minted = await keep(broker, "q", "d")
    await outage.end()
    await drained(broker)
    last = await broker.push("q", ids=[*ids, *new[:1], *minted])

    assert again == ids
    assert all(result.duplicate for result in last)
    assert await broker.drain("q") == ["a", "b", "c", "d"]


async def test_a_pop_that_waits_outlasts_an_outage(broker: Broker, outage: Outage) -> None:
    await broker.configure("q")
    found: list[Any] = []

    async def consume() -> None:
        found.extend((await broker.pop("q", wait=60)).data)

    with trio.fail_after(20):
        async with trio.open_nursery() as consumers:
            consumers.start_soon(consume)
            await broker.wait_parked(1)
            await outage.begin()
            await keep(broker, "q", 1)
            with pytest.raises(StorageUnavailable):
                await broker.pop("q")
            with pytest.raises(StorageUnavailable):
                await broker.pop("q", wait=0.05)
            await outage.end()

    assert found == [1]


async def test_an_ack_while_postgresql_is_away_is_refused_and_may_be_repeated(broker: Broker, outage: Outage) -> None:
    await broker.push("q", 1, 2)
    popped = await broker.pop("q")
    await outage.begin()
    await keep(broker, "q", 3)

    with pytest.raises(StorageUnavailable):
        await broker.ack(popped.messages, lease=popped.lease)
    await outage.end()
    await drained(broker)

    assert all(result.success for result in await broker.ack(popped.messages, lease=popped.lease))
    assert await broker.drain("q") == [3]


async def test_a_backend_that_is_ended_costs_no_push(broker: Broker, sql: Session) -> None:
    """PostgreSQL has not committed what it ends instead of answering: it is done again, not spooled."""
    for number in range(20):
        await sql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        assert not isinstance(await push(broker, "q", number), Buffered)

    assert await broker.drain("q") == list(range(20))


async def test_connections_that_are_cut_one_after_the_other_do_not_mean_that_postgresql_is_away(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    ask = Pulse._ask

    async def cut(pulse: Pulse, seconds: float) -> bool:
        asked.append(len(asked) >= 3 and await ask(pulse, seconds))
        return asked[-1]

    monkeypatch.setattr(Pulse, "_ask", cut)
    broker.engine.store._bridge.suspicion.set()
    await broker.wait_until(lambda: len(asked) >= 4)

    assert asked[:4] == [False, False, False, True]
    assert not broker.engine.store.away


async def test_work_that_only_waits_for_a_lock_does_not_mean_that_postgresql_is_away(
    broker: Broker, sql: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    await broker.push("q", 1)
    asked = 0
    ask = Pulse._ask

    async def count(pulse: Pulse, seconds: float) -> bool:
        nonlocal asked
        asked += 1
        return await ask(pulse, seconds)

    monkeypatch.setattr(Pulse, "_ask", count)
    await sql.execute("BEGIN")
    await sql.execute("LOCK TABLE queen.segments IN ACCESS EXCLUSIVE MODE")
    async with trio.open_nursery() as producers:
        producers.start_soon(push, broker, "q", 2)
        await broker.wait_until(lambda: asked >= 2)
        assert not broker.engine.store.away
        await sql.execute("COMMIT")

    assert await broker.drain("q") == [1, 2]


# -- the outcome is unknown ---------------------------------------------------------------------------------------


def cut(monkeypatch: pytest.MonkeyPatch, *, before: bool = False, seconds: float | None = None) -> list[int]:
    """Break the connection of the next push: before it is sent, or after ``seconds``, or when it is committed.

    Returns a list that will hold the process id of its backend.
    """
    store = Flush.store_at_once
    pids: list[int] = []

    async def store_and_break(flush: Flush, connection: Any, *, may_create: bool) -> Any:
        monkeypatch.setattr(Flush, "store_at_once", store)
        flush.backend = connection.backend
        pids.append(connection.backend.pid)
        if not before:
            work = asyncio.ensure_future(store(flush, connection, may_create=may_create))
            await asyncio.wait([work], timeout=seconds)
            if seconds is None:
                assert not isinstance(work.result(), str)  # it was stored
        connection.terminate()
        if not before:
            await asyncio.wait([work])
            work.exception()
        raise ConnectionResetError("the answer is lost")

    monkeypatch.setattr(Flush, "store_at_once", store_and_break)
    return pids


@pytest.mark.parametrize("before", [False, True], ids=["committed", "not sent"])
@pytest.mark.parametrize(
    "ids", [[None, None], ["a", None], ["a", "b"]], ids=["named by PostgreSQL", "mixed", "named by the producer"]
)
async def test_a_push_whose_answer_is_lost_is_stored_once(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, before: bool, ids: list[str | None]
) -> None:
    await broker.push("q", 0)
    cut(monkeypatch, before=before)

    told = await keep(broker, "q", 1, 2, ids=ids)
    await drained(broker)
    await broker.push("q", 3)

    popped = await broker.pop("q")
    assert popped.data == [0, 1, 2, 3]
    for text, got in zip(told, popped.messages[1:3], strict=True):
        assert text in (None, got.transaction_id)


async def test_a_push_that_a_backend_is_still_at_is_stored_once(
    broker: Broker, sql: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for a lock when its connection breaks, and would go on when it gets it."""
    await broker.push("q", 0)
    pids = cut(monkeypatch, seconds=0.2)
    await sql.execute("BEGIN")
    await sql.execute("LOCK TABLE queen.count_changes IN ACCESS EXCLUSIVE MODE")

    await keep(broker, "q", 1)
    await sql.wait_for("SELECT count(*) = 1 FROM pg_locks WHERE NOT granted AND pid <> $1", *pids)  # the drain
    await sql.execute("COMMIT")
    await drained(broker)

    assert await broker.drain("q") == [0, 1]


# -- maintenance --------------------------------------------------------------------------------------------------


async def test_in_maintenance_pushes_are_kept_while_pops_and_acks_go_on(broker: Broker, other: Broker) -> None:
    await broker.push("q", 1, 2)
    await begin_maintenance(broker, other)

    await keep(broker, "q", 3)
    await keep(other, "q", 4)
    popped = await broker.pop("q")
    acked = await other.ack(popped.messages, lease=popped.lease)

    assert popped.data == [1, 2]
    assert all(result.success for result in acked)
    assert not await broker.pop("q")
    await end_maintenance(broker, other)
    assert await broker.drain("q") == [3, 4]


async def test_maintenance_is_kept_over_a_restart(open_broker: OpenBroker) -> None:
    async with open_broker() as broker:
        await begin_maintenance(broker)
        await keep(broker, "q", 1)

    async with open_broker() as broker:
        await keep(broker, "q", 2)
        assert broker.engine.spooling.figures.pending_messages == 2
        await end_maintenance(broker)
        assert await broker.drain("q") == [1, 2]


async def test_what_a_producer_said_is_kept_through_the_spool(broker: Broker) -> None:
    trace = "6b1f4e0a-3c57-4f0e-9a43-0f7a1c2d3e4f"
    await begin_maintenance(broker)
    message = broker.message(queue="q", partition="p", payload=b'{"a":[1,null,"\\u00e9"]}', trace_id=trace)
    await broker.engine.push([message], "alice")
    await end_maintenance(broker)

    (got,) = await broker.pop("q")

    assert (got.data, got.partition, got.trace_id, got.producer_sub) == ({"a": [1, None, "é"]}, "p", trace, "alice")


async def test_pushes_go_on_in_order_while_the_spool_drains(broker: Broker, other: Broker) -> None:
    """Producers that never pause, through two workers: the drain ends, and nobody overtakes."""
    await begin_maintenance(broker, other)
    ends: list[int] = []

    async def produce(partition: str) -> None:
        count = 0
        while not ends or count < ends[0] + 20:
            await push((broker, other)[count % 2], "q", count, partition=partition)
            count += 1
            if not ends and not broker.engine.spooling.active and not broker.engine.spooling.maintenance:
                ends.append(count)
        produced[partition] = count

    produced: dict[str, int] = {}
    with trio.fail_after(60):
        async with trio.open_nursery() as producers:
            for partition in ("a", "b", "c", "d"):
                producers.start_soon(produce, partition)
            await broker.wait_until(lambda: broker.engine.spooling.figures.pending_messages > 100, 20)
            await broker.engine.pause_pushes(paused=False)

    await drained(broker, other)
    for partition, count in produced.items():
        assert await broker.drain("q", partition=partition) == list(range(count))


async def test_messages_of_a_drain_that_died_before_it_removed_them_are_stored_once(broker: Broker) -> None:
    await begin_maintenance(broker)
    await keep(broker, "q", 1, 2)
    await keep(broker, "r", 3)
    spooling = broker.engine.spooling
    assert spooling.spool is not None
    portion = await spooling.spool.read(10, 1_000_000)
    await broker.engine._write_pushes([entry.request for entry in portion.entries if entry.request is not None])

    await end_maintenance(broker)

    assert await broker.drain("q") == [1, 2]
    assert await broker.drain("r") == [3]


# -- transactions -------------------------------------------------------------------------------------------------


async def test_a_transaction_does_not_overtake_what_is_spooled(broker: Broker) -> None:
    await broker.push("in", 1)
    popped = await broker.pop("in")
    (ack,) = broker.acks_of(popped.messages, AckStatus.COMPLETED, lease=popped.lease)
    await begin_maintenance(broker)
    await keep(broker, "out", 1)

    with pytest.raises(Overloaded):
        await broker.engine.transact([[broker.message(queue="out", payload=b"2")], ack], [], None)
    elsewhere = await broker.engine.transact([[broker.message(queue="elsewhere", payload=b"2")]], [], None)
    await broker.engine.pause_pushes(paused=False)
    with trio.fail_after(TURN_SECONDS):
        result = await broker.engine.transact([[broker.message(queue="out", payload=b"2")], ack], [], None)

    assert elsewhere.error is None
    assert result.error is None
    assert await broker.drain("out") == [1, 2]
    assert await broker.drain("in") == []


# -- what cannot be stored ----------------------------------------------------------------------------------------


async def test_a_full_spool_refuses_the_whole_push_and_drops_nothing(open_broker: OpenBroker) -> None:
    async with open_broker(spool_max_bytes=20_000) as broker:
        await begin_maintenance(broker)
        kept = 14
        for _ in range(kept):
            await keep(broker, "q", "x" * 1000)
        with pytest.raises(SpoolFull):
            await push(broker, "q", "x" * 1000)
        with pytest.raises(SpoolFull):
            await push(broker, "q", "x", "x" * 20_000)
        assert broker.engine.spooling.figures.pending_messages == kept

        await end_maintenance(broker)

        assert len(await broker.drain("q")) == kept


async def test_messages_of_a_queue_that_is_deleted_meanwhile_are_set_aside(broker: Broker) -> None:
    await broker.push("q", 1)
    await begin_maintenance(broker)
    message = broker.message
    await broker.engine.push([message(queue="q", payload=b"2"), message(queue="r", payload=b"3")], None)
    assert await broker.engine.delete_queue("q")
    await keep(broker, "q", 4)

    await end_maintenance(broker)

    assert await broker.drain("q") == [4]
    assert await broker.drain("r") == [3]
    assert broker.engine.spooling.figures.quarantined_messages == 1


async def test_what_can_never_be_stored_does_not_hold_up_the_rest(
    broker: Broker, open_broker: OpenBroker, outage: Outage
) -> None:
    """A queue turns out to be encrypted, and the worker that spools and drains has no key."""
    await broker.configure("secret", encryption_enabled=True)
    async with open_broker(encryption_key=None, spool_dir=Path(str(broker.engine._settings.spool_dir) + "-2")) as bare:
        await bare.push("q", 0)
        await outage.begin()
        await keep(bare, "q", 1)
        await keep(bare, "secret", 2)
        await keep(bare, "q", 3)
        await outage.end()
        await drained(bare)

        figures = bare.engine.spooling.figures
        assert await bare.drain("q") == [0, 1, 3]
        assert (figures.quarantined_messages, figures.pending_messages) == (1, 0)
        await begin_maintenance(bare)
        with pytest.raises(EncryptionUnavailable):
            await push(bare, "secret", 4)


async def test_nothing_lies_readable_on_the_disk_where_there_is_a_key(broker: Broker, settings: Settings) -> None:
    await begin_maintenance(broker)
    await keep(broker, "q", "a most secret thing")
    assert settings.spool_dir is not None

    held = b"".join(path.read_bytes() for path in settings.spool_dir.iterdir())

    assert b"a most secret thing" not in held
    await end_maintenance(broker)
    assert await broker.drain("q") == ["a most secret thing"]


async def test_without_a_spool_a_push_is_refused(open_broker: OpenBroker, outage: Outage) -> None:
    async with open_broker(spool_dir=None) as broker:
        await broker.engine.pause_pushes(paused=True)
        with pytest.raises(StorageUnavailable):
            await push(broker, "q", 1)
        await broker.engine.pause_pushes(paused=False)
        await outage.begin()
        with pytest.raises(StorageUnavailable):
            await push(broker, "q", 1)


async def test_what_was_accepted_for_one_database_is_not_stored_in_another(
    broker: Broker, open_broker: OpenBroker, settings: Settings, sql: Session
) -> None:
    """Databases are told apart by when they were initialised."""
    await begin_maintenance(broker)
    await keep(broker, "q", 1)
    await sql.execute("UPDATE queen.meta SET initialised_at = initialised_at + interval '1 day'")

    with pytest.raises(StartupError, match="another database"):
        async with open_engine(settings):
            pass

    await sql.execute("UPDATE queen.meta SET initialised_at = initialised_at - interval '1 day'")
    await end_maintenance(broker)
    assert await broker.drain("q") == [1]
    await sql.execute("UPDATE queen.meta SET initialised_at = initialised_at + interval '1 day'")
    async with open_broker() as stranger:  # an empty spool is anybody's
        await stranger.push("q", 2)
