"""Encrypted queues: unreadable at rest, invisible to clients, refused without a key (docs/decisions/0010)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from queen.config.settings import Secret
from queen.errors import EncryptionUnavailable
from queen.model.message import AckStatus
from queen.storage.segments import CorruptSegment

if TYPE_CHECKING:
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


@pytest.mark.parametrize("key", [None, OTHER_KEY], ids=["no key", "another key"])
@pytest.mark.parametrize("auto_ack", [False, True], ids=["lease", "autoAck"])
async def test_a_pop_without_the_key_hands_out_nothing_and_what_it_took_can_be_given_back(
    broker: Broker, open_broker: OpenBroker, key: Secret | None, auto_ack: bool
) -> None:
    await broker.configure("q", encryption_enabled=True)
    await broker.push("q", SECRET)
    async with open_broker(encryption_key=key) as stranger:
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
