"""What an acknowledgement does to cursor, lease and counter: http-core.md §4.1 and the rules B1 to B6."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
import trio

from queen.model.message import Ack, AckStatus
from queen.storage.ids import uuid7_texts

if TYPE_CHECKING:
    from tests.conftest import Broker, DatabaseClock, Popped, Session

COMPLETED, FAILED, DLQ, RETRY = AckStatus.COMPLETED, AckStatus.FAILED, AckStatus.DLQ, AckStatus.RETRY
LOST = "Invalid or expired lease"
NOT_FOUND = "Message not found"


async def five(broker: Broker, **options: Any) -> Popped:
    """Five messages under a lease."""
    await broker.configure("q", **options)
    await broker.push("q", *range(5))
    return await broker.pop("q")


# -- completed ----------------------------------------------------------------------------------------------------


async def test_a_lease_ends_when_as_many_messages_are_acked_as_were_delivered(broker: Broker) -> None:
    popped = await five(broker)

    verdicts = [(await broker.ack([got], lease=popped.lease))[0] for got in popped]

    assert [verdict.success for verdict in verdicts] == [True] * 5
    assert [verdict.lease_released for verdict in verdicts] == [False] * 4 + [True]
    assert [(verdict.queue, verdict.partition) for verdict in verdicts] == [("q", "Default")] * 5
    assert not await broker.pop("q")


async def test_acks_out_of_order_all_keep_a_valid_lease(broker: Broker) -> None:
    popped = await five(broker)

    verdicts = [(await broker.ack([popped[at]], lease=popped.lease))[0] for at in (4, 1, 3, 0, 2)]

    assert [verdict.success for verdict in verdicts] == [True] * 5
    assert [verdict.lease_released for verdict in verdicts] == [False] * 4 + [True]


async def test_acks_sent_at_once_all_succeed(broker: Broker) -> None:
    await broker.push("q", *range(50))
    popped = await broker.pop("q")
    verdicts = []

    async def ack(at: int) -> None:
        verdicts.extend(await broker.ack([popped[at]], lease=popped.lease))

    async with trio.open_nursery() as acks:
        for at in range(50):
            acks.start_soon(ack, at)

    assert all(verdict.success for verdict in verdicts)
    assert sum(verdict.lease_released for verdict in verdicts) == 1
    assert not await broker.pop("q")


async def test_acking_only_the_last_message_passes_all_and_leaves_the_lease_until_it_expires(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    popped = await five(broker)
    await broker.push("q", "next")

    (verdict,) = await broker.ack([popped[4]], lease=popped.lease)

    assert (verdict.success, verdict.lease_released) == (True, False)
    assert not await broker.pop("q")
    await database_clock.advance(301)
    assert (await broker.pop("q")).data == ["next"]


async def test_a_repeated_ack_counts_once(broker: Broker) -> None:
    popped = await five(broker)

    verdicts = [(await broker.ack([popped[0]], lease=popped.lease))[0] for _ in range(5)]

    assert [(verdict.success, verdict.lease_released) for verdict in verdicts] == [(True, False)] * 5
    assert not await broker.pop("q")


async def test_a_repeat_of_the_ack_that_ended_the_lease_is_answered_as_the_first_was(broker: Broker) -> None:
    popped = await five(broker)

    first = await broker.ack(popped.messages, lease=popped.lease)
    again = await broker.ack(popped.messages, lease=popped.lease)

    assert [verdict.success for verdict in first] == [verdict.success for verdict in again] == [True] * 5


async def test_an_ack_without_a_lease_id_is_not_checked(broker: Broker, database_clock: DatabaseClock) -> None:
    popped = await five(broker)
    await database_clock.advance(301)

    for lease in (None, ""):
        verdicts = await broker.ack(popped.messages[:2], lease=lease)
        assert [verdict.success for verdict in verdicts] == [True, True]

    assert (await broker.pop("q")).data == [2, 3, 4]


@pytest.mark.buckets
async def test_an_ack_of_messages_never_popped_moves_the_cursor(broker: Broker) -> None:
    pushed = await broker.push("q", 1, 2, 3)

    (verdict,) = await broker.engine.ack(
        [Ack(transaction_id=pushed[1].transaction_id, partition_id=pushed[1].partition_id, group="fresh")]
    )

    assert (verdict.success, verdict.lease_released) == (True, False)
    assert (await broker.pop("q", group="fresh")).data == [3]
    assert (await broker.pop("q")).data == [1, 2, 3]


async def test_an_ack_counts_for_its_group_alone(broker: Broker) -> None:
    popped = await five(broker)
    billing = await broker.pop("q", group="billing")

    assert [got.success for got in await broker.ack(popped.messages, lease=popped.lease, group="billing")] == [
        False
    ] * 5
    assert all(got.success for got in await broker.ack(billing.messages, lease=billing.lease, group="billing"))
    assert not await broker.pop("q", group="billing")
    assert not await broker.pop("q")
    assert all(got.success for got in await broker.ack(popped.messages, lease=popped.lease))


async def test_b6_an_ack_of_an_earlier_message_does_not_move_the_cursor_back(broker: Broker) -> None:
    popped = await five(broker)

    await broker.ack([popped[3]])
    await broker.ack([popped[0]])
    await broker.ack([popped[4]], FAILED, lease=popped.lease)

    assert (await broker.pop("q")).data == [4]


# -- failed, retry, dlq -------------------------------------------------------------------------------------------


async def test_a_failed_message_and_what_follows_it_come_again_at_once(broker: Broker) -> None:
    popped = await five(broker)
    await broker.ack(popped.messages[:2], lease=popped.lease)

    (verdict,) = await broker.ack([popped[2]], FAILED, lease=popped.lease, error="no")

    assert (verdict.success, verdict.lease_released, verdict.dead_lettered) == (True, True, False)
    again = await broker.pop("q")
    assert again.ids == popped.ids[2:]
    assert again.claims[0].retry_count == 1


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
async def test_a_retry_limit_of_n_is_n_plus_one_deliveries_then_the_dead_letter_queue(
    broker: Broker, limit: int
) -> None:
    await broker.configure("q", retry_limit=limit)
    await broker.push("q", "poison", "fine")

    for delivery in range(limit + 1):
        popped = await broker.pop("q", batch=1)
        assert popped.data == ["poison"]
        assert (popped.claims[0].retry_count, popped.claims[0].attempt) == (delivery, delivery + 1)
        (verdict,) = await broker.ack(popped.messages, FAILED, lease=popped.lease, error=f"boom {delivery}")
        assert (verdict.success, verdict.lease_released) == (True, True)
        assert verdict.dead_lettered == (delivery == limit)

    assert (await broker.pop("q", batch=1)).data == ["fine"]
    total, (letter,) = await broker.engine.dead_letters(queue="q")
    assert total == 1
    assert (letter.error, letter.retry_count) == (f"boom {limit}", limit)


async def test_the_counter_starts_over_with_the_next_batch(broker: Broker) -> None:
    await broker.configure("q", retry_limit=1)
    await broker.push("q", 1, 2)
    first = await broker.pop("q", batch=1)
    await broker.ack(first.messages, FAILED, lease=first.lease)
    second = await broker.pop("q", batch=1)
    await broker.ack(second.messages, lease=second.lease)

    third = await broker.pop("q", batch=1)
    (verdict,) = await broker.ack(third.messages, FAILED, lease=third.lease)

    assert (third.data, third.claims[0].retry_count, third.claims[0].attempt) == ([2], 0, 1)
    assert not verdict.dead_lettered
    assert (await broker.pop("q", batch=1)).data == [2]


async def test_an_expired_lease_is_no_failure(broker: Broker, database_clock: DatabaseClock) -> None:
    await broker.configure("q", retry_limit=0, lease_seconds=10)
    await broker.push("q", 1)

    for attempt in range(1, 5):
        popped = await broker.pop("q")
        assert (popped.data, popped.claims[0].retry_count, popped.claims[0].attempt) == ([1], 0, attempt)
        await database_clock.advance(11)

    assert await broker.engine.dead_letters(queue="q") == (0, [])


async def test_dlq_sets_a_message_aside_at_once_and_the_rest_goes_on(broker: Broker) -> None:
    popped = await five(broker)

    verdicts = [
        (await broker.ack([got], DLQ if got.data == 1 else COMPLETED, lease=popped.lease, error="bad"))[0]
        for got in popped
    ]

    assert [verdict.dead_lettered for verdict in verdicts] == [False, True, False, False, False]
    assert [verdict.lease_released for verdict in verdicts] == [False] * 4 + [True]
    assert not await broker.pop("q")
    total, (letter,) = await broker.engine.dead_letters(queue="q")
    assert (total, letter.error, letter.retry_count, str(letter.message_id)) == (1, "bad", 0, popped[1].id)


async def test_a_dead_letter_without_a_reason_says_that_retries_are_exhausted(broker: Broker) -> None:
    popped = await five(broker, retry_limit=0)

    await broker.ack([popped[0]], FAILED, lease=popped.lease)
    await broker.ack([popped[1]], FAILED, lease=popped.lease, error="")

    _, letters = await broker.engine.dead_letters(queue="q")
    assert [letter.error for letter in letters] == ["Retries exhausted"] * 2


async def test_a_dead_letter_belongs_to_its_group_and_the_others_still_get_the_message(broker: Broker) -> None:
    popped = await five(broker)

    await broker.ack([popped[0]], DLQ, lease=popped.lease)

    _, (letter,) = await broker.engine.dead_letters(queue="q")
    assert letter.group == "__QUEUE_MODE__"
    assert (await broker.pop("q", group="g")).data == [0, 1, 2, 3, 4]
    assert await broker.engine.dead_letters(queue="q", group="g") == (0, [])


async def test_retry_ends_the_lease_and_counts_nothing(broker: Broker) -> None:
    await broker.configure("q", retry_limit=0)
    await broker.push("q", 1, 2)

    for _ in range(4):
        popped = await broker.pop("q")
        assert (popped.data, popped.claims[0].retry_count) == ([1, 2], 0)
        (verdict,) = await broker.ack([popped[0]], RETRY, lease=popped.lease)
        assert (verdict.success, verdict.lease_released, verdict.dead_lettered) == (True, True, False)

    assert await broker.engine.dead_letters(queue="q") == (0, [])


async def test_b4a_acks_after_the_one_that_ended_the_lease_fail(broker: Broker) -> None:
    popped = await five(broker)
    await broker.ack([popped[0]], FAILED, lease=popped.lease)

    verdicts = [(await broker.ack([got], lease=popped.lease))[0] for got in popped.messages[1:]]

    assert [verdict.error for verdict in verdicts] == [LOST] * 4
    assert (await broker.pop("q")).data == [0, 1, 2, 3, 4]


async def test_a_failure_of_a_message_that_was_passed_is_kept_as_a_dead_letter(broker: Broker) -> None:
    """docs/decisions/0009: it cannot be delivered again, and is not to be lost."""
    popped = await five(broker)
    await broker.ack([popped[4]], lease=popped.lease)

    (verdict,) = await broker.ack([popped[1]], FAILED, lease=popped.lease, error="late")

    assert (verdict.success, verdict.lease_released, verdict.dead_lettered) == (True, True, True)
    _, (letter,) = await broker.engine.dead_letters(queue="q")
    assert (str(letter.message_id), letter.error) == (popped[1].id, "late")


# -- what cannot be acked -----------------------------------------------------------------------------------------


async def test_an_unknown_message_or_partition_is_not_found(broker: Broker) -> None:
    popped = await five(broker)
    known = popped[0]

    verdicts = await broker.engine.ack(
        [
            Ack(transaction_id=str(uuid4()), partition_id=known.partition_id),
            Ack(transaction_id="unknown", partition_id=known.partition_id),
            Ack(transaction_id=known.transaction_id, partition_id=str(uuid4())),
            Ack(transaction_id=known.transaction_id, partition_id="no uuid"),
            Ack(transaction_id=known.transaction_id, partition_id=""),
            Ack(transaction_id="", partition_id=known.partition_id),
            Ack(transaction_id=known.transaction_id, partition_id=known.partition_id.upper(), lease_id=popped.lease),
        ]
    )

    assert [verdict.error for verdict in verdicts] == [NOT_FOUND] * 6 + [None]
    assert [verdict.success for verdict in verdicts] == [False] * 6 + [True]


async def test_a_foreign_or_malformed_lease_is_refused(broker: Broker) -> None:
    popped = await five(broker)

    for lease in (str(uuid4()), "no uuid", "0"):
        (verdict,) = await broker.ack([popped[0]], lease=lease)
        assert (verdict.success, verdict.error, verdict.queue) == (False, LOST, "q")

    assert (await broker.ack([popped[0]], lease=popped.lease))[0].success


async def test_a_foreign_or_ended_lease_is_refused_also_for_messages_that_were_passed(
    broker: Broker, database_clock: DatabaseClock
) -> None:
    popped = await five(broker)
    await database_clock.advance(301)
    await broker.ack(popped.messages)

    for lease in (popped.lease, str(uuid4())):
        assert [verdict.error for verdict in await broker.ack(popped.messages, lease=lease)] == [LOST] * 5


async def test_an_unknown_status_fails_without_a_reason_and_without_an_effect(broker: Broker) -> None:
    popped = await five(broker)

    verdicts = await broker.ack(popped.messages, None, lease=popped.lease)

    assert [(verdict.success, verdict.error) for verdict in verdicts] == [(False, None)] * 5
    assert all(verdict.success for verdict in await broker.ack(popped.messages, lease=popped.lease))


async def test_a_lease_of_before_a_failover_is_void(broker: Broker, sql: Session) -> None:
    popped = await five(broker)
    await sql.execute("UPDATE queen.cursors SET lease_epoch = lease_epoch - 1")

    verdicts = await broker.ack(popped.messages, lease=popped.lease)
    extension = await broker.engine.extend_lease(popped.lease, 60)

    assert [verdict.error for verdict in verdicts] == [LOST] * 5
    assert extension.renewed == 0


# -- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.buckets
async def test_b1_one_request_may_span_partitions_and_leases(broker: Broker, database_clock: DatabaseClock) -> None:
    for partition in "abc":
        await broker.push("q", 1, 2, partition=partition)
    taken = {name: await broker.pop("q", partition=name) for name in "abc"}
    await database_clock.advance(301)
    taken["b"] = await broker.pop("q", partition="b")
    order = ["c", "a", "b", "a", "b", "c"]
    at = {name: iter(popped) for name, popped in taken.items()}

    verdicts = await broker.engine.ack([broker.acks_of([next(at[name])], lease=taken[name].lease)[0] for name in order])

    assert [verdict.partition for verdict in verdicts] == order
    assert [verdict.success for verdict in verdicts] == [name == "b" for name in order]


async def test_b2_a_hundred_failures_under_one_lease_all_succeed_and_count_once(broker: Broker) -> None:
    await broker.configure("q", retry_limit=2)
    await broker.push("q", *range(100))

    for retries in range(2):
        popped = await broker.pop("q")
        assert popped.claims[0].retry_count == retries
        verdicts = await broker.ack(popped.messages, FAILED, lease=popped.lease, error="no")
        assert [verdict.success for verdict in verdicts] == [True] * 100
        assert not any(verdict.dead_lettered for verdict in verdicts)
    popped = await broker.pop("q")
    verdicts = await broker.ack(popped.messages, FAILED, lease=popped.lease, error="no")

    assert popped.claims[0].retry_count == 2
    assert all(verdict.success and verdict.dead_lettered for verdict in verdicts)
    total, letters = await broker.engine.dead_letters(queue="q", limit=200)
    assert total == len({letter.message_id for letter in letters}) == 100
    assert not await broker.pop("q")


async def test_b2_failures_of_two_requests_written_together_are_judged_apart(broker: Broker) -> None:
    popped = await five(broker, retry_limit=5)
    verdicts = []

    async def fail(at: int) -> None:
        verdicts.extend(await broker.ack([popped[at]], FAILED, lease=popped.lease))

    async with trio.open_nursery() as acks:
        for at in range(5):
            acks.start_soon(fail, at)

    assert sorted(str(verdict.error) for verdict in verdicts) == [LOST] * 4 + ["None"]
    assert (await broker.pop("q")).claims[0].retry_count == 1


async def test_b3_failures_are_judged_by_the_counter_of_before_the_request(broker: Broker) -> None:
    popped = await five(broker, retry_limit=1)

    first = await broker.ack(popped.messages, FAILED, lease=popped.lease)
    popped = await broker.pop("q")
    second = await broker.ack(popped.messages, FAILED, lease=popped.lease)

    assert [verdict.dead_lettered for verdict in first] == [False] * 5
    assert [verdict.dead_lettered for verdict in second] == [True] * 5


async def test_b4_what_was_completed_before_the_failure_stays_so_and_what_follows_comes_again(broker: Broker) -> None:
    popped = await five(broker)

    verdicts = await broker.engine.ack(
        [
            *broker.acks_of(popped.messages[:2], COMPLETED, lease=popped.lease),
            *broker.acks_of([popped[2]], FAILED, lease=popped.lease),
            *broker.acks_of(popped.messages[3:], COMPLETED, lease=popped.lease),
        ]
    )

    assert [verdict.success for verdict in verdicts] == [True] * 5
    assert verdicts[2].lease_released
    assert (await broker.pop("q")).data == [2, 3, 4]


@pytest.mark.buckets
async def test_b5_every_failed_message_of_a_batch_has_its_own_dead_letter(broker: Broker) -> None:
    popped = await five(broker, retry_limit=0)

    await broker.engine.ack(
        [
            ack
            for got in popped
            for ack in broker.acks_of(
                [got], FAILED if got.data % 2 else COMPLETED, lease=popped.lease, error=f"bad {got.data}"
            )
        ]
    )

    _, letters = await broker.engine.dead_letters(queue="q")
    assert sorted(letter.error for letter in letters) == ["bad 1", "bad 3"]
    assert not await broker.pop("q")


async def test_one_message_named_twice_in_a_request_counts_once(broker: Broker) -> None:
    popped = await five(broker)

    verdicts = await broker.ack([popped[0]] * 5, lease=popped.lease)

    assert [(verdict.success, verdict.lease_released) for verdict in verdicts] == [(True, False)] * 5


async def test_an_empty_request_is_answered_with_nothing(broker: Broker) -> None:
    assert await broker.engine.ack([]) == []


async def test_ten_thousand_acks_in_one_request(broker: Broker) -> None:
    await broker.push("q", *range(10_000))
    popped = await broker.pop("q", batch=10_000)

    verdicts = await broker.ack(popped.messages, lease=popped.lease)

    assert all(verdict.success for verdict in verdicts)
    assert [verdict.lease_released for verdict in verdicts] == [False] * 9_999 + [True]


async def test_one_bad_request_does_not_fail_those_written_with_it(broker: Broker) -> None:
    popped = await five(broker)
    verdicts: dict[str, bool] = {}

    async def ack(name: str, transaction_id: str, partition_id: str) -> None:
        (verdict,) = await broker.engine.ack([Ack(transaction_id=transaction_id, partition_id=partition_id)])
        verdicts[name] = verdict.success

    async with trio.open_nursery() as acks:
        acks.start_soon(ack, "good", popped[0].transaction_id, popped[0].partition_id)
        acks.start_soon(ack, "no message", "\0", popped[0].partition_id)
        acks.start_soon(ack, "no partition", popped[0].transaction_id, "\0")
        acks.start_soon(ack, "good too", popped[1].transaction_id, popped[1].partition_id)

    assert verdicts == {"good": True, "no message": False, "no partition": False, "good too": True}


@pytest.mark.buckets
@pytest.mark.parametrize("here", [True, False], ids=["through the worker that delivered", "through another"])
@pytest.mark.parametrize("kind", ["minted", "uuid7", "keys"])
async def test_it_does_not_matter_which_worker_an_ack_goes_through(
    broker: Broker, other: Broker, here: bool, kind: str
) -> None:
    """The worker that delivered knows where the messages lie; another has to look."""
    via = broker if here else other
    ids: list[str | None] = [None] * 6
    if kind != "minted":
        ids = [*uuid7_texts(6)] if kind == "uuid7" else [f'"{at}"' for at in range(6)]
    await broker.push("q", *range(6), ids=ids)
    everything = await other.pop("q", group="other")
    popped = await broker.pop("q", batch=4)

    verdicts = await via.ack([popped[3], popped[0]], lease=popped.lease)
    assert [verdict.success for verdict in verdicts] == [True, True]
    verdicts = await via.ack([popped[1], everything[4]], lease=popped.lease)  # the last is not of this lease
    assert [verdict.success for verdict in verdicts] == [True, True]
    (verdict,) = await via.ack([popped[2]], lease=popped.lease)
    assert verdict.success
    assert verdict.lease_released
    assert (await broker.pop("q")).data == [5]


@pytest.mark.parametrize("here", [True, False], ids=["through the worker that delivered", "through another"])
async def test_an_ack_of_what_was_deleted_meanwhile_is_not_found(broker: Broker, other: Broker, here: bool) -> None:
    await broker.push("q", 1, 2)
    popped = await broker.pop("q")
    await broker.engine.delete_queue("q")

    verdicts = await (broker if here else other).ack(popped.messages, lease=popped.lease)

    assert [(verdict.success, verdict.error) for verdict in verdicts] == [(False, NOT_FOUND)] * 2
