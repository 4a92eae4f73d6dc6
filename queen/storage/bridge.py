"""The one crossing between Trio and asyncio: database work goes in by a channel, its outcome comes back.

Every connection belongs to one *runner*, a Trio task that was started inside the asyncio loop of trio-asyncio. That
loop is a context variable, which tasks spawned elsewhere (request handlers) do not inherit; so nobody else touches
asyncpg. A job is an asyncio-flavored function given the runner's connection; the runner crosses once for all of it.

Cancelling a caller abandons its outcome, never the job: what was begun is finished, and no connection is left dirty.
Idle runners are used last-in first-out, so that a quiet server keeps few connections warm, with their plans. Where some
are open, no job waits for another one to be opened, which takes ten times as long as most jobs: it is opened beside
them, one at a time, and the job is done by whoever is first.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import asyncpg
import structlog
import trio
import trio_asyncio
from outcome import Error, Outcome, Value

from queen.errors import Draining, OutcomeUnknown, Overloaded, QueenError, StorageUnavailable
from queen.observability.doing import DatabaseJob
from queen.storage.connect import Backend, Connection, hang_up, has_news
from queen.storage.translate import CONNECTION_LOST, RETRYABLE, translate, was_undone

T = TypeVar("T")
Connect = Callable[[], Awaitable[Connection]]
"""asyncio-flavored: opens one connection."""

Prepare = Callable[[Connection], Awaitable[None]]
"""asyncio-flavored: makes a connection that was opened beside the jobs as quick as one that has been used."""

MAX_WAITING_JOBS: Final = 4096
"""Jobs that may wait for a runner. Each is a request or a batch of them; past this the server is beyond recovery
by waiting and says so (503)."""

_CONFLICT_TRIES: Final = 5
_CLOSE_SECONDS: Final = 2.0

_OPEN_SECONDS: Final = 5.0
"""For opening a connection that no job waits for yet, and making it quick. It takes a fiftieth of a second."""

log = structlog.get_logger("queen.storage")


@dataclass(eq=False, slots=True)
class _Job(Generic[T]):
    work: Callable[[Connection], Awaitable[T]]
    writes: bool
    done: trio.Event = field(default_factory=trio.Event)
    task: trio.lowlevel.Task = field(default_factory=trio.lowlevel.current_task)  # that waits for it
    since: float = field(default_factory=trio.current_time)  # asked for, then begun
    outcome: Outcome[T] | None = None

    def finish(self, result: Outcome[T]) -> None:
        self.outcome = result
        self.done.set()


class Bridge:
    """Runs database work on at most ``connections`` connections. Open it with :func:`open_bridge`."""

    def __init__(self, connect: Connect, connections: int, prepare: Prepare | None = None) -> None:
        self._connect = connect
        self.prepare = prepare
        self.connections = connections
        self._waiting: deque[_Job[Any]] = deque()
        self._idle: list[_Runner] = []
        self._runners: list[_Runner] = []
        self._closed = False
        self.away = False  # PostgreSQL does not answer: work is refused at once
        self.back = trio.Event()  # set while it does
        self.back.set()
        self.suspicion = trio.Event()  # something broke: whoever watches is to look
        self.generation = 0  # grows when PostgreSQL goes away: connections of before are not used again
        self.done = 0
        self.errors = 0

    async def run(self, work: Callable[[Connection], Awaitable[T]], *, writes: bool = True) -> T:
        """Do ``work`` (asyncio flavor) on a connection and return its result.

        Conflicts that PostgreSQL undid are tried again; reads are tried again once on a fresh connection when the
        old one proves dead. Raises the translated error. Checkpoints.
        """
        if self._closed:
            raise Draining("storage is closed")
        if self.away:
            raise _unreachable()
        if len(self._waiting) >= MAX_WAITING_JOBS:
            raise Overloaded("too many requests wait for PostgreSQL; try again")
        job = _Job(work, writes)
        if self._idle and (self._idle[-1].is_open or not any(runner.is_open for runner in self._runners)):
            self._idle.pop().give(job)
        else:
            self._waiting.append(job)
            self.open_one_more()
        await job.done.wait()
        assert job.outcome is not None
        return job.outcome.unwrap()

    def open_one_more(self) -> None:
        """If there are jobs that wait and connections that are not open: one at a time, others have work to do."""
        if self._waiting and self._idle and not any(runner.opening for runner in self._runners):
            self._idle.pop().open()

    def statistics(self) -> dict[str, int]:
        """Connections and waiting jobs, for gauges."""
        return {
            "size": len(self._runners),
            "idle": len(self._idle),
            "waiting": len(self._waiting),
            "done": self.done,
            "errors": self.errors,
        }

    def doing(self) -> list[DatabaseJob]:
        """What is being done, and what waits for a connection to do it on."""
        now = trio.current_time()
        running = [job for runner in self._runners if (job := runner.doing(now)) is not None]
        return running + [DatabaseJob(_name(job), now - job.since, job.task, None) for job in self._waiting]

    def count(self, result: Outcome[Any]) -> None:
        """A job ended. What the client did wrong is no error of storage."""
        self.done += 1
        if isinstance(result, Error) and isinstance(result.error, (StorageUnavailable, OutcomeUnknown)):
            self.suspicion.set()
        if isinstance(result, Error) and getattr(result.error, "status", 500) >= 500:
            self.errors += 1

    def next_job(self, runner: _Runner) -> _Job[Any] | None:
        """The next waiting job, or None after the runner was put among the idle."""
        if self._waiting:
            return self._waiting.popleft()
        self._idle.append(runner)
        return None

    async def open_connection(self) -> Connection:
        """asyncio flavor."""
        if self.away:
            raise _unreachable()
        try:
            return await self._connect()
        except asyncpg.TooManyConnectionsError as error:
            raise translate(error, sent=False) from error
        except (*CONNECTION_LOST, asyncpg.PostgresError) as error:  # away, or there and refusing us
            raise _unreachable() from error

    def oldest_seconds(self) -> float:
        """How long the oldest of the running jobs has been running."""
        now = trio.current_time()
        return max((now - runner.busy_since for runner in self._runners if runner.busy_since is not None), default=0.0)

    def connections_older_than(self, seconds: float) -> dict[Backend, Connection]:
        """The direct connections, by their backends, of jobs that have been running for longer."""
        before = trio.current_time() - seconds
        late = [r.connection for r in self._runners if r.busy_since is not None and r.busy_since <= before]
        return {
            c.backend: c for c in late if c is not None and c.backend is not None and c.direct and not c.is_closed()
        }

    async def go_away(self) -> None:
        """asyncio flavor. PostgreSQL does not answer: cut off what runs, refuse what waits and all that is to come."""
        self.away = True
        self.back = trio.Event()
        self.generation += 1
        while self._waiting:
            self._waiting.popleft().finish(Error(_unreachable()))
        for runner in self._runners:
            if runner.busy_since is not None and runner.connection is not None:
                runner.connection.terminate()
        await asyncio.sleep(0)  # the loop closes their sockets

    def come_back(self) -> None:
        """PostgreSQL answers."""
        self.away = False
        self.back.set()

    def close(self) -> None:
        """Take no more jobs; those that wait are refused, those that run are finished by their runners."""
        self._closed = True
        while self._waiting:
            self._waiting.popleft().finish(Error(Draining("the server is shutting down; nothing was applied")))
        for runner in self._runners:
            runner.stop()


class _Runner:
    """One task, one connection."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._connection: Connection | None = None
        self._wake = trio.Event()
        self._given: _Job[Any] | None = None
        self._generation = 0
        self.busy_since: float | None = None  # Trio time at which the running job was begun
        self._doing: _Job[Any] | None = None
        self.opening = False  # a connection, without a job to do on it
        self._stopping = False

    def doing(self, now: float) -> DatabaseJob | None:
        job, connection = self._doing, self._connection
        if job is None:
            return None
        open = connection is not None and not connection.is_closed()
        pid = connection.get_server_pid() if open and connection is not None else None
        return DatabaseJob(_name(job), now - job.since, job.task, pid)

    def give(self, job: _Job[Any]) -> None:
        self._given = job
        self._wake.set()

    def open(self) -> None:
        """Open the connection, and then do what waits."""
        self.opening = True
        self._wake.set()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Until stopped: take a job, cross into asyncio, hand the outcome back."""
        try:
            while True:
                job, self._given = self._given, None
                if self.opening and not self._stopping:
                    await trio_asyncio.aio_as_trio(self._open)()
                    self.opening = False
                if job is None and not self._stopping:
                    self._wake = trio.Event()
                    job = self._bridge.next_job(self)
                    self._bridge.open_one_more()
                    if job is None:
                        await self._wake.wait()
                        continue
                if job is None:
                    return
                job.since, self._doing = trio.current_time(), job
                try:
                    self.busy_since = trio.current_time()
                    result = await trio_asyncio.aio_as_trio(self._do)(job)
                    self.busy_since = None
                    self._bridge.count(result)
                    job.finish(result)
                except BaseException:
                    job.finish(Error(Draining("the server is shutting down; the outcome is not known")))
                    raise
                finally:
                    self._doing = None
        finally:
            with trio.move_on_after(_CLOSE_SECONDS, shield=True):  # a goodbye to PostgreSQL, not worth more
                await trio_asyncio.aio_as_trio(self._disconnect)()

    @property
    def connection(self) -> Connection | None:
        return self._connection

    @property
    def is_open(self) -> bool:
        """Whether there is a connection to do a job on, as far as is known without asking."""
        connection = self._connection
        return (
            connection is not None
            and not self.opening
            and not connection.is_closed()
            and self._generation == self._bridge.generation
        )

    async def _open(self) -> None:
        """asyncio flavor: never raises but on cancel. Where it fails, the next job here meets the reason."""
        try:
            if self._connection is not None:
                await hang_up(self._connection)
            self._generation = self._bridge.generation
            await asyncio.wait_for(self._open_patiently(), _OPEN_SECONDS)
        except (QueenError, *CONNECTION_LOST, asyncpg.PostgresError) as error:
            log.info("a connection was not opened", error=str(error))
            if self._connection is not None:
                await hang_up(self._connection)
                self._connection = None

    async def _open_patiently(self) -> None:
        """asyncio flavor."""
        self._connection = opened = await self._bridge.open_connection()
        if self._bridge.prepare is not None:
            await self._bridge.prepare(opened)

    def _is_spent(self, connection: Connection) -> bool:
        """Whether an open connection is not to be used again."""
        return not connection.is_closed() and (self._generation != self._bridge.generation or has_news(connection))

    async def _do(self, job: _Job[T]) -> Outcome[T]:
        """asyncio flavor: never raises but on cancel."""
        for attempt in range(_CONFLICT_TRIES):
            sent = False
            try:
                if self._connection is not None and self._is_spent(self._connection):
                    await hang_up(self._connection)
                if self._connection is None or self._connection.is_closed():
                    self._generation = self._bridge.generation
                    self._connection = await self._bridge.open_connection()
                sent = True
                return Value(await job.work(self._connection))
            except RETRYABLE as error:
                if attempt + 1 == _CONFLICT_TRIES:
                    return Error(translate(error, sent=job.writes))
                log.info("storage conflict, trying again", sqlstate=error.sqlstate, attempt=attempt + 1)
            except CONNECTION_LOST as error:
                if self._connection is not None:
                    await hang_up(self._connection)
                    self._connection = None
                if sent and attempt == 0 and (not job.writes or was_undone(error)):
                    continue
                return Error(translate(error, sent=sent and job.writes))
            except Exception as error:  # noqa: BLE001  the caller gets it; the runner serves others
                return Error(translate(error, sent=job.writes))
        raise AssertionError("unreachable")

    async def _disconnect(self) -> None:
        """asyncio flavor."""
        if self._connection is not None and not self._connection.is_closed():
            try:
                await self._connection.close(timeout=_CLOSE_SECONDS)
            except (*CONNECTION_LOST, asyncio.CancelledError):
                await hang_up(self._connection)


def _name(job: _Job[Any]) -> str:
    """The method that the work belongs to, as in ``Pushes.write``."""
    return job.work.__qualname__.partition(".<locals>")[0]


def _unreachable() -> StorageUnavailable:
    return StorageUnavailable("PostgreSQL cannot be reached; nothing was applied; try again")


@asynccontextmanager
async def open_bridge(connect: Connect, connections: int, prepare: Prepare | None = None) -> AsyncIterator[Bridge]:
    """Start the runners; on exit finish running jobs, refuse waiting ones, close connections. Call it inside
    ``open_asyncio()``."""
    async with trio.open_nursery() as runners:
        bridge = Bridge(connect, connections, prepare)
        for _ in range(connections):
            runner = _Runner(bridge)
            bridge._runners.append(runner)
            runners.start_soon(runner.run)
        try:
            yield bridge
        finally:
            bridge.close()
