"""A transaction id names one message of a partition for as long as that message is retained."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

import pytest
import trio

from queen.model.message import PushResult
from queen.storage.ids import uuid7_texts
from queen.storage.pushes import Flush, Woken

if TYPE_CHECKING:
    from tests.conftest import Broker, DatabaseClock, OpenBroker, Session

HOUR_MS: Final = 3_600_000


def uuid7_at(offset_ms: int) -> str:
    """A UUIDv7 of a clock that is ahead of ours by ``offset_ms``."""
    whole = uuid4().int & ~(0xFFFF_FFFF_FFFF << 80) & ~(0xF << 76) | 7 << 76
    return str(UUID(int=whole | (time.time_ns() // 1_000_000 + offset_ms) << 80))


KINDS: Final[dict[str, Callable[[], str]]] = {
    "uuid7 of now": lambda: uuid7_texts(1)[0],
    "uuid7 of 20 s ago": lambda: uuid7_at(-20_000),
    "uuid7 of a week ago": lambda: uuid7_at(-7 * 24 * HOUR_MS),
    "uuid7 of tomorrow": lambda: uuid7_at(24 * HOUR_MS),
    "uuid7 of the year 10889": lambda: f"ffffffff-ffff-7{uuid4().hex[:3]}-bfff-{uuid4().hex[:12]}",
    "uuid7 of 1970": lambda: f"00000000-0000-7{uuid4().hex[:3]}-8000-{uuid4().hex[:12]}",
    "uuid4": lambda: str(uuid4()),
    "upper-case uuid7": lambda: uuid7_at(0).upper(),
    "uuid7 without hyphens": lambda: uuid7_at(0).replace("-", ""),
    "order number": lambda: f"order-{uuid4().hex[:8]}",
    "one space": lambda: " ",
    "quotes and controls": lambda: f'"{uuid4().hex[:8]}"\\\n\t\0',
    "unicode": lambda: f"заказ ☃ 😀 {uuid4().hex[:8]}",
    "63 bytes": lambda: uuid4().hex + "x" * 31,
    "64 bytes": lambda: uuid4().hex + "x" * 32,
    "very long": lambda: uuid4().hex + "y" * 100_000,
}


def fresh(results: list[PushResult]) -> list[bool]:
    return [not result.duplicate for result in results]


def ids_of(results: list[PushResult]) -> list[str]:
    return [result.message_id for result in results]


@pytest.mark.buckets
async def test_a_repeated_push_finds_the_first_message(broker: Broker, other: Broker) -> None:
    for kind, make in KINDS.items():
        ids = ["a", make(), KINDS["uuid4"](), KINDS["uuid7 of now"]()]
        first = await broker.push(kind, ids=ids)

        again = await broker.push(kind, ids=ids)
        elsewhere = await other.push(kind, ids=ids)

        assert fresh(first) == [True] * 4, kind
        assert fresh(again) == fresh(elsewhere) == [False] * 4, kind
        assert ids_of(again) == ids_of(elsewhere) == ids_of(first), kind
        popped = await broker.pop(kind)
        assert popped.data == [got.transaction_id for got in popped] == ids, kind


async def test_a_message_is_acked_by_its_id(broker: Broker) -> None:
    for kind, make in KINDS.items():
        await broker.push(kind, ids=[make(), "b"])
        popped = await broker.pop(kind)

        results = await broker.ack(popped.messages, lease=popped.lease)

        assert [result.success for result in results] == [True, True], kind
        assert results[1].lease_released, kind
        assert not await broker.pop(kind), kind


async def test_an_id_repeated_in_one_request_is_stored_once(broker: Broker) -> None:
    for kind, make in KINDS.items():
        text = make()

        results = await broker.push(kind, 1, 2, 3, 4, ids=[text, "between", text, text])

        assert fresh(results) == [True, True, False, False], kind
        assert {results[at].message_id for at in (0, 2, 3)} == {results[0].message_id}, kind
        assert (await broker.pop(kind)).data == [1, 2], kind


@pytest.mark.buckets
async def test_concurrent_requests_with_one_id_store_it_once(broker: Broker, other: Broker) -> None:
    for kind, make in KINDS.items():
        text = make()
        results: list[PushResult] = []

        async def produce(via: Broker, at: int, kind: str, text: str, results: list[PushResult]) -> None:
            results.extend(await via.push(kind, at, ids=[text]))

        async with trio.open_nursery() as producers:
            for at in range(8):
                producers.start_soon(produce, broker, at, kind, text, results)
                producers.start_soon(produce, other, at, kind, text, results)

        assert sorted(fresh(results)) == [False] * 15 + [True], kind
        assert len({result.message_id for result in results}) == 1, kind
        assert len(await broker.pop(kind)) == 1, kind


async def test_a_request_of_old_and_new_ids_of_every_kind_stores_the_new_ones(broker: Broker) -> None:
    old = [make() for make in KINDS.values()]
    new = [make() for make in KINDS.values() if make() != " "]
    first = await broker.push("q", ids=old)
    mixed = [text for pair in zip(old, [*new, *[None] * (len(old) - len(new))], strict=True) for text in pair]

    results = await broker.push("q", *mixed, ids=mixed)

    assert fresh(results) == [False, True] * len(old)
    assert [result.message_id for result in results if result.duplicate] == ids_of(first)
    assert await broker.drain("q") == old + [text for text in mixed if text not in old]


async def test_messages_without_an_id_beside_repeated_ones_are_stored(broker: Broker) -> None:
    await broker.push("q", 1, ids=["a"])

    results = await broker.push("q", 2, 3, 4, ids=[None, "a", None])

    assert fresh(results) == [True, False, True]
    assert await broker.drain("q") == [1, 2, 4]


async def test_a_minted_id_sent_again_as_ones_own_is_a_duplicate(broker: Broker) -> None:
    first = await broker.push("q", 1, 2, 3)

    again = await broker.push("q", 4, ids=[first[1].transaction_id])

    assert fresh(again) == [False]
    assert ids_of(again) == [first[1].message_id]
    assert again[0].transaction_id == first[1].transaction_id


@pytest.mark.buckets
async def test_one_id_in_two_partitions_names_two_messages(broker: Broker) -> None:
    for kind in ("uuid7 of now", "uuid4"):
        text = KINDS[kind]()
        for partition in ("a", "b"):
            assert fresh(await broker.push("q", 1, partition=partition, ids=[text])) == [True]
            assert fresh(await broker.push("q", 1, partition=partition, ids=[text])) == [False]


async def test_an_id_is_remembered_after_its_message_was_consumed(broker: Broker) -> None:
    ids = [make() for make in KINDS.values()]
    await broker.push("q", ids=ids)
    await broker.drain("q")

    assert fresh(await broker.push("q", ids=ids)) == [False] * len(ids)
    assert not await broker.pop("q")


async def test_an_id_is_free_again_when_retention_has_removed_its_message(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    queue = await broker.configure("q", retention_enabled=True, retention_seconds=60)
    ids = [make() for make in KINDS.values()]
    await broker.push("q", ids=ids)
    await database_clock.advance(61)
    assert await broker.engine.store.expire(queue, 100) == len(ids)

    again = await broker.push("q", ids=ids)
    repeated = await broker.push("q", ids=ids)

    assert (fresh(again), fresh(repeated)) == ([True] * len(ids), [False] * len(ids))
    assert ids_of(again) == ids_of(repeated)
    assert (await broker.pop("q")).data == ids


async def test_a_retry_that_comes_when_its_uuid7_is_old_finds_the_first(
    broker: Broker, open_broker: OpenBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = [KINDS["uuid7 of now"](), KINDS["uuid7 of 20 s ago"]()]
    first = await broker.push("q", ids=near)

    later = SimpleNamespace(time_ns=lambda: time.time_ns() + 24 * HOUR_MS * 1_000_000)
    monkeypatch.setattr("queen.storage.pushes.time", later)
    again = await broker.push("q", *near, "new", ids=[*near, "new"])

    assert fresh(again) == [False, False, True]
    assert ids_of(again[:2]) == ids_of(first)


async def test_an_id_stored_under_a_wrong_clock_is_found_under_the_right_one(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = KINDS["uuid7 of now"]()
    with monkeypatch.context() as wrong:
        wrong.setattr("queen.storage.pushes.time", SimpleNamespace(time_ns=lambda: time.time_ns() - 10**12))
        first = await broker.push("q", 1, ids=[text])

    again = await broker.push("q", 2, 3, ids=[text, KINDS["uuid7 of now"]()])

    assert fresh(again) == [False, True]
    assert again[0].message_id == first[0].message_id
    popped = await broker.pop("q")
    assert [result.success for result in await broker.ack(popped.messages, lease=popped.lease)] == [True, True]


@pytest.mark.buckets
async def test_a_new_key_beside_a_repeated_uuid7_is_stored_once_even_where_far_ids_surround_now(
    broker: Broker, sql: Session
) -> None:
    """The far ids make the partition's range of keyed ids cover now; the repeated id is found by its segment."""
    await broker.push("q", ids=[uuid7_at(-HOUR_MS), uuid7_at(HOUR_MS)])
    near = KINDS["uuid7 of now"]()
    await broker.push("q", ids=[near])

    results = await broker.push("q", ids=[near, "new"])

    assert fresh(results) == [False, True]
    assert await sql.fetchval("SELECT sum(message_count) FROM queen.segments") == 4
    assert len(await broker.drain("q")) == 4


async def test_uuid7_ids_in_any_order_over_many_segments_are_all_found_again(broker: Broker) -> None:
    ids = [uuid7_at(offset) for offset in range(-25_000, 25_000, 500)]
    shuffled = ids[::3] + ids[1::3] + ids[2::3]
    first = [result for text in shuffled for result in await broker.push("q", ids=[text])]

    again = await broker.push("q", ids=shuffled)

    assert fresh(first) == [True] * len(ids)
    assert fresh(again) == [False] * len(ids)
    assert ids_of(again) == ids_of(first)


@pytest.mark.buckets
async def test_ids_repeated_across_partitions_and_buckets_in_one_request_are_sorted_out(broker: Broker) -> None:
    messages = [
        broker.message(queue="q", partition=str(at % 8), payload=b"%d" % at, transaction_id=text)
        for at, text in enumerate([make() for make in KINDS.values()] * 2)
    ]
    first = await broker.engine.push(messages, None)
    again = await broker.engine.push(messages, None)

    assert isinstance(first, list)
    assert isinstance(again, list)
    assert fresh(again) == [False] * len(messages)
    assert ids_of(again) == ids_of(first)
    assert len(await broker.drain("q", partitions=8)) == sum(fresh(first))


@pytest.mark.buckets
async def test_requests_of_one_moment_that_share_some_ids_store_each_of_them_once(
    broker: Broker, other: Broker
) -> None:
    pool = [uuid7_at(offset % 50) for offset in range(400)]
    results: dict[str, list[PushResult]] = {text: [] for text in pool}

    async def produce(via: Broker, ids: list[str]) -> None:
        for result in await via.push("q", *ids, ids=ids):
            results[result.transaction_id].append(result)

    for _ in range(3):
        async with trio.open_nursery() as producers:
            for at in range(20):
                ids = sorted({*pool[at::10], *pool[at // 2 :: 17]})
                producers.start_soon(produce, (broker, other)[at % 2], ids)

    for text, told in results.items():
        assert fresh(told).count(True) == 1, text
        assert len({result.message_id for result in told}) == 1, text
    assert sorted(await broker.drain("q")) == sorted(pool)


async def test_ids_that_lie_among_those_of_another_push_are_stored_without_a_transaction_of_several_statements(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [uuid7_at(0) for _ in range(600)]
    minted = await broker.push("q", *range(10))
    for start in (0, 1):
        await broker.push("q", *ids[start::3], ids=ids[start::3])
    transactions: list[str] = []
    monkeypatch.setattr("queen.storage.pushes.Pushes._store", lambda *_: transactions.append("one"))
    mixed = [*ids[2::3], ids[7], minted[3].message_id]

    results = await broker.push("q", *mixed, ids=mixed)

    assert fresh(results) == [True] * 200 + [False, False]
    assert results[-1].message_id == minted[3].message_id
    assert not transactions


async def test_a_few_ids_that_lie_among_those_of_others_are_stored_by_one_call(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [uuid7_at(0) for _ in range(300)]
    first = await broker.push("q", *ids[::3], ids=ids[::3])
    calls: list[object] = []
    take = Flush.take

    def count_and_take(flush: Flush, rows: Sequence[Any]) -> list[Woken] | str:
        calls.append(verdict := take(flush, rows))
        return verdict

    monkeypatch.setattr(Flush, "take", count_and_take)

    assert fresh(await broker.push("q", *ids[1:30:3], ids=ids[1:30:3])) == [True] * 10
    assert len(calls) == 1
    again = await broker.push("q", ids[2], ids[0], ids=[ids[2], ids[0]])
    assert fresh(again) == [True, False]
    assert again[1].message_id == first[0].message_id


async def test_what_cannot_be_told_in_a_moment_is_left_to_the_worker(sql: Session) -> None:
    """May a segment hold any of the ids of the first part?"""
    held = bytes(range(64))

    async def may_hold(stored: bytes, parts: list[int], *ids: bytes | None) -> bool:
        return bool(await sql.fetchval("SELECT queen.may_hold($1, 1, $2, $3)", stored, parts, list(ids)))

    absent = bytes(range(100, 148))
    assert await may_hold(held, [1], held[16:32])
    assert await may_hold(held, [2, 1], absent, absent + held[48:])
    assert await may_hold(held, [1], held[15:31])  # across two: perhaps it is another id's end
    assert not await may_hold(held, [1], absent)
    assert not await may_hold(held, [1, 2, 1], absent, held, None)
    assert await may_hold(bytes(range(100)) * 200, [1], bytes(range(16, 0, -1)) * 100)
