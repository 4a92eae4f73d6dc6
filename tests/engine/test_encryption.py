"""Encrypted queues: unreadable at rest, invisible to clients, refused without a key (docs/decisions/0010)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
import trio

from queen.config.settings import Secret
from queen.errors import EncryptionUnavailable
from queen.model.message import AckStatus
from queen.storage.segments import CorruptSegment
from tests.conftest import TEST_KEY

if TYPE_CHECKING:
    from queen.storage.reencrypt import Step
    from tests.conftest import Broker, OpenBroker, Popped, Session

SECRET = "the launch code is 0000"
OTHER_KEY = Secret("77" * 32)


async def bodies(sql: Session) -> bytes:
    rows = await sql.fetch("SELECT body FROM queen.segments UNION ALL SELECT body FROM queen.dead_letters")
    return b"".join(row["body"] for row in rows)


async def test_an_encrypted_payload_is_not_in_the_database_and_comes_back_as_it_went(
    broker: Broker, sql: Session
) -> None:
    await broker.configure("q", encryption_enabled=True)
    await broker.push("q", SECRET, "x" * 5000, ids=[f"id of {SECRET}", None])
    await broker.push("plain", SECRET)

    assert bytes(SECRET, "ascii") in await bodies(sql)
    await sql.execute("DELETE FROM queen.segments WHERE key_id IS NULL")
    assert bytes(SECRET, "ascii") not in await bodies(sql)
    assert (await broker.pop("q")).data == [SECRET, "x" * 5000]


async def test_what_was_pushed_before_and_after_the_switch_is_read_alike(broker: Broker) -> None:
    for at, enabled in enumerate((False, True, False, True)):
        await broker.configure("q", encryption_enabled=enabled)
        await broker.push("q", at)

    assert (await broker.pop("q")).data == [0, 1, 2, 3]


async def test_a_push_without_a_key_is_refused_and_stores_nothing(open_broker: OpenBroker, sql: Session) -> None:
    async with open_broker(encryption_key=None) as broker:
        await broker.configure("q", encryption_enabled=True)

        with pytest.raises(EncryptionUnavailable, match="QUEEN_ENCRYPTION_KEY"):
            await broker.push("q", SECRET)

        assert await sql.fetchval("SELECT count(*) FROM queen.segments") == 0
        await broker.configure("q")
        await broker.push("q", "plain")
        assert (await broker.pop("q")).data == ["plain"]


@pytest.mark.parametrize("auto_ack", [False, True], ids=["lease", "autoAck"])
async def test_a_pop_without_the_key_hands_out_nothing_and_what_it_took_can_be_given_back(
    broker: Broker, open_broker: OpenBroker, auto_ack: bool
) -> None:
    await broker.configure("q", encryption_enabled=True)
    await broker.push("q", SECRET)
    async with open_broker(encryption_key=OTHER_KEY) as stranger:
        batch = await stranger.engine.pop(stranger.request(queue="q", auto_ack=auto_ack))
        assert batch is not None

        with pytest.raises(EncryptionUnavailable):
            async for _ in batch.slices():
                pass
        await batch.give_back()

    assert (await broker.pop("q")).data == [SECRET]


@pytest.mark.buckets
async def test_a_pop_without_the_key_does_not_fail_those_claimed_with_it(
    broker: Broker, open_broker: OpenBroker
) -> None:
    await broker.configure("q", encryption_enabled=True)
    await broker.push("q", SECRET)
    await broker.push("plain", *range(6))
    taken: list[Popped] = []

    async with open_broker(encryption_key=None) as stranger:

        async def fail() -> None:
            with pytest.raises(EncryptionUnavailable):
                await stranger.pop("q", auto_ack=True, group="g")

        async def succeed() -> None:
            taken.append(await stranger.pop("plain", batch=2, auto_ack=True))

        async with trio.open_nursery() as consumers:
            consumers.start_soon(succeed)
            consumers.start_soon(fail)
            consumers.start_soon(succeed)

    assert sum(len(popped) for popped in taken) == 4


async def test_a_dead_letter_of_an_encrypted_queue_is_encrypted_too(broker: Broker, sql: Session) -> None:
    await broker.configure("q", encryption_enabled=True, retry_limit=0)
    await broker.push("q", SECRET)
    popped = await broker.pop("q")
    await broker.ack(popped.messages, AckStatus.FAILED, lease=popped.lease)

    assert bytes(SECRET, "ascii") not in await bodies(sql)
    _, (letter,) = await broker.engine.dead_letters(queue="q")
    assert bytes(SECRET, "ascii") in letter.line


async def test_a_message_cannot_be_dead_lettered_without_the_key_and_the_others_are_acked(
    broker: Broker, open_broker: OpenBroker
) -> None:
    await broker.configure("q", encryption_enabled=True)
    await broker.push("q", SECRET)
    await broker.push("plain", 1)
    secret, plain = await broker.pop("q"), await broker.pop("plain")

    async with open_broker(encryption_key=None) as stranger:

        async def bury() -> None:
            with pytest.raises(EncryptionUnavailable):
                await stranger.ack(secret.messages, AckStatus.DLQ, lease=secret.lease)

        async def ack() -> None:
            assert (await stranger.ack(plain.messages, lease=plain.lease))[0].success

        async with trio.open_nursery() as acks:
            acks.start_soon(bury)
            acks.start_soon(ack)

    assert await broker.engine.dead_letters(queue="q") == (0, [])
    assert (await broker.ack(secret.messages, lease=secret.lease))[0].lease_released


async def test_a_body_moved_to_another_partition_or_changed_does_not_decode(broker: Broker, sql: Session) -> None:
    await broker.configure("q", encryption_enabled=True)
    for partition in ("a", "b", "c"):
        await broker.push("q", partition, partition=partition)
    ids = {
        row["name"]: row["partition_id"] for row in await sql.fetch("SELECT name, partition_id FROM queen.partitions")
    }
    await sql.execute(
        "UPDATE queen.segments s SET body = (SELECT o.body FROM queen.segments o WHERE o.partition_id = $2)"
        " WHERE s.partition_id = $1",
        ids["a"],
        ids["b"],
    )
    await sql.execute("UPDATE queen.segments SET body = set_byte(body, 20, 255 - get_byte(body, 20))"
                      " WHERE partition_id = $1", ids["c"])  # fmt: skip

    for partition in ("a", "c"):
        with pytest.raises(CorruptSegment):
            await broker.pop("q", partition=partition)
    assert (await broker.pop("q", partition="b")).data == ["b"]


async def test_a_queue_without_its_key_is_refused_before_anything_is_claimed(
    broker: Broker, open_broker: OpenBroker, sql: Session
) -> None:
    await broker.configure("q", encryption_enabled=True)
    await broker.push("q", SECRET)
    await broker.push("plain", 1)

    async with open_broker(encryption_key=None) as stranger:
        with pytest.raises(EncryptionUnavailable, match="QUEEN_ENCRYPTION_KEY"):
            await stranger.pop("q")

        assert await sql.fetchval("SELECT count(*) FROM queen.cursors WHERE lease_id IS NOT NULL OR attempt > 0") == 0
        assert (await stranger.pop("plain")).data == [1]
    assert (await broker.pop("q")).data == [SECRET]


async def test_a_queue_under_another_key_is_refused_and_burns_no_attempt(
    broker: Broker, open_broker: OpenBroker, sql: Session
) -> None:
    await broker.configure("q", encryption_enabled=True)
    await broker.push("q", SECRET)

    async with open_broker(encryption_key=OTHER_KEY) as stranger:
        batch = await stranger.engine.pop(stranger.request(queue="q"))
        assert batch is not None
        with pytest.raises(EncryptionUnavailable):
            async for _ in batch.slices():
                pass
        await batch.give_back()
        for _ in range(3):
            with pytest.raises(EncryptionUnavailable):
                await stranger.pop("q")

    assert await sql.fetchval("SELECT count(*) FROM queen.cursors WHERE lease_id IS NOT NULL OR attempt > 0") == 0
    assert (await broker.pop("q")).data == [SECRET]


async def test_what_an_old_key_encrypts_is_read_while_that_key_is_known(
    broker: Broker, open_broker: OpenBroker
) -> None:
    await broker.configure("q", encryption_enabled=True)
    await broker.push("q", "old")

    async with open_broker(encryption_key=OTHER_KEY, encryption_keys=(Secret(TEST_KEY),)) as rotated:
        await rotated.push("q", "new")
        assert (await rotated.pop("q", batch=2)).data == ["old", "new"]


async def test_after_a_reencryption_the_old_key_is_not_needed(
    broker: Broker, open_broker: OpenBroker, sql: Session
) -> None:
    await broker.configure("q", encryption_enabled=True, retry_limit=0)
    await broker.push("q", "dead", partition="d")
    popped = await broker.pop("q")
    await broker.ack(popped.messages, AckStatus.FAILED, lease=popped.lease)
    await broker.push("q", SECRET, "x" * 5000)
    await broker.push("plain", 1)

    async with open_broker(encryption_key=OTHER_KEY, encryption_keys=(Secret(TEST_KEY),)) as rotated:
        sealed = sum([step.sealed async for step in steps(rotated)])
        again = sum([step.sealed async for step in steps(rotated)])
    assert (sealed, again) == (3, 0)

    async with open_broker(encryption_key=OTHER_KEY) as later:
        assert (await later.pop("q", batch=2)).data == [SECRET, "x" * 5000]
        _, (letter,) = await later.engine.dead_letters(queue="q")
        assert b"dead" in letter.line
        assert (await later.pop("plain")).data == [1]
    assert bytes(SECRET, "ascii") not in await bodies(sql)


async def test_a_pass_is_left_and_taken_up_anywhere(
    broker: Broker, open_broker: OpenBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await broker.configure("q", encryption_enabled=True)
    for n in range(7):
        await broker.push("q", n)
    monkeypatch.setattr("queen.storage.reencrypt.STEP_ROWS", 3)
    rotated_settings = {"encryption_key": OTHER_KEY, "encryption_keys": (Secret(TEST_KEY),)}

    async with open_broker(**rotated_settings) as first:
        begun = await first.engine.admin.reencrypt(None)
    assert begun is not None
    assert (begun.looked, begun.sealed) == (3, 3)
    async with open_broker(**rotated_settings) as second:
        assert sum([step.sealed async for step in steps(second, begun.after)]) == 4


async def test_rows_that_others_are_at_are_left_to_a_later_pass(
    broker: Broker, open_broker: OpenBroker, sql: Session
) -> None:
    await broker.configure("q", encryption_enabled=True)
    await broker.push("q", 1)
    await broker.push("q", 2)

    async with open_broker(encryption_key=OTHER_KEY, encryption_keys=(Secret(TEST_KEY),)) as rotated:
        await sql.execute("BEGIN")
        await sql.execute("SELECT 1 FROM queen.segments WHERE base_offset = 0 FOR UPDATE")
        during = [step async for step in steps(rotated)]
        await sql.execute("ROLLBACK")
        after = [step async for step in steps(rotated)]

    assert (sum(step.sealed for step in during), sum(step.locked for step in during)) == (1, 1)
    assert (sum(step.sealed for step in after), sum(step.locked for step in after)) == (1, 0)


async def test_one_server_at_a_time_is_at_a_step(broker: Broker, sql: Session) -> None:
    await sql.execute("BEGIN")
    await sql.execute("SELECT pg_advisory_xact_lock($1)", 0x7175_6502)

    assert await broker.engine.admin.reencrypt(None) is None
    await sql.execute("ROLLBACK")
    assert await broker.engine.admin.reencrypt(None) is not None


async def test_what_no_key_of_this_server_opens_is_counted_and_left(broker: Broker, open_broker: OpenBroker) -> None:
    await broker.configure("q", encryption_enabled=True)
    await broker.push("q", SECRET)

    async with open_broker(encryption_key=OTHER_KEY) as stranger:
        step = await stranger.engine.admin.reencrypt(None)

    assert step is not None
    assert (step.sealed, sum(step.missing.values())) == (0, 1)
    assert (await broker.pop("q")).data == [SECRET]


async def steps(broker: Broker, after: str | None = None) -> AsyncIterator[Step]:
    """The rest of a pass."""
    while True:
        step = await broker.engine.admin.reencrypt(after)
        assert step is not None
        yield step
        after = step.after
        if after is None:
            return
