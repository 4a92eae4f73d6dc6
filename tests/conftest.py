"""One PostgreSQL for the whole run, a database of its own for every test, and an engine on it.

The PostgreSQL is the embedded one, run without fsync: what is tested here is behaviour, not durability.
QUEEN_TEST_BUCKETS chooses the number of buckets (default 1).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any, ClassVar, Final, TypeVar

import asyncpg
import msgspec
import pytest
import trio

from queen.config.settings import Secret, Settings
from queen.engine.engine import Engine, LeasedBatch, open_engine
from queen.model.message import Ack, AckResult, AckStatus, ClaimedPartition, PopRequest, PushResult
from queen.model.queue import QUEUE_MODE, Queue, QueueOptions, StartFrom
from queen.storage import embedded
from queen.storage.ids import partition_id_of
from queen.storage.store import open_store

T = TypeVar("T")

TEST_KEY: Final = "5e" * 32
READY_SECONDS: Final = 30.0
STOP_SECONDS: Final = 30.0
TEST_SETTINGS: Final = {
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "128MB",
    "autovacuum": "off",  # plans and counters are those of the test alone
    "track_functions": "pl",
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "buckets: what is tested may depend on how partitions lie in buckets")


def plain_runner() -> asyncio.Runner:
    """asyncio as it is: trio-asyncio has made itself the policy, and its loops are not for threads of our own."""
    return asyncio.Runner(loop_factory=asyncio.SelectorEventLoop)


# -- PostgreSQL ---------------------------------------------------------------------------------------------------


class Postgres:
    """A running server. Databases on it are made by cloning a migrated template, one for each number of buckets."""

    def __init__(self, cluster: embedded.Cluster) -> None:
        self._cluster = cluster
        self._numbers = itertools.count(1)
        self._templates: dict[int, str] = {}

    def url(self, database: str) -> str:
        return self._cluster.url.replace("@/postgres?", f"@/{database}?")

    def create_empty(self) -> str:
        """A database without anything in it; its name."""
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        return name

    def create_migrated(self, buckets: int) -> str:
        """A database as the server of today leaves it; its name."""
        if buckets not in self._templates:
            template = f"template_{buckets}"
            self.execute(f"CREATE DATABASE {template}")
            settings = Settings(database_url=Secret(self.url(template)), buckets=buckets, workers=1, db_pool_size=2)
            trio.run(_migrate, settings)
            self._templates[buckets] = template
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {self._templates[buckets]}")
        return name

    def drop(self, database: str) -> None:
        self.execute(f"DROP DATABASE {database} WITH (FORCE)")

    def execute(self, statement: str) -> None:
        async def work() -> None:
            connection = await asyncpg.connect(self.url("postgres"))
            try:
                await connection.execute(statement)
            finally:
                await connection.close()
                await asyncio.sleep(0)  # asyncio closes the socket a turn later

        with plain_runner() as runner:
            runner.run(work())


async def _migrate(settings: Settings) -> None:
    async with open_store(settings):
        pass


async def _make_cluster(home: Path) -> embedded.Cluster:
    async with embedded.open_cluster(home) as cluster:
        return cluster


def _watch(stream: IO[bytes], said: deque[bytes], ready: threading.Event) -> None:
    for line in stream:
        said.append(line)
        if embedded.READY_LINE in line:
            ready.set()
    ready.set()  # it has ended: whoever waits looks


def _memory() -> str | None:
    """A directory in memory, where cloning a database takes a fifth of the time; None where there is no fitting one."""
    path = "/dev/shm"
    if not os.access(path, os.W_OK | os.X_OK):
        return None
    found = os.statvfs(path)
    roomy = found.f_bavail * found.f_frsize >= 2 * 1024**3
    return path if roomy and not found.f_flag & os.ST_NOEXEC else None  # the programs may have to be copied there


GUARD: Final = """
import os, select, shutil, signal, sys
server, home, patience = os.pidfd_open(int(sys.argv[1])), sys.argv[2], float(sys.argv[3])
sys.stdin.buffer.read()
for number in (signal.SIGINT, signal.SIGKILL):
    signal.pidfd_send_signal(server, number)
    if select.select([server], [], [], patience)[0]:
        break
shutil.rmtree(home, ignore_errors=True)
"""
"""Stops the server and removes its directory when its input ends, which it does however the test run ends."""


@contextlib.contextmanager
def _guarded(process: subprocess.Popen[bytes], home: Path) -> Iterator[None]:
    guard = subprocess.Popen(
        [sys.executable, "-c", GUARD, str(process.pid), str(home), str(STOP_SECONDS)],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the test run
    )
    assert guard.stdin is not None
    try:
        yield
    finally:
        guard.stdin.close()
        process.wait()
        guard.wait()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The server of this run, on a unix socket in a directory of its own. Works as root and as an ordinary user."""
    home = Path(tempfile.mkdtemp(prefix="queen-pg-", dir=_memory()))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        home.chmod(0o755)  # as root, PostgreSQL runs as a user that has to pass through
        cluster = trio.run(_make_cluster, home / "data")
        cluster.socket_directory.mkdir(exist_ok=True)
        arguments = [argument for name, value in TEST_SETTINGS.items() for argument in ("-c", f"{name}={value}")]
        process = subprocess.Popen(
            [*cluster.command(), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            **cluster.popen_options(),
        )
        assert process.stderr is not None
        stack.callback(process.stderr.close)
        said: deque[bytes] = deque(maxlen=200)
        ready = threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.stderr, said, ready), daemon=True)
        watcher.start()
        stack.callback(watcher.join)
        stack.enter_context(_guarded(process, home))
        if not ready.wait(READY_SECONDS) or process.poll() is not None:
            pytest.fail("PostgreSQL did not start:\n" + b"".join(said).decode(errors="replace"))
        yield Postgres(cluster)


@pytest.fixture
def buckets() -> int:
    """The number of buckets of this test's database."""
    return int(os.environ.get("QUEEN_TEST_BUCKETS", "1"))


@pytest.fixture
def database_url(postgres: Postgres, buckets: int) -> Iterator[str]:
    """A migrated database that nobody else uses."""
    name = postgres.create_migrated(buckets)
    yield postgres.url(name)
    postgres.drop(name)


@pytest.fixture
def empty_database_url(postgres: Postgres) -> Iterator[str]:
    """A database that queen-trio has never seen."""
    name = postgres.create_empty()
    yield postgres.url(name)
    postgres.drop(name)


# -- SQL beside the engine ----------------------------------------------------------------------------------------


class Session:
    """A connection of the test's own, on a loop of its own: it does not go through what is tested."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._runner = plain_runner()
        self._connection: asyncpg.Connection | None = None
        self._turn = trio.Lock()

    async def fetch(self, query: str, *arguments: Any) -> list[Any]:
        return await self._run(lambda connection: connection.fetch(query, *arguments))

    async def fetchrow(self, query: str, *arguments: Any) -> Any:
        return await self._run(lambda connection: connection.fetchrow(query, *arguments))

    async def fetchval(self, query: str, *arguments: Any) -> Any:
        return await self._run(lambda connection: connection.fetchval(query, *arguments))

    async def execute(self, query: str, *arguments: Any) -> str:
        return str(await self._run(lambda connection: connection.execute(query, *arguments)))

    async def wait_for(self, query: str, *arguments: Any) -> None:
        """Until the query answers true."""
        await wait_until(lambda: self.fetchval(query, *arguments))

    async def run(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """Do ``work`` (asyncio flavor) on the connection."""
        return await self._run(work)

    async def _run(self, work: Callable[[Any], Awaitable[T]]) -> T:
        async def job() -> T:
            if self._connection is None:
                self._connection = await asyncpg.connect(self._url)
            return await work(self._connection)

        async with self._turn:
            return await trio.to_thread.run_sync(self._runner.run, job())

    def close(self) -> None:
        async def goodbye() -> None:
            if self._connection is not None:
                await self._connection.close(timeout=5)
                await asyncio.sleep(0)  # asyncio closes the socket a turn later

        self._runner.run(goodbye())
        self._runner.close()


OpenSession = Callable[[], Session]


def _open_sessions(url: str) -> Iterator[OpenSession]:
    with contextlib.ExitStack() as stack:

        def open_session() -> Session:
            session = Session(url)
            stack.callback(session.close)
            return session

        yield open_session


@pytest.fixture
def sessions(database_url: str) -> Iterator[OpenSession]:
    """Opens connections to the test's database; closed at its end."""
    yield from _open_sessions(database_url)


@pytest.fixture
def open_empty(empty_database_url: str) -> Iterator[OpenSession]:
    """Opens connections to a database that queen-trio has never seen; closed at the test's end."""
    yield from _open_sessions(empty_database_url)


@pytest.fixture
def empty(open_empty: OpenSession) -> Session:
    """SQL on a database that queen-trio has never seen."""
    return open_empty()


@pytest.fixture
def sql(sessions: OpenSession) -> Session:
    """SQL on the test's database, beside the engine."""
    return sessions()


class Outage:
    """Takes the test's database away and gives it back."""

    def __init__(self, postgres: Postgres, sql: Session, database: str) -> None:
        self._postgres = postgres
        self._sql = sql
        self._database = database

    async def begin(self) -> None:
        await self._allow("false")
        await self._sql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    async def end(self) -> None:
        await self._allow("true")

    async def _allow(self, allowed: str) -> None:
        statement = f"ALTER DATABASE {self._database} WITH ALLOW_CONNECTIONS {allowed}"
        await trio.to_thread.run_sync(self._postgres.execute, statement)


@pytest.fixture
async def outage(postgres: Postgres, sql: Session) -> AsyncIterator[Outage]:
    outage = Outage(postgres, sql, await sql.fetchval("SELECT current_database()"))
    yield outage
    await outage.end()


class DatabaseClock:
    """Moves the database's time forward by moving everything stored back."""

    def __init__(self, sql: Session) -> None:
        self._sql = sql

    async def advance(self, seconds: float) -> None:
        """As if ``seconds`` had passed since everything that is stored. What workers hold in memory stays, and so do
        series of measurements, which are keyed by their time."""
        columns = await self._sql.fetch(
            "SELECT table_name,"
            " string_agg(format('%I = %I - make_interval(secs => $1)', column_name, column_name), ', ') AS shifts"
            " FROM information_schema.columns"
            " WHERE table_schema = 'queen' AND data_type = 'timestamp with time zone'"
            " AND table_name NOT IN ('meta', 'migrations')"
            " AND NOT EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid"
            " AND a.attnum = ANY (i.indkey) WHERE i.indisprimary AND a.atttypid = 'timestamptz'::regtype"
            " AND i.indrelid = format('queen.%I', table_name)::regclass)"
            " GROUP BY table_name"
        )

        async def shift(connection: Any) -> None:
            async with connection.transaction():
                for column in columns:
                    await connection.execute(f"UPDATE queen.{column['table_name']} SET {column['shifts']}", seconds)

        await self._sql.run(shift)


@pytest.fixture
def database_clock(sql: Session) -> DatabaseClock:
    return DatabaseClock(sql)


async def wait_until(condition: Callable[[], bool | Awaitable[bool]], seconds: float = 5.0) -> None:
    """Look until it holds, for what happens in another process or is told to nobody. TooSlowError past ``seconds``."""
    with trio.fail_after(seconds):
        while True:
            holds = condition()
            if holds if isinstance(holds, bool) else await holds:
                return
            await trio.sleep(0.002)


# -- the engine ---------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(database_url: str, buckets: int) -> Settings:
    """Those of one of several workers on the test's database, with a key."""
    return Settings(
        database_url=Secret(database_url), buckets=buckets, workers=1, db_pool_size=5, encryption_key=Secret(TEST_KEY)
    )


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A message to push."""

    queue: str
    partition: str = "Default"
    payload: bytes = b"null"
    transaction_id: str | None = None
    trace_id: str | None = None


class Got(msgspec.Struct, frozen=True, kw_only=True):
    """A message popped."""

    id: str
    transaction_id: str
    trace_id: str | None
    producer_sub: str | None
    data: Any
    queue: str
    partition: str
    partition_id: str
    offset: int
    created_at: datetime
    claim: ClaimedPartition


class Popped:
    """What a pop got: nothing (falsy), or a batch read to its end."""

    def __init__(self, batch: LeasedBatch | None, messages: list[Got]) -> None:
        self.batch = batch
        self.messages = messages

    def __len__(self) -> int:
        return len(self.messages)

    def __iter__(self) -> Iterator[Got]:
        return iter(self.messages)

    def __getitem__(self, at: int) -> Got:
        return self.messages[at]

    @property
    def data(self) -> list[Any]:
        return [got.data for got in self.messages]

    @property
    def ids(self) -> list[str]:
        return [got.id for got in self.messages]

    @property
    def partitions(self) -> list[str]:
        """The partitions claimed, in order."""
        return [claim.partition for claim in self.claims]

    @property
    def claims(self) -> tuple[ClaimedPartition, ...]:
        return self.batch.claims if self.batch else ()

    @property
    def lease(self) -> str:
        assert self.lease_or_none is not None
        return self.lease_or_none

    @property
    def lease_or_none(self) -> str | None:
        """None with autoAck."""
        return str(self.batch.lease_id) if self.batch is not None and self.batch.lease_id is not None else None

    async def give_back(self) -> None:
        assert self.batch is not None
        await self.batch.give_back()


class Broker:
    """An engine as a test wants to talk to it: values in, messages out, nothing decided."""

    message: ClassVar = Message
    request: ClassVar = PopRequest
    wait_until: ClassVar = staticmethod(wait_until)

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def looks(self) -> int:
        """Claims sent to storage so far."""
        return self.engine._writes()["pop_writes"]

    @property
    def asked(self) -> int:
        """Pops that looked so far: several may be folded into one claim."""
        return self.engine._writes()["pop_written"]

    @staticmethod
    def partition_id(queue: Queue, partition: str = "Default") -> str:
        return str(partition_id_of(queue.queue_id, partition))

    @staticmethod
    def acks_of(
        messages: Sequence[Got],
        status: AckStatus | None = AckStatus.COMPLETED,
        *,
        lease: str | None = None,
        group: str = QUEUE_MODE,
        error: str | None = None,
    ) -> list[Ack]:
        return [
            Ack(
                transaction_id=got.transaction_id,
                partition_id=got.partition_id,
                status=status,
                lease_id=lease,
                group=group,
                error=error,
            )
            for got in messages
        ]

    async def configure(self, name: str, namespace: str = "", task: str = "", **options: Any) -> Queue:
        queue, _ = await self.engine.configure(name, namespace, task, QueueOptions(**options))
        return queue

    async def push(
        self,
        queue: str,
        *data: Any,
        partition: str = "Default",
        ids: Sequence[str | None] | None = None,
        sub: str | None = None,
    ) -> list[PushResult]:
        """Push values, one message each, with the transaction ids given; ids without data are their own data."""
        values = data or tuple(ids or ())
        texts = ids or [None] * len(values)
        results = await self.engine.push(
            [
                Message(queue=queue, partition=partition, payload=msgspec.json.encode(value), transaction_id=text)
                for value, text in zip(values, texts, strict=True)
            ],
            sub,
        )
        assert isinstance(results, list), "it went to the spool"
        return results

    async def pop(
        self,
        queue: str | None = None,
        *,
        batch: int = 100,
        group: str = QUEUE_MODE,
        wait: float | None = None,
        start: StartFrom | None = None,
        **others: Any,
    ) -> Popped:
        """Pop and read everything. ``wait``: seconds."""
        request = PopRequest(
            queue=queue, group=group, batch=batch, timeout_seconds=wait, start=start or StartFrom(), **others
        )
        taken = await self.engine.pop(request)
        return Popped(taken, await read(taken) if taken else [])

    async def ack(
        self,
        messages: Sequence[Got],
        status: AckStatus | None = AckStatus.COMPLETED,
        *,
        lease: str | None = None,
        group: str = QUEUE_MODE,
        error: str | None = None,
    ) -> list[AckResult]:
        """One request for these messages."""
        return await self.engine.ack(self.acks_of(messages, status, lease=lease, group=group, error=error))

    async def wait_parked(self, count: int) -> None:
        """Until that many pops wait."""
        await wait_until(lambda: self.engine.statistics()["parked"] == count)

    async def drain(self, queue: str, *, group: str = QUEUE_MODE, **others: Any) -> list[Any]:
        """Everything there is, taken with autoAck."""
        data = []
        while popped := await self.pop(queue, batch=1000, group=group, auto_ack=True, **others):
            data += popped.data
        return data


async def read(batch: LeasedBatch) -> list[Got]:
    """The messages of a batch, decoded as the wire would."""
    messages = []
    async for piece in batch.slices():
        lines = piece.lines.split(b"\n")
        assert len(lines) == piece.count
        for at, line in enumerate(lines):
            prefix = piece.id_prefix.encode()
            assert (b"\0" in line) == piece.minted
            value = msgspec.json.decode(b'{"id":"' + prefix + line.replace(b"\0", prefix) + b"}")
            messages.append(
                Got(
                    id=value["id"],
                    transaction_id=value["transactionId"],
                    trace_id=value["traceId"],
                    producer_sub=value["producerSub"],
                    data=value["data"],
                    queue=piece.claim.queue,
                    partition=piece.claim.partition,
                    partition_id=str(piece.claim.partition_id),
                    offset=piece.first + at,
                    created_at=piece.created_at,
                    claim=piece.claim,
                )
            )
    assert len(messages) == batch.message_count
    return messages


@asynccontextmanager
async def open_apart(settings: Settings) -> AsyncIterator[Engine]:
    """An engine in a task of its own, as every worker is a process of its own.

    trio-asyncio's loop is a context variable and all fixtures of a test share one context: two engines opened there
    would take each other's loop. A task has a context of its own.
    """
    closing = trio.Event()

    async def hold(*, task_status: trio.TaskStatus[Engine]) -> None:
        async with open_engine(settings) as engine:
            task_status.started(engine)
            await closing.wait()

    async with trio.open_nursery() as holder:
        engine: Engine = await holder.start(hold)
        try:
            yield engine
        finally:
            closing.set()


OpenBroker = Callable[..., AbstractAsyncContextManager[Broker]]


@pytest.fixture
def open_broker(settings: Settings) -> OpenBroker:
    """Opens further engines on the test's database, as another worker would; keywords replace settings."""

    @asynccontextmanager
    async def open_one(**replaced: Any) -> AsyncIterator[Broker]:
        async with open_apart(msgspec.structs.replace(settings, **replaced)) as engine:
            yield Broker(engine)

    return open_one


@pytest.fixture
async def engine(settings: Settings) -> AsyncIterator[Engine]:
    """An open engine on the test's database."""
    async with open_apart(settings) as engine:
        yield engine


@pytest.fixture
async def broker(engine: Engine) -> Broker:
    """The engine of this test, for tests that speak in values."""
    return Broker(engine)


@pytest.fixture
async def other(open_broker: OpenBroker) -> AsyncIterator[Broker]:
    """Another worker on the same database."""
    async with open_broker() as broker:
        yield broker
