"""Wake-up hints between workers: LISTEN in, NOTIFY out. A hint may be lost or spurious; nothing depends on one.

NOTIFY goes out after the commit it tells of, in a transaction that writes nothing: inside the writing transaction it
would take a global lock across that transaction's fsync.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Final

import asyncpg
import structlog
import trio
import trio_asyncio

from queen.storage.bridge import Bridge, Connect
from queen.storage.connect import Connection, hang_up
from queen.storage.translate import CONNECTION_LOST

CHANNEL: Final = "queen_wake"
_MAX_PAYLOAD: Final = 7900
"""PostgreSQL takes payloads of less than 8,000 bytes."""

_PING_SECONDS: Final = 10.0
_RECONNECT_SECONDS: Final = 0.5

log = structlog.get_logger("queen.storage")


class Notifications:
    """Sends keys to the other workers and hands theirs to ``on_keys``; ``on_gap`` is called whenever hints may have
    been missed (the connection was away). Both run on the Trio thread and must not block."""

    def __init__(self, bridge: Bridge, connect: Connect) -> None:
        self._bridge = bridge
        self._connect = connect
        self._sender = os.urandom(6).hex()
        self.on_keys: Callable[[Sequence[str]], None] = lambda keys: None
        self.on_gap: Callable[[], None] = lambda: None
        self.listening = False

    async def send(self, keys: Sequence[str]) -> None:
        """Tell the other workers. Keys are short texts without commas."""

        async def work(connection: Connection) -> None:
            for payload in self._payloads(keys):
                await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, payload)

        await self._bridge.run(work, writes=False)

    def _payloads(self, keys: Sequence[str]) -> Iterator[str]:
        payload = self._sender
        for key in keys:
            if len(payload) + len(key) + 1 > _MAX_PAYLOAD:
                yield payload
                payload = self._sender
            payload += "," + key
        yield payload

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled; reconnect when the connection breaks. Call inside the asyncio loop's context."""
        task_status.started()
        while True:
            await trio_asyncio.aio_as_trio(self._listen)()
            self.listening = False
            await trio.sleep(_RECONNECT_SECONDS)

    async def _listen(self) -> None:
        """asyncio flavor. Returns when the connection is lost."""
        gone = asyncio.Event()
        try:
            connection = await self._connect()
        except (*CONNECTION_LOST, asyncpg.PostgresError) as error:
            log.debug("listening failed, will try again", error=type(error).__name__)
            return
        try:
            connection.add_termination_listener(lambda _: gone.set())
            await connection.add_listener(CHANNEL, self._received)
            self.listening = True
            self.on_gap()
            while not gone.is_set():
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(gone.wait(), _PING_SECONDS)
                    break
                await connection.fetchval("SELECT 1", timeout=_PING_SECONDS)
        except (*CONNECTION_LOST, asyncpg.PostgresError) as error:
            log.info("listening connection lost, will reconnect", error=type(error).__name__)
        finally:
            await hang_up(connection)

    def _received(self, _connection: Any, _pid: int, _channel: str, payload: object) -> None:
        sender, *keys = str(payload).split(",")
        if sender != self._sender and keys:
            self.on_keys(keys)
