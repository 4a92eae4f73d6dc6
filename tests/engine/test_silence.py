"""A PostgreSQL that is silent instead of gone: found out, and nothing hangs on it."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
import trio

from queen.config.settings import Secret, Settings
from queen.errors import OutcomeUnknown, QueenError, StorageUnavailable
from queen.model.message import Buffered
from tests.faults.proxy import Proxy

if TYPE_CHECKING:
    from tests.conftest import Broker, Session

PATIENCE_SECONDS = 15.0
"""Far above the two seconds that it takes, on a busy machine too; far below the 35 of a statement that is given up."""


@pytest.fixture
async def proxy(database_url: str, nursery: Any) -> Proxy:
    """Between the engine and PostgreSQL."""
    query = parse_qs(urlsplit(database_url).query)
    path = Path(query["host"][0]) / f".s.PGSQL.{query['port'][0]}"
    proxy = Proxy(partial(trio.open_unix_socket, str(path)))
    await nursery.start(proxy.run)
    return proxy


@pytest.fixture
async def through(proxy: Proxy, open_broker: Any, settings: Settings, tmp_path: Path) -> AsyncIterator[Broker]:
    """A worker that reaches PostgreSQL through the proxy."""
    assert settings.database_url is not None
    parts = urlsplit(settings.database_url.reveal())
    url = f"postgresql://{parts.username}@127.0.0.1:{proxy.port}{parts.path}"
    async with open_broker(
        database_url=Secret(url), spool_dir=tmp_path / "spool", spool_interval_seconds=0.01
    ) as broker:
        yield broker
        proxy.heal()


async def push(broker: Broker, queue: str, value: int) -> bool:
    """Push without a transaction id. Whether it went to the spool."""
    message = broker.message(queue=queue, payload=msgspec.json.encode(value))
    return isinstance(await broker.engine.push([message], None), Buffered)


async def test_work_is_cut_off_and_refused_when_postgresql_falls_silent(through: Broker, proxy: Proxy) -> None:
    await push(through, "q", 1)
    popped = await through.pop("q")
    proxy.swallows_replies = True

    with trio.fail_after(PATIENCE_SECONDS):
        assert await push(through, "q", 2)
    assert through.engine.store.away
    with trio.fail_after(1):  # at once: nobody waits for a connection
        assert await push(through, "q", 3)
        with pytest.raises(StorageUnavailable):
            await through.ack(popped.messages, lease=popped.lease)
        with pytest.raises(StorageUnavailable):
            await through.pop("q")
    proxy.heal()

    with trio.fail_after(PATIENCE_SECONDS):
        await through.wait_until(lambda: not through.engine.spooling.active, PATIENCE_SECONDS)
    assert all(result.success for result in await through.ack(popped.messages, lease=popped.lease))
    assert await through.drain("q") == [2, 3]


async def test_an_ack_under_way_when_postgresql_falls_silent_is_of_unknown_outcome(
    through: Broker, proxy: Proxy
) -> None:
    await push(through, "q", 1)
    popped = await through.pop("q")
    proxy.swallows_replies = True

    with trio.fail_after(PATIENCE_SECONDS), pytest.raises(OutcomeUnknown):
        await through.ack(popped.messages, lease=popped.lease)
    proxy.heal()
    await through.wait_until(lambda: not through.engine.store.away, PATIENCE_SECONDS)

    assert all(result.success for result in await through.ack(popped.messages, lease=popped.lease))
    assert await through.drain("q") == []


async def test_pushes_written_with_pops_when_postgresql_falls_silent_are_stored_once(
    through: Broker, proxy: Proxy, sql: Session
) -> None:
    """Their statement has committed, and nobody has heard of it."""
    await push(through, "q", 0)
    await through.drain("q")
    proxy.swallows_replies = True

    async def pop() -> None:
        with pytest.raises((StorageUnavailable, OutcomeUnknown)):
            await through.pop("q")

    with trio.fail_after(2 * PATIENCE_SECONDS):
        async with trio.open_nursery() as requests:
            for number in range(1, 6):
                requests.start_soon(push, through, "q", number)
                requests.start_soon(pop)
    proxy.heal()

    with trio.fail_after(PATIENCE_SECONDS):
        await through.wait_until(lambda: not through.engine.spooling.active, PATIENCE_SECONDS)
    assert await sql.fetchval("SELECT sum(message_count) FROM queen.segments") == 6


async def test_a_pop_that_waits_sleeps_through_the_silence(through: Broker, proxy: Proxy) -> None:
    await push(through, "q", 0)
    await through.drain("q")
    found: list[Any] = []

    async def consume() -> None:
        found.extend((await through.pop("q", wait=60)).data)

    with trio.fail_after(3 * PATIENCE_SECONDS):
        async with trio.open_nursery() as consumers:
            consumers.start_soon(consume)
            await through.wait_parked(1)
            proxy.swallows_replies = True
            await through.wait_until(lambda: through.engine.store.away, PATIENCE_SECONDS)
            assert await push(through, "q", 1)
            proxy.heal()

    assert found == [1]


async def test_the_connection_of_one_answer_that_is_lost_is_cut_while_the_others_serve(
    through: Broker, proxy: Proxy, sql: Session
) -> None:
    await push(through, "q", 1)
    spooled: list[bool] = []

    async def push_two() -> None:
        spooled.append(await push(through, "q", 2))

    with trio.fail_after(PATIENCE_SECONDS):
        async with trio.open_nursery() as producers:
            proxy.swallows_replies = True
            producers.start_soon(push_two)
            await sql.wait_for("SELECT sum(next_offset) = 2 FROM queen.partitions")
            proxy.heal()
            assert (await through.pop("q", batch=1)).data == [1]  # on another connection

    assert spooled == [True]
    assert not through.engine.store.away
    await through.wait_until(lambda: not through.engine.spooling.active, PATIENCE_SECONDS)
    assert await sql.fetchval("SELECT sum(next_offset) FROM queen.partitions") == 2


async def test_a_connection_whose_backend_has_stopped_is_cut_while_the_others_serve(
    open_broker: Any, settings: Settings, sql: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("queen.storage.connect._STATEMENT_MARGIN_SECONDS", 0.5)
    async with open_broker(db_statement_timeout_seconds=0.5) as broker:
        await push(broker, "q", 1)
        await sql.execute("BEGIN")
        await sql.execute("LOCK TABLE queen.partitions IN ACCESS EXCLUSIVE MODE")
        answers: list[BaseException] = []

        async def push_two() -> None:
            try:
                await push(broker, "q", 2)
            except QueenError as error:
                answers.append(error)

        with trio.fail_after(PATIENCE_SECONDS):
            async with trio.open_nursery() as producers:
                producers.start_soon(push_two)
                await sql.wait_for("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
                pid = await sql.fetchval("SELECT pid FROM pg_locks WHERE NOT granted")
                os.kill(pid, signal.SIGSTOP)  # its timeout does not reach it any more
                try:
                    await sql.execute("ROLLBACK")
                    assert (await broker.pop("q")).data == [1]
                    await broker.wait_until(lambda: bool(answers), PATIENCE_SECONDS)
                finally:
                    os.kill(pid, signal.SIGCONT)

        assert [type(answer) for answer in answers] == [OutcomeUnknown]
        assert not broker.engine.store.away
