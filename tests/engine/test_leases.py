"""Extending leases: http-core.md §7."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

if TYPE_CHECKING:
    from tests.conftest import Broker, DatabaseClock, Session


async def test_an_extended_lease_lives_as_long_as_it_was_told(broker: Broker, database_clock: DatabaseClock) -> None:
    await broker.configure("q", lease_seconds=10)
    await broker.push("q", 1)
    popped = await broker.pop("q")

    extension = await broker.engine.extend_lease(popped.lease, 60)

    assert (extension.lease_id, extension.renewed, extension.error) == (popped.lease, 1, None)
    await database_clock.advance(50)
    assert not await broker.pop("q")
    await database_clock.advance(11)
    assert await broker.pop("q")


async def test_the_answer_tells_when_the_lease_ends(broker: Broker, sql: Session) -> None:
    await broker.push("q", 1)
    popped = await broker.pop("q")

    extension = await broker.engine.extend_lease(popped.lease, 1000)

    assert isinstance(extension.expires_at, datetime)
    assert extension.expires_at == await sql.fetchval("SELECT lease_expires_at FROM queen.cursors")
    left = extension.expires_at - await sql.fetchval("SELECT clock_timestamp()")
    assert 990 < left.total_seconds() <= 1000


async def test_an_extension_never_shortens_a_lease(broker: Broker, sql: Session) -> None:
    await broker.push("q", 1)
    popped = await broker.pop("q")
    before = await sql.fetchval("SELECT lease_expires_at FROM queen.cursors")

    for seconds in (1, 0, -1000):
        extension = await broker.engine.extend_lease(popped.lease, seconds)
        assert (extension.renewed, extension.expires_at) == (1, before)


@pytest.mark.buckets
async def test_every_partition_under_the_lease_is_extended(broker: Broker, database_clock: DatabaseClock) -> None:
    await broker.configure("q", lease_seconds=10)
    for partition in range(6):
        await broker.push("q", partition, partition=str(partition))
    popped = await broker.pop("q", partitions=5)
    done = [got for got in popped if got.partition == popped.partitions[0]]
    await broker.ack(done, lease=popped.lease)

    extension = await broker.engine.extend_lease(popped.lease, 60)

    assert extension.renewed == 4
    await database_clock.advance(30)
    assert len(await broker.pop("q", partitions=9)) == 1


async def test_an_expired_lease_is_not_revived(broker: Broker, database_clock: DatabaseClock) -> None:
    await broker.push("q", 1)
    popped = await broker.pop("q")
    await database_clock.advance(301)

    extension = await broker.engine.extend_lease(popped.lease, 60)

    assert (extension.renewed, extension.expires_at, extension.error) == (0, None, "Lease already expired")
    assert await broker.pop("q")
    assert (await broker.engine.extend_lease(popped.lease, 60)).error == "Lease not found"


@pytest.mark.buckets
async def test_a_lease_that_ended_or_never_was_is_not_found(broker: Broker) -> None:
    await broker.push("q", 1)
    popped = await broker.pop("q")
    await broker.ack(popped.messages, lease=popped.lease)

    for lease in (popped.lease, str(uuid4()), "no uuid", ""):
        extension = await broker.engine.extend_lease(lease, 60)
        assert (extension.lease_id, extension.renewed, extension.error) == (lease, 0, "Lease not found")


async def test_an_extended_lease_is_acked_through_any_worker(
    broker: Broker, other: Broker, database_clock: DatabaseClock
) -> None:
    await broker.configure("q", lease_seconds=10)
    await broker.push("q", 1, 2)
    popped = await broker.pop("q")

    assert (await other.engine.extend_lease(popped.lease, 60)).renewed == 1
    await database_clock.advance(30)

    assert (await other.ack(popped.messages, lease=popped.lease))[1].lease_released
