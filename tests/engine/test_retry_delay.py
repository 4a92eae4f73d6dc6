"""retryDelay, where it was asked for: a failed batch comes again after a pause that grows. Nothing else waits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from queen.model.message import AckStatus

if TYPE_CHECKING:
    from tests.conftest import Broker, DatabaseClock, Popped, Session

pytestmark = pytest.mark.buckets

DELAY: dict[str, Any] = {"retry_delay_ms": 10_000, "retry_delay_enforced": True, "retry_limit": 100}


async def fail(broker: Broker, popped: Popped, status: AckStatus = AckStatus.FAILED) -> None:
    verdicts = await broker.ack(popped.messages, status, lease=popped.lease)
    assert all(verdict.success for verdict in verdicts)
    assert verdicts[-1].lease_released


async def pause(sql: Session) -> float:
    """Seconds until the cursor is ready."""
    return float(await sql.fetchval("SELECT extract(epoch FROM ready_at - clock_timestamp()) FROM queen.cursors"))


@pytest.mark.parametrize("status", [AckStatus.FAILED, AckStatus.RETRY])
async def test_a_failed_batch_comes_again_after_the_delay_and_not_before(
    broker: Broker, database_clock: DatabaseClock, status: AckStatus
) -> None:
    await broker.configure("q", **DELAY)
    await broker.push("q", 1, 2)
    await fail(broker, await broker.pop("q"), status)

    assert not await broker.pop("q")
    await database_clock.advance(9)
    assert not await broker.pop("q")
    await database_clock.advance(3.1)
    again = await broker.pop("q")
    assert again.data == [1, 2]
    assert again.claims[0].attempt == 2


async def test_a_delay_that_nobody_asked_for_does_nothing(broker: Broker) -> None:
    await broker.configure("q", retry_delay_ms=60_000)
    await broker.push("q", 1)
    await fail(broker, await broker.pop("q"))

    assert (await broker.pop("q")).data == [1]


async def test_the_delay_doubles_with_every_failure_up_to_five_minutes(
    broker: Broker, database_clock: DatabaseClock, sql: Session
) -> None:
    await broker.configure("q", **DELAY)
    await broker.push("q", 1)
    pauses = []
    for _ in range(7):
        await fail(broker, await broker.pop("q"))
        pauses.append(await pause(sql))
        await database_clock.advance(pauses[-1] + 1)

    for at, seconds in enumerate([10, 20, 40, 80, 160, 300, 300]):
        assert seconds - 1 < pauses[at] <= seconds * 1.2, pauses


async def test_what_failed_together_does_not_come_back_together(broker: Broker, sql: Session) -> None:
    await broker.configure("q", **DELAY)
    for at in range(20):
        await broker.push("q", at, partition=str(at))
    popped = await broker.pop("q", partitions=20)
    await fail(broker, popped)

    assert await sql.fetchval("SELECT count(DISTINCT ready_at) FROM queen.cursors") == 20


async def test_other_partitions_and_groups_go_on(broker: Broker) -> None:
    await broker.configure("q", **DELAY)
    await broker.push("q", "failing", partition="a")
    await fail(broker, await broker.pop("q"))
    await broker.push("q", "fine", partition="b")

    assert (await broker.pop("q", partitions=10)).data == ["fine"]
    assert (await broker.pop("q", group="g", partition="a")).data == ["failing"]


async def test_what_is_pushed_meanwhile_waits_behind_it_in_order(broker: Broker, database_clock: DatabaseClock) -> None:
    await broker.configure("q", **DELAY)
    await broker.push("q", 1)
    await fail(broker, await broker.pop("q"))
    await broker.push("q", 2)

    assert not await broker.pop("q", partition="Default")
    await database_clock.advance(12.1)
    assert (await broker.pop("q", partition="Default")).data == [1, 2]


async def test_a_lease_that_runs_out_is_a_failure_too(broker: Broker, database_clock: DatabaseClock) -> None:
    await broker.configure("q", lease_seconds=30, **DELAY)
    await broker.push("q", 1)
    popped = await broker.pop("q")
    assert (await broker.engine.extend_lease(popped.lease, 60)).renewed == 1

    await database_clock.advance(61)
    assert not await broker.pop("q")
    await database_clock.advance(8.5)
    assert not await broker.pop("q")
    await database_clock.advance(3)
    assert (await broker.pop("q")).data == [1]


async def test_a_batch_that_is_done_leaves_no_pause(broker: Broker) -> None:
    await broker.configure("q", **{**DELAY, "retry_limit": 0})
    await broker.push("q", 1, 2, 3)
    popped = await broker.pop("q", batch=2)

    verdicts = await broker.ack(popped.messages, AckStatus.FAILED, lease=popped.lease)

    assert [verdict.dead_lettered for verdict in verdicts] == [True, True]
    assert (await broker.pop("q")).data == [3]


async def test_what_never_reached_its_consumer_comes_again_at_once(broker: Broker) -> None:
    await broker.configure("q", **DELAY)
    await broker.push("q", 1)
    await (await broker.pop("q")).give_back()

    assert (await broker.pop("q")).data == [1]


async def test_taking_the_delay_away_makes_ready_what_was_put_off(broker: Broker) -> None:
    await broker.configure("q", **DELAY)
    await broker.push("q", 1)
    await fail(broker, await broker.pop("q"))

    await broker.configure("q")

    assert (await broker.pop("q")).data == [1]


async def test_a_parked_consumer_is_woken_when_the_pause_is_over(broker: Broker, other: Broker) -> None:
    await broker.configure("q", **{**DELAY, "retry_delay_ms": 300})
    await broker.push("q", 1)
    popped = await broker.pop("q")
    found: dict[str, float] = {}
    begun = trio.current_time()

    async def wait(via: Broker) -> None:
        again = await via.pop("q", wait=20)
        found["seconds"] = trio.current_time() - begun
        assert again.data == [1]

    async with trio.open_nursery() as consumers:
        consumers.start_soon(wait, other)
        await other.wait_parked(1)
        begun = trio.current_time()
        await fail(broker, popped)

    assert found["seconds"] >= 0.29
