"""Opening and closing: nothing is left behind, whenever it happens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
import trio

from queen.config.settings import Settings
from queen.engine.engine import open_engine
from queen.errors import Draining
from queen.storage.claims import ClaimOutcome, ClaimRequest, Surplus

if TYPE_CHECKING:
    from tests.conftest import Broker, OpenBroker, Postgres, Session


async def test_an_engine_that_is_closed_at_once_leaves_no_connection(open_broker: OpenBroker, sql: Session) -> None:
    """Closing meets the connections in every state of being opened; a leaked one is a ResourceWarning too."""
    for _ in range(10):
        async with open_broker() as broker:
            await broker.push("q", 1)

    # PostgreSQL sees a closed socket a moment later
    await sql.wait_for(
        "SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )


async def test_an_engine_that_is_cancelled_while_it_opens_leaves_no_connection(
    settings: Settings, sql: Session
) -> None:
    for milliseconds in (0, 1, 2, 5, 10, 20, 50):
        with trio.move_on_after(milliseconds / 1000):
            async with open_engine(settings):
                await trio.sleep_forever()

    assert await sql.fetchval("SELECT count(*) FROM queen.meta") == 1


@pytest.mark.buckets
async def test_a_drain_ends_parked_pops_with_nothing_and_lets_nobody_park(broker: Broker) -> None:
    await broker.configure("q")
    answers: list[int] = []

    async def consume(queue: str | None = None, namespace: str | None = None) -> None:
        answers.append(len(await broker.pop(queue, namespace=namespace, wait=60)))

    with trio.fail_after(5):
        async with trio.open_nursery() as consumers:
            for _ in range(5):
                consumers.start_soon(consume, "q")
                consumers.start_soon(consume, "unknown")
                consumers.start_soon(consume, None, "nowhere")
            await broker.wait_parked(15)
            broker.engine.begin_drain()
        await consume("q")

    assert answers == [0] * 16


async def test_a_drained_engine_still_answers_what_is_there(broker: Broker) -> None:
    await broker.push("q", 1)
    broker.engine.begin_drain()

    popped = await broker.pop("q", wait=60)

    assert popped.data == [1]
    assert (await broker.ack(popped.messages, lease=popped.lease))[0].success


async def test_a_batch_that_is_claimed_for_nobody_when_the_engine_closes_goes_back_unattempted(
    open_broker: OpenBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed, closing = trio.Event(), trio.Event()
    async with open_broker() as broker:
        await broker.push("q", 1)
        claim, begin_drain = broker.engine.store.claims.claim, broker.engine.begin_drain

        async def claim_late(requests: Sequence[ClaimRequest]) -> tuple[list[ClaimOutcome], list[Surplus]]:
            outcomes = await claim(requests)
            claimed.set()
            await closing.wait()
            return outcomes

        def note_close() -> None:
            begin_drain()
            closing.set()

        monkeypatch.setattr(broker.engine.store.claims, "claim", claim_late)
        monkeypatch.setattr(broker.engine, "begin_drain", note_close)
        async with trio.open_nursery() as requests:
            requests.start_soon(broker.pop, "q")
            await claimed.wait()
            requests.cancel_scope.cancel()

    async with open_broker() as broker:
        popped = await broker.pop("q")
        assert popped.data == [1]
        assert popped.messages[0].claim.attempt == 1


async def test_a_closed_engine_refuses(open_broker: OpenBroker) -> None:
    async with open_broker() as broker:
        pass

    with pytest.raises(Draining):
        await broker.engine.delete_queue("q")


async def test_health_tells_whether_postgresql_answers(broker: Broker, postgres: Postgres, sql: Session) -> None:
    assert await broker.engine.health()
    database = await sql.fetchval("SELECT current_database()")

    await trio.to_thread.run_sync(postgres.execute, f"ALTER DATABASE {database} WITH ALLOW_CONNECTIONS false")
    await sql.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    assert not await broker.engine.health()

    await trio.to_thread.run_sync(postgres.execute, f"ALTER DATABASE {database} WITH ALLOW_CONNECTIONS true")
    assert await broker.engine.health()
