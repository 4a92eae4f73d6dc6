"""Storing messages: what a push answers, what is kept, and that it is all or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

import msgspec
import pytest
import trio

from queen.errors import EncryptionUnavailable

if TYPE_CHECKING:
    from tests.conftest import Broker, OpenBroker, Session

AWKWARD: Final[list[Any]] = [
    None,
    {},
    "",
    [],
    0,
    -1.5,
    True,
    {"a": {"b": [1, "two", None]}},
    'quote " backslash \\ newline \n tab \t NUL \0 slash /',
    "snowman ☃, astral 😀, combining é, right-to-left \u202e",
    [[[[[[]]]]]],
    {"": "", "id": "not the id", "transactionId": "not the transaction id"},
]


async def test_a_push_answers_in_order_with_growing_ids_and_a_pop_finds_them(broker: Broker) -> None:
    pushed = await broker.push("orders", *range(20))

    popped = await broker.pop("orders")

    assert popped.data == list(range(20))
    assert popped.ids == [result.message_id for result in pushed] == sorted(popped.ids)
    assert all(UUID(text).version == 7 for text in popped.ids)
    assert [got.transaction_id for got in popped] == [result.transaction_id for result in pushed]
    assert {result.partition_id for result in pushed} == {got.partition_id for got in popped}
    assert not any(result.duplicate for result in pushed)


async def test_ids_and_creation_times_grow_over_requests(broker: Broker) -> None:
    pushed = [result for at in range(10) for result in await broker.push("orders", at)]

    popped = await broker.pop("orders")

    assert popped.ids == [result.message_id for result in pushed] == sorted(popped.ids)
    times = [got.created_at for got in popped]
    assert times == sorted(times)


@pytest.mark.parametrize("given_ids", [False, True], ids=["minted ids", "given ids"])
async def test_every_json_value_comes_back_as_it_went(broker: Broker, given_ids: bool) -> None:
    await broker.push("odd", *AWKWARD, ids=[str(uuid4()) for _ in AWKWARD] if given_ids else None)

    assert (await broker.pop("odd")).data == AWKWARD


async def test_trace_ids_and_producers_stay_with_their_messages(broker: Broker) -> None:
    trace = str(uuid4())
    messages = [
        broker.message(queue="q", payload=b"1", trace_id=trace),
        broker.message(queue="q", payload=b"2"),
    ]

    async with trio.open_nursery() as producers:
        producers.start_soon(broker.engine.push, messages, "alice")
        producers.start_soon(broker.engine.push, messages, 'bob "the" builder')
        producers.start_soon(broker.engine.push, messages, None)

    popped = await broker.pop("q")
    assert [(got.data, got.trace_id) for got in popped] == [(1, trace), (2, None)] * 3
    by_sub: dict[str | None, list[Any]] = {}
    for got in popped:
        by_sub.setdefault(got.producer_sub, []).append(got.data)
    assert by_sub == {"alice": [1, 2], 'bob "the" builder': [1, 2], None: [1, 2]}


@pytest.mark.buckets
async def test_one_push_may_name_many_queues_and_partitions_and_keeps_the_order_in_each(broker: Broker) -> None:
    messages = [
        broker.message(queue=f"q{at % 2}", partition=f"p{at % 5}", payload=msgspec.json.encode(at)) for at in range(100)
    ]

    results = await broker.engine.push(messages, None)

    assert isinstance(results, list)
    for queue in range(2):
        for partition in range(5):
            popped = await broker.pop(f"q{queue}", partition=f"p{partition}")
            mine = [at for at in range(100) if at % 2 == queue and at % 5 == partition]
            assert popped.data == mine
            assert popped.ids == [results[at].message_id for at in mine]


async def test_ten_thousand_messages_go_in_one_push_and_come_in_one_pop(broker: Broker) -> None:
    pushed = await broker.push("load", *range(10_000))

    popped = await broker.pop("load", batch=10_000)

    assert popped.data == list(range(10_000))
    assert popped.ids == [result.message_id for result in pushed] == sorted(popped.ids)


async def test_a_payload_of_ten_megabytes_is_stored(broker: Broker) -> None:
    text = "x" * 10_000_000

    await broker.push("big", 1, text, 2)

    assert (await broker.pop("big")).data == [1, text, 2]


async def test_an_empty_push_stores_nothing(broker: Broker) -> None:
    assert await broker.engine.push([], None) == []


@pytest.mark.buckets
async def test_names_are_taken_as_they_are(broker: Broker) -> None:
    names = ["", " ", "a/b@c.d", "quote'\"\\", "ünïcödé ☃", "x" * 255, "%s $1 {}", "NULL"]

    for name in names:
        await broker.push(name, name, partition=name or "Default")

    for name in names:
        popped = await broker.pop(name)
        assert [(got.data, got.queue, got.partition) for got in popped] == [(name, name, name or "Default")]


async def test_a_push_to_an_unknown_queue_creates_it_with_labels_from_its_dotted_name(broker: Broker) -> None:
    await broker.push("shop.invoices.eu.north", 1)
    await broker.push("plain", 2)

    (dotted,) = await broker.engine.store.catalogue.labelled("shop", "invoices")
    (plain,) = await broker.engine.store.catalogue.labelled("", "")

    assert dotted.name == "shop.invoices.eu.north"
    assert plain.name == "plain"


@pytest.mark.buckets
async def test_requests_that_are_written_together_get_their_own_answers(broker: Broker) -> None:
    answers: dict[int, list[Any]] = {}

    async def produce(number: int) -> None:
        results = await broker.push("q", *[[number, at] for at in range(7)], partition=f"p{number % 3}")
        answers[number] = [result.message_id for result in results]

    async with trio.open_nursery() as producers:
        for number in range(40):
            producers.start_soon(produce, number)

    popped = await broker.pop("q", batch=1000, partitions=3)
    assert len(popped) == 280
    found: dict[int, list[str]] = {}
    for got in popped:
        assert got.data[1] == len(found.setdefault(got.data[0], []))
        found[got.data[0]].append(got.id)
    assert found == answers


@pytest.mark.buckets
async def test_a_push_is_stored_whole_or_not_at_all(open_broker: OpenBroker) -> None:
    async with open_broker(encryption_key=None) as broker:
        await broker.configure("secret", encryption_enabled=True)
        await broker.configure("plain")

        with pytest.raises(EncryptionUnavailable):
            await broker.engine.push([broker.message(queue="plain"), broker.message(queue="secret")], None)

        assert not await broker.pop("plain")


async def test_a_request_that_cannot_be_stored_does_not_fail_those_written_with_it(open_broker: OpenBroker) -> None:
    async with open_broker(encryption_key=None) as broker:
        await broker.configure("secret", encryption_enabled=True)
        refused = 0

        async def poison() -> None:
            nonlocal refused
            with pytest.raises(EncryptionUnavailable):
                await broker.push("secret", 1)
            refused += 1

        async with trio.open_nursery() as producers:
            for at in range(10):
                producers.start_soon(broker.push, "plain", at)
                producers.start_soon(poison)

        assert refused == 10
        assert sorted(await broker.drain("plain")) == list(range(10))


async def test_a_push_that_relied_on_old_options_is_stored_under_the_new(
    broker: Broker, other: Broker, sql: Session
) -> None:
    await broker.configure("q")
    await broker.push("q", "before")
    await other.configure("q", encryption_enabled=True)

    await broker.push("q", "after")

    keys = await sql.fetch("SELECT key_id IS NOT NULL AS sealed FROM queen.segments ORDER BY base_offset")
    assert [row["sealed"] for row in keys] == [False, True]
    assert (await broker.pop("q")).data == ["before", "after"]


@pytest.mark.buckets
async def test_a_push_over_many_partitions_with_one_stale_queue_is_still_whole(broker: Broker, other: Broker) -> None:
    messages = [broker.message(queue=f"q{at % 3}", partition=str(at), payload=b"%d" % at) for at in range(60)]
    await broker.engine.push(messages, None)
    await other.configure("q1", priority=7)
    assert await other.engine.delete_queue("q2")

    await broker.engine.push(messages, None)

    counts = [sorted(await broker.drain(f"q{number}", partitions=100)) for number in range(3)]
    assert counts[0] == sorted([at for at in range(60) if at % 3 == 0] * 2)
    assert counts[1] == sorted([at for at in range(60) if at % 3 == 1] * 2)
    assert counts[2] == [at for at in range(60) if at % 3 == 2]


async def test_a_cancelled_push_may_be_repeated_with_its_ids(broker: Broker) -> None:
    ids = [str(uuid4()) for _ in range(5)]

    for patience in (0, 1, 2, 5, 10, 50):
        with trio.move_on_after(patience / 1000):
            await broker.push("q", ids=ids)
    await broker.push("q", ids=ids)

    assert await broker.drain("q") == ids
