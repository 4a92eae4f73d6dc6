"""Acks and pops that wait at the same time are one write: acks first."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from queen.model.message import AckStatus
from queen.model.queue import QUEUE_MODE
from queen.storage.claims import ClaimOutcome, ClaimRequest

if TYPE_CHECKING:
    from tests.conftest import Broker, DatabaseClock, Session


@pytest.fixture
def buckets() -> int:
    """One: with more the two are written apart."""
    return 1


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

    first, results, second = await broker.engine._write_turnover([claims[0], acks, claims[1]])

    assert isinstance(first, ClaimOutcome)
    assert isinstance(second, ClaimOutcome)
    assert not isinstance(results, ClaimOutcome)
    assert [(result.success, result.lease_released) for result in results] == [(True, True)]
    assert [(claim.first, claim.end) for claim in first.claims] == [(1, 2)]
    assert not second.claims
    assert await sql.fetchval("SELECT lease_id FROM queen.cursors") == claims[0].lease_id
    assert await sql.fetchval("SELECT xmin::text FROM queen.cursors") != before


async def test_many_pops_each_get_a_partition_of_their_own(broker: Broker) -> None:
    for partition in "abcde":
        await broker.push("q", 1, 2, partition=partition)
    assert await broker.pop("q", batch=1, auto_ack=True, partition="a")

    outcomes = await broker.engine._write_turnover([await claim_of(broker, "q") for _ in range(6)])

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

    results, outcome = await broker.engine._write_turnover([acks, await claim_of(broker, "q")])

    assert isinstance(outcome, ClaimOutcome)
    assert not isinstance(results, ClaimOutcome)
    assert [result.error for result in results] == ["Invalid or expired lease"]
    assert [(claim.first, claim.end, claim.attempt) for claim in outcome.claims] == [(0, 1, 2)]
