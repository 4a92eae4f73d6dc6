"""What the engine asks of storage, in one value. Opens and closes everything below; decides nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Final

import asyncpg
import outcome
import structlog
import trio
import trio_asyncio

from queen.config.settings import Settings
from queen.errors import QueenError, StartupError
from queen.model.queue import Queue
from queen.observability.activity import Activity
from queen.observability.doing import Backend, DatabaseJob
from queen.storage.acks import Acks
from queen.storage.bridge import Bridge, Connect, open_bridge
from queen.storage.catalogue import Catalogue
from queen.storage.claims import Claims
from queen.storage.connect import Connection, explain_unreachable, open_connection, statement_patience
from queen.storage.counts import Counts
from queen.storage.dead_letters import DeadLetters
from queen.storage.expiry import Expiry
from queen.storage.groups import Groups
from queen.storage.loop import open_asyncio
from queen.storage.messages import Messages
from queen.storage.metrics import Metrics
from queen.storage.migrate import migrate
from queen.storage.notify import Notifications
from queen.storage.pulse import Pulse
from queen.storage.pushes import Pushes
from queen.storage.redrive import Redrive
from queen.storage.reencrypt import Reencryption
from queen.storage.resources import Resources
from queen.storage.segments import Keyring
from queen.storage.streams import Streams
from queen.storage.traces import Traces
from queen.storage.translate import CONNECTION_LOST
from queen.storage.turnover import Turnover
from queen.storage.warm import run_for_nothing, warm

log = structlog.get_logger("queen.storage")

_HEALTH_SECONDS: Final = 1.5
_NOT_NOW: Final = (asyncpg.TooManyConnectionsError, asyncpg.ObjectNotInPrerequisiteStateError)
"""PostgreSQL is there and takes no connection: it may later."""

_STARTUP_SECONDS: Final = 5.0
_STARTUP_PAUSE_SECONDS: Final = 0.1
_BACKENDS: Final = """
    SELECT a.pid, coalesce(a.state, '') AS state,
        coalesce(a.wait_event_type || ' ' || a.wait_event, '') AS waits_for,
        left(regexp_replace(a.query, '\\s+', ' ', 'g'), 160) AS statement,
        greatest(0, extract(epoch FROM clock_timestamp() -
            CASE WHEN a.state = 'active' THEN a.query_start ELSE a.state_change END))::float8 AS seconds,
        pg_blocking_pids(a.pid) AS blocked_by
    FROM pg_stat_activity a WHERE a.pid = ANY ($1::int[])
"""


def keyring_of(settings: Settings) -> Keyring:
    """The encryption keys that the settings name."""
    return Keyring(
        bytes.fromhex(settings.encryption_key.reveal()) if settings.encryption_key else None,
        [bytes.fromhex(key.reveal()) for key in settings.encryption_keys],
    )


class Store:
    """Durable storage. The parts are public: each is one subject."""

    def __init__(
        self,
        bridge: Bridge,
        onlooker: Bridge,
        pulse: Pulse,
        notifications: Notifications,
        settings: Settings,
        buckets: int,
    ) -> None:
        keyring = self.keyring = keyring_of(settings)
        self._bridge = bridge
        self._onlooker = onlooker
        self._pulse = pulse
        self.buckets = buckets
        self.notifications = notifications
        self.catalogue = Catalogue(bridge, buckets, settings.queue_defaults)
        self.pushes = Pushes(bridge, self.catalogue, keyring, buckets)
        self.claims = Claims(bridge, keyring, buckets, settings.cache_bytes)
        self.expiry = Expiry(bridge, keyring, buckets)
        self.claims.on_expired = self.expiry.notice
        self.acks = Acks(bridge, self.catalogue, self.pushes, self.claims.delivered, keyring, buckets)
        self.turnover = Turnover(bridge, self.pushes, self.acks, self.claims, keyring)
        self.streams = Streams(bridge, self.catalogue, self.pushes, keyring, buckets)
        self.counts = Counts(bridge, buckets)
        self.groups = Groups(bridge, self.catalogue, self.counts)
        self.dead_letters = DeadLetters(bridge, keyring, self.counts)
        self.messages = Messages(bridge, self.catalogue, keyring, self.counts)
        self.redrive = Redrive(bridge, self.catalogue, self.pushes, keyring, buckets)
        self.resources = Resources(bridge, self.counts)
        self.reencryption = Reencryption(bridge, keyring)
        self.traces = Traces(bridge, keyring, buckets)
        self.metrics = Metrics(bridge)
        self.activity = Activity()
        self.on_back: Callable[[], None] = lambda: None  # told when PostgreSQL answers again; must not block
        self.pushes.activity = self.claims.activity = self.acks.activity = self.streams.activity = self.activity

    @property
    def away(self) -> bool:
        """Whether PostgreSQL is known not to answer: whatever is asked of it is refused at once."""
        return self._bridge.away

    async def wait_back(self) -> None:
        """Until PostgreSQL is not known to be away."""
        await self._bridge.back.wait()

    async def is_healthy(self) -> bool:
        """Whether PostgreSQL answers within a short deadline."""

        async def ask(connection: Connection) -> int:
            return int(await connection.fetchval("SELECT 1", timeout=_HEALTH_SECONDS))

        with trio.move_on_after(_HEALTH_SECONDS):
            try:
                if not await self._pulse.look():
                    return False
                return await self._bridge.run(ask, writes=False) == 1
            except QueenError:
                return False
        return False

    async def born(self) -> str:
        """When the database was initialised, which no two of them have in common."""

        async def ask(connection: Connection) -> str:
            row = await connection.fetchval("SELECT initialised_at FROM queen.meta")
            return str(row.isoformat())

        return await self._bridge.run(ask, writes=False)

    async def now(self) -> datetime:
        """PostgreSQL's clock."""

        async def ask(connection: Connection) -> datetime:
            return await connection.fetchval("SELECT clock_timestamp()")  # type: ignore[no-any-return]

        return await self._bridge.run(ask, writes=False)

    async def expire(self, queue: Queue, limit: int) -> int:
        """See :meth:`queen.storage.expiry.Expiry.expire`."""
        return await self.expiry.expire(queue, limit)

    def doing(self) -> list[DatabaseJob]:
        """The database work at hand."""
        return self._bridge.doing()

    async def backends(self, pids: Iterable[int]) -> list[Backend]:
        """What PostgreSQL says of those connections, on one of its own: the others may all be busy, or blocked.

        That one is opened when somebody asks, and closed again.
        """

        async def look(connection: Connection) -> list[Backend]:
            rows = await connection.fetch(_BACKENDS, list(pids))
            await connection.close()
            return [Backend(**{**row, "blocked_by": tuple(row["blocked_by"])}) for row in rows]

        return await self._onlooker.run(look, writes=False)

    def statistics(self) -> dict[str, int]:
        """Connections and jobs waiting for one."""
        return self._bridge.statistics()


async def _prepare(connect: Connect, buckets: int, patience_seconds: float) -> int:
    """asyncio flavor. Migrate; return the number of buckets. A PostgreSQL that is just starting is waited for."""
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            connection = await connect()
            break
        except CONNECTION_LOST as error:
            if time.monotonic() >= deadline or isinstance(error, asyncpg.InterfaceError):
                raise
            await asyncio.sleep(_STARTUP_PAUSE_SECONDS)
    try:
        return await migrate(connection, buckets)
    finally:
        await connection.close(timeout=2)


@asynccontextmanager
async def open_store(settings: Settings, *, known_buckets: int | None = None) -> AsyncIterator[Store]:
    """Connect, migrate, and serve until the block ends. Raises StartupError with one sentence when it cannot.

    ``known_buckets``: those of the database, from before: then it may be away; what is left undone is done when it is
    back.
    """

    direct = settings.db_statement_cache  # no pooler between us and PostgreSQL

    async def connect() -> Connection:
        return await open_connection(settings)

    async def connect_watched() -> Connection:
        return await open_connection(settings, watched=direct)

    # a loop of its own, so that a failure leaves it as one error and not as a group
    async with open_asyncio():
        patience_seconds = _STARTUP_SECONDS if known_buckets is None else 0.0
        prepared = await outcome.acapture(
            trio_asyncio.aio_as_trio(_prepare), connect, settings.buckets, patience_seconds
        )
    away = False
    try:
        buckets = prepared.unwrap()
    except (*CONNECTION_LOST, *_NOT_NOW) as error:
        if known_buckets is not None and not isinstance(error, asyncpg.InterfaceError):  # that is a bad URL
            away, buckets = True, known_buckets
            log.error("PostgreSQL cannot be reached: starting without it", error=str(error) or type(error).__name__)
        else:
            raise explain_unreachable(settings, error) from error
    except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError) as error:
        raise StartupError(f"PostgreSQL refuses the connection: {error}") from error

    async def prepare(connection: Connection) -> None:
        found = await migrate(connection, settings.buckets)
        if found != buckets:
            raise StartupError(f"the database has {found} buckets, and had {buckets} when it was last seen")

    connections = max(2, settings.db_pool_size // max(1, settings.workers))
    async with (
        open_asyncio(),
        open_bridge(connect_watched, connections, run_for_nothing) as bridge,
        open_bridge(connect, 1) as onlooker,
        trio.open_nursery() as listeners,
    ):
        notifications = Notifications(bridge, connect)
        await listeners.start(notifications.run)
        if away:
            await trio_asyncio.aio_as_trio(bridge.go_away)()
        pulse = Pulse(
            bridge,
            connect,
            prepare=prepare if away else None,
            direct=direct,
            patience_seconds=statement_patience(settings),
        )
        await listeners.start(pulse.run)
        try:
            store = Store(bridge, onlooker, pulse, notifications, settings, buckets)
            pulse.on_back = lambda: store.on_back()
            if not away:
                await warm(bridge)
            yield store
        finally:
            listeners.cancel_scope.cancel()
