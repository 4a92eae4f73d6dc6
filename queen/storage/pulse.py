"""Whether PostgreSQL answers: told from slow work within two seconds, and told again when it is back. Decides nothing.

A connection that is cut is noticed by whoever uses it. One whose other end has stopped, or is behind a network that
swallows packets, is silent, and so is a statement that waits for a lock. To tell them apart a connection of its own
is asked when work takes longer than usual or breaks: if that one, and then a fresh one, do not answer either,
PostgreSQL is *away*: work at hand is cut off, and what is asked for is refused at once, until a connection can be
opened.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Final

import asyncpg
import structlog
import trio
import trio_asyncio

from queen.beat import next_beat
from queen.storage.bridge import Bridge, Connect
from queen.storage.connect import Connection, hang_up
from queen.storage.translate import CONNECTION_LOST

LOOK_SECONDS: Final = 0.25
"""Between two looks at how long work takes. A look reads a few floats."""

STUCK_SECONDS: Final = 0.5
"""Work of this age is a reason to ask: flushes and claims take milliseconds."""

ASK_SECONDS: Final = 1.0
"""How long an answer may take on the connection that is kept; with the rest of this page at most 2 s until away."""

ASK_AGAIN_SECONDS: Final = 0.4
"""How long a fresh connection and its answer may take after that."""

CUT_TRIES: Final = 3
"""Fresh connections that are cut in a row before PostgreSQL counts as away."""

STALL_SECONDS: Final = 0.2
"""If a wait ends this much later than it should, it was this process that did not run: the answer may lie there."""

LOST_SECONDS: Final = 2.0
"""Work of this age, on a connection whose backend waits for us: its answer is lost."""

_PAUSE_SECONDS: Final = 0.05
_RECONNECT_SECONDS: Final = 0.2
_CONNECT_SECONDS: Final = 2.0

_LOST: Final = """
    SELECT late.place
    FROM unnest($1::int[], $2::timestamptz[]) WITH ORDINALITY AS late (pid, started_at, place)
    LEFT JOIN pg_stat_activity a ON a.pid = late.pid AND a.backend_start = late.started_at
    WHERE a.pid IS NULL
        OR (a.state <> 'active' OR a.wait_event = 'ClientRead')
            AND a.state_change < clock_timestamp() - make_interval(secs => $3)
        OR a.state_change < clock_timestamp() - make_interval(secs => $4)
"""

log = structlog.get_logger("queen.storage")


class Pulse:
    """See the module.

    Args:
        prepare: asyncio flavor; done on the first connection that can be opened, when there was none at the start.
        direct: there is no pooler between us and PostgreSQL, so that backends are known by their process ids.
        patience_seconds: how long a statement may take. One that PostgreSQL does not end by itself before has stopped.
    """

    def __init__(
        self,
        bridge: Bridge,
        connect: Connect,
        *,
        prepare: Callable[[Connection], Awaitable[None]] | None = None,
        direct: bool = True,
        patience_seconds: float = math.inf,
    ) -> None:
        self._bridge = bridge
        self._connect = connect
        self._prepare = prepare
        self._direct = direct
        self._patience_seconds = patience_seconds
        self._connection: Connection | None = None
        self._away_since = 0.0
        self._looked = trio.Event()  # set, and another made, after each try to reach it while it is away
        self.on_away: Callable[[], None] = lambda: None
        self.on_back: Callable[[], None] = lambda: None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch until cancelled. Call inside the asyncio loop's context."""
        self._away_since = trio.current_time()
        task_status.started()
        try:
            if not self._bridge.away:
                await trio_asyncio.aio_as_trio(self._ask)(_CONNECT_SECONDS)
            while True:
                await (self._wait_back() if self._bridge.away else self._watch())
        finally:
            with trio.move_on_after(1, shield=True):  # a goodbye to PostgreSQL, not worth more
                await trio_asyncio.aio_as_trio(self._hang_up)()

    async def look(self) -> bool:
        """While it is away: try to reach it now. Whether it answers."""
        if self._bridge.away:
            self._bridge.suspicion.set()
            await self._looked.wait()
        return not self._bridge.away

    async def _watch(self) -> None:
        bridge = self._bridge
        with trio.move_on_at(next_beat(LOOK_SECONDS)):
            await bridge.suspicion.wait()
        if not bridge.suspicion.is_set() and bridge.oldest_seconds() < STUCK_SECONDS:
            return
        bridge.suspicion = trio.Event()
        if await self._answers():
            if self._direct and bridge.oldest_seconds() >= LOST_SECONDS:
                await trio_asyncio.aio_as_trio(self._cut_lost)()
            await trio.sleep(_PAUSE_SECONDS)
            return
        self._away_since = trio.current_time()
        log.error("PostgreSQL does not answer")
        await trio_asyncio.aio_as_trio(bridge.go_away)()
        self.on_away()

    async def _answers(self) -> bool:
        """Whether it does, on the connection that is kept or on a fresh one."""
        while True:
            started_at = trio.current_time()
            if await trio_asyncio.aio_as_trio(self._ask)(ASK_SECONDS):
                return True
            took_seconds = trio.current_time() - started_at
            if took_seconds < ASK_SECONDS / 2:  # it was cut, not silent
                return await self._lets_in()
            if took_seconds < ASK_SECONDS + STALL_SECONDS:
                started_at = trio.current_time()
                if await trio_asyncio.aio_as_trio(self._ask)(ASK_AGAIN_SECONDS):
                    return True
                if trio.current_time() - started_at < ASK_AGAIN_SECONDS + STALL_SECONDS:
                    return False

    async def _lets_in(self) -> bool:
        """Whether a fresh connection gets an answer. Whoever ends backends may end that one, too."""
        for _ in range(CUT_TRIES):
            started_at = trio.current_time()
            if await trio_asyncio.aio_as_trio(self._ask)(ASK_SECONDS):
                return True
            if trio.current_time() - started_at >= ASK_SECONDS / 2:
                break
        return False

    async def _wait_back(self) -> None:
        self._bridge.suspicion = trio.Event()
        if not await trio_asyncio.aio_as_trio(self._ask)(_CONNECT_SECONDS):
            self._tell_looked()
            with trio.move_on_after(_RECONNECT_SECONDS):
                await self._bridge.suspicion.wait()
            return
        if self._prepare is not None:
            await trio_asyncio.aio_as_trio(self._prepare_database)()
            return  # ask once more
        self._bridge.come_back()
        self._tell_looked()
        log.warning("PostgreSQL answers again", away_seconds=round(trio.current_time() - self._away_since, 1))
        self.on_back()

    def _tell_looked(self) -> None:
        self._looked.set()
        self._looked = trio.Event()

    async def _ask(self, seconds: float) -> bool:
        """asyncio flavor. Whether there is an answer in time."""
        try:
            await asyncio.wait_for(self._ask_patiently(), seconds)
        except (*CONNECTION_LOST, asyncpg.PostgresError):
            await self._hang_up()
            return False
        return True

    async def _ask_patiently(self) -> None:
        if self._connection is None or self._connection.is_closed():
            self._connection = await self._connect()
        await self._connection.fetchval("SELECT 1")

    async def _prepare_database(self) -> None:
        """asyncio flavor. A database that goes away again meanwhile is waited for again."""
        assert self._connection is not None
        assert self._prepare is not None
        try:
            await self._prepare(self._connection)
        except CONNECTION_LOST:
            await self._hang_up()
            return
        self._prepare = None

    async def _cut_lost(self) -> None:
        """asyncio flavor. Hang up connections whose backend has answered long ago, is gone, or does not go on."""
        suspects = self._bridge.connections_older_than(LOST_SECONDS)
        if self._connection is None or not suspects:
            return
        backends = list(suspects)
        try:
            rows = await self._connection.fetch(
                _LOST,
                [backend.pid for backend in backends],
                [backend.started_at for backend in backends],
                LOST_SECONDS - STUCK_SECONDS,
                self._patience_seconds,
                timeout=ASK_SECONDS,
            )
        except (*CONNECTION_LOST, asyncpg.PostgresError):
            await self._hang_up()
            return
        still = self._bridge.connections_older_than(LOST_SECONDS)
        for row in rows:
            backend = backends[row["place"] - 1]
            if still.get(backend) is suspects[backend]:
                log.error("an answer of PostgreSQL is lost: its connection is cut", pid=backend.pid)
                await hang_up(suspects[backend])

    async def _hang_up(self) -> None:
        """asyncio flavor."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await hang_up(connection)
