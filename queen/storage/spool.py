"""Pushes on the disk of this machine, for when PostgreSQL cannot take them: one SQLite file for all workers.

What is pushed is appended in one order for all workers, each write is on the disk before it is answered (WAL,
``synchronous=FULL``), and what has reached PostgreSQL is removed. When to write here and when to drain is decided in
engine/spooling.py; no SQL of PostgreSQL is here.

    <directory>/spool.sqlite3   entries in order, what was set aside, and their totals
    <directory>/state           one page of memory that all workers share: is there a backlog, and how much
    <directory>/lock            held (flock) by who writes; the kernel lets go of it when its holder dies
    <directory>/drain           held by the one worker that drains
    <directory>/reserve         room on a full disk, for what leaves: see _Reserve

The rule that order rests on: the backlog flag is raised, under the lock, before the first entry is committed, and
lowered, under the lock, only when the last one has left. A push that finds it down has nothing before it here.

SQLite needs working POSIX locks and shared memory: the directory is to be on a local disk.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sqlite3
import struct
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import msgspec
import structlog
import trio

from queen.errors import QueenError, SpoolFull, SpoolUnavailable, StartupError
from queen.model.spool import SpoolFigures
from queen.storage.ids import uuid7_texts
from queen.storage.pushes import Doubt, PushRequest
from queen.storage.segments import Keyring

T = TypeVar("T")

VERSION: Final = 1

ENTRY_OVERHEAD: Final = 256
"""What an entry takes on the disk beside its body, generously: row, index, names."""

CHECKPOINT_BYTES: Final = 1024 * 1024
"""What the file and its log take beyond this is given back to the disk when the spool is empty."""

RESERVE_BYTES: Final = 8 * 1024 * 1024
"""Of the disk, for removals: SQLite appends them to its log, which grows up to 4 MiB, and the log to the file."""

_SCHEMA: Final = """
CREATE TABLE entries (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    request INTEGER NOT NULL,           -- number of the first entry of its push request: they are stored together
    accepted_us INTEGER NOT NULL,       -- Unix time by this machine's clock
    queue TEXT NOT NULL,
    messages INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    key_id TEXT,                        -- which key sealed the body; NULL: none
    body BLOB NOT NULL
) STRICT;
CREATE INDEX entries_by_queue ON entries (queue);
CREATE TABLE quarantine (
    number INTEGER PRIMARY KEY,
    accepted_us INTEGER NOT NULL,
    set_aside_us INTEGER NOT NULL,
    reason TEXT NOT NULL,
    queue TEXT NOT NULL,
    messages INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    key_id TEXT,
    body BLOB NOT NULL
) STRICT;
CREATE TABLE meta (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    database_born TEXT,                 -- of the database this spool belongs to: when it was initialised
    buckets INTEGER,                    -- and its number of buckets
    pending_entries INTEGER NOT NULL,
    pending_messages INTEGER NOT NULL,
    pending_bytes INTEGER NOT NULL,
    quarantined_messages INTEGER NOT NULL,
    quarantined_bytes INTEGER NOT NULL
) STRICT;
INSERT INTO meta VALUES (1, NULL, NULL, 0, 0, 0, 0, 0);
"""

_Row = tuple[str, int, int, str | None, bytes]
"""Of an entry: queue, messages, bytes, key, body."""

_STATE: Final = struct.Struct("<7Q")
_BACKLOG: Final = 0

log = structlog.get_logger("queen.storage")


class KeptMessage(msgspec.Struct, frozen=True, gc=False):
    """A message as it comes out of the spool. Its transaction id is never absent."""

    queue: str
    partition: str
    payload: bytes
    transaction_id: str | None
    trace_id: str | None


class _Body(msgspec.Struct, array_like=True):
    """What an entry holds: the messages of one push request for one queue, in order, as columns.

    ``doubted``: places of those that PostgreSQL has stored under ids of its own if what ``doubt`` tells of was stored.
    """

    producer_sub: str | None
    partitions: list[str]
    transaction_ids: list[str]
    trace_ids: list[str | None]
    payloads: list[bytes]
    doubt: Doubt | None = None
    doubted: list[int] = []


_encode_body: Final = msgspec.msgpack.Encoder().encode
_decode_body: Final = msgspec.msgpack.Decoder(_Body).decode


class Entry(NamedTuple):
    """An entry read back. ``trouble``: why it cannot be read; then there is no request.

    ``doubt``: some of it may have been stored before it was spooled; ``rest`` is what is left of the request if it was,
    which may be nothing.
    """

    number: int
    queue: str
    messages: int
    size: int
    request: PushRequest | None
    trouble: str | None
    doubt: Doubt | None = None
    rest: PushRequest | None = None


class SetAside(NamedTuple):
    """An entry of the quarantine. Times: Unix, microseconds, by this machine's clock."""

    number: int
    accepted_us: int
    set_aside_us: int
    queue: str
    messages: int
    size: int
    reason: str


class Portion(NamedTuple):
    """The first entries of the spool. ``whole``: there were no others when it was read."""

    entries: list[Entry]
    whole: bool


class _File:
    """A connection to the file and a lock of its own: two of them in one process exclude each other too.

    Everything here blocks: call it in a thread, one call at a time.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "spool.sqlite3"
        self.lock_fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.sql = sqlite3.connect(self.path, timeout=10, isolation_level=None, check_same_thread=False)
        try:
            self.sql.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before the first table; later without effect
            self.sql.execute("PRAGMA journal_mode = WAL")
            self.sql.execute("PRAGMA synchronous = FULL")
            self.sql.execute("PRAGMA secure_delete = OFF")  # some builds overwrite what is deleted: twice the writing
            self._count_free_pages()  # recovers it after a crash
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """Bytes on the disk, the log included."""
        log = self.path.with_name(self.path.name + "-wal")
        return self.path.stat().st_size + (log.stat().st_size if log.exists() else 0)

    @property
    def growth(self) -> int:
        """Bytes by which the file grows when the log is written into it."""
        (pages,) = self.sql.execute("PRAGMA page_count").fetchone()
        (page_bytes,) = self.sql.execute("PRAGMA page_size").fetchone()
        size: int = pages * page_bytes - self.path.stat().st_blocks * 512  # a checkpoint that failed leaves holes
        return size

    def shrink(self) -> None:
        """Give back to the disk what is not used.

        In steps that fit into SQLite's cache of pages: what does not fit is written to the log, only to be cut off.
        """
        for step in count(1):
            before = self._count_free_pages()
            self.sql.executescript("PRAGMA incremental_vacuum(256)")  # execute() would do a first page and stop
            left = self._count_free_pages()
            if not 0 < left < before:
                break
            if not step % 32:
                self.checkpoint()
        self.checkpoint()

    def _count_free_pages(self) -> int:
        pages: int = self.sql.execute("PRAGMA freelist_count").fetchone()[0]
        return pages

    def checkpoint(self) -> None:
        """Write the log into the file, and cut it off."""
        self.sql.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @contextmanager
    def locked(self) -> Iterator[None]:
        fcntl.flock(self.lock_fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self.lock_fd, fcntl.LOCK_UN)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self.sql.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.sql.execute("COMMIT")
        except BaseException:
            if self.sql.in_transaction:
                self.sql.execute("ROLLBACK")
            raise

    def close(self) -> None:
        self.sql.close()
        os.close(self.lock_fd)


class _Reserve:
    """Room that only removals may use.

    They take room before they give any back. On a disk that this spool itself has filled they could not be written
    down: what waits would be stored again and again, and never leave. So a file is kept that can be deleted then. Until
    it is there again nothing is appended. Use it under the lock.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "reserve"

    @property
    def is_spent(self) -> bool:
        return not os.path.exists(self._path)

    def spend(self) -> bool:
        """Give the room to the disk. False: it has it already."""
        try:
            self._path.unlink()
        except FileNotFoundError:
            return False
        return True

    @property
    def free_bytes(self) -> int:
        """What the disk has beside it."""
        disk = os.statvfs(self._path.parent)
        return disk.f_bavail * disk.f_frsize

    def make(self) -> None:
        """Or make it larger, if it had to be small. On a small disk half of what is left."""
        reserve_fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            there = os.fstat(reserve_fd).st_size
            wanted = min(RESERVE_BYTES, (self.free_bytes + there) // 2)
            if wanted > there:
                os.posix_fallocate(reserve_fd, 0, wanted)
        except OSError as error:  # another took the room meanwhile
            log.warning("the spool has no reserve on its disk", directory=str(self._path.parent), error=error.strerror)
        finally:
            os.close(reserve_fd)


class Spool:
    """See the module. Open it with :func:`open_spool`. ``max_bytes``: of what waits and what was set aside."""

    def __init__(self, directory: Path, max_bytes: int, keyring: Keyring) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self._keyring = keyring
        self._limit_writes = trio.CapacityLimiter(1)
        self._limit_drain = trio.CapacityLimiter(1)
        self._held = False
        _make_directory(directory)
        self._reserve = _Reserve(directory)
        with ExitStack() as opened:  # so that one that cannot be used leaves nothing open
            self._state_fd = os.open(directory / "state", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            opened.callback(os.close, self._state_fd)
            self._drain_fd = os.open(directory / "drain", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            opened.callback(os.close, self._drain_fd)
            self._writer = self._open_file()
            opened.callback(self._writer.close)
            self._drainer = self._open_file()
            opened.callback(self._drainer.close)
            with self._writer.locked():
                if os.fstat(self._state_fd).st_size < mmap.PAGESIZE:
                    os.posix_fallocate(self._state_fd, 0, mmap.PAGESIZE)  # a hole would be SIGBUS on a full disk
                self._map = opened.enter_context(mmap.mmap(self._state_fd, mmap.PAGESIZE))
                self._words = opened.enter_context(memoryview(self._map).cast("Q"))
                self._create()
                self._publish(self._writer)
                self._words[_BACKLOG] = int(self.figures.pending_entries > 0)
                if not self.backlog or (self._reserve.is_spent and self._reserve.free_bytes > 2 * RESERVE_BYTES):
                    self._reserve.make()
            _sync_directory(directory)
            self._opened = opened.pop_all()

    def _open_file(self) -> _File:
        """After a crash SQLite wants room for what it shares between processes, before anything can be drained."""
        try:
            return _File(self.directory)
        except sqlite3.OperationalError as error:
            if not _is_full(error):
                raise
            self._reserve.spend()
            log.warning("the disk of the spool is full: it is opened with its reserve", directory=str(self.directory))
            return _File(self.directory)

    # -- without waiting ------------------------------------------------------------------------------------------

    @property
    def backlog(self) -> bool:
        """Whether anything waits here, put by whichever worker of this server. A read of shared memory."""
        return self._words[_BACKLOG] != 0

    @property
    def figures(self) -> SpoolFigures:
        """How full it is, as of the last write of any worker."""
        return SpoolFigures(*_STATE.unpack_from(self._map)[1:])

    @property
    def has_room(self) -> bool:
        """Whether a push of ordinary size would be taken."""
        figures = self.figures
        return figures.pending_bytes + figures.quarantined_bytes + ENTRY_OVERHEAD < self.max_bytes

    @property
    def seals(self) -> bool:
        """Whether what is kept is encrypted: there is a key."""
        return self._keyring.current is not None

    # -- keeping --------------------------------------------------------------------------------------------------

    async def keep(
        self, requests: Sequence[PushRequest], *, if_backlog: bool = False
    ) -> list[list[str | None] | SpoolFull | None]:
        """Append push requests in one commit; on the disk when this returns.

        Messages without a transaction id get one. Returns for each request the transaction ids of its messages (None:
        PostgreSQL may have given it one before), or why it was not taken. ``if_backlog``: nothing is appended when
        nothing waits any more (then None for each).

        Raises:
            SpoolUnavailable: the disk does not take it; nothing was appended.
        """
        return await self._in_thread(self._limit_writes, partial(self._keep, requests, if_backlog))

    def _keep(self, requests: Sequence[PushRequest], if_backlog: bool) -> list[list[str | None] | SpoolFull | None]:
        prepared = [self._prepare(request) for request in requests]
        accepted_us = time.time_ns() // 1000
        file = self._writer
        with file.locked():
            if if_backlog and not self.backlog:
                return [None] * len(requests)
            if self._reserve.is_spent and not self.backlog:
                self._settle(file)  # it did not get that far
            if self._reserve.is_spent:
                raise sqlite3.OperationalError("its disk is full, until what waits has been stored")
            before = self.backlog
            try:
                with file.transaction():
                    results = self._append(file.sql, prepared, accepted_us)
                    self._words[_BACKLOG] = 1
            except BaseException:
                self._words[_BACKLOG] = int(before)
                raise
            self._publish(file)
            if not before and not self.figures.pending_entries:
                self._words[_BACKLOG] = 0  # nothing was taken
        return results

    def _prepare(self, request: PushRequest) -> tuple[list[str | None], list[_Row]]:
        """The transaction ids to tell of a request, and its entries."""
        messages, doubt = request.messages, request.doubt
        told = [message.transaction_id for message in messages] if doubt is None else doubt.ids
        fill = iter(uuid7_texts(sum(not text for text in told)))
        ids = [text or next(fill) for text in told]
        if doubt is None:
            told = list(ids)
        elif all(told):
            doubt = None  # they will be recognised
        by_queue: dict[str, list[int]] = {}
        for place, message in enumerate(messages):
            by_queue.setdefault(message.queue, []).append(place)
        entries = []
        for queue, places in by_queue.items():
            body = _encode_body(
                _Body(
                    request.producer_sub,
                    [messages[place].partition for place in places],
                    [ids[place] for place in places],
                    [messages[place].trace_id for place in places],
                    [request.payloads[place] for place in places],
                    doubt,
                    [at for at, place in enumerate(places) if told[place] is None],
                )
            )
            key_id = self._keyring.current
            if key_id is not None:  # whatever the queue asks for: while PostgreSQL is away it may not be known
                body = self._keyring.encrypt(body, _context(queue))
            entries.append((queue, len(places), len(body) + ENTRY_OVERHEAD, key_id, body))
        return told, entries

    def _append(
        self,
        sql: sqlite3.Connection,
        prepared: Sequence[tuple[list[str | None], list[_Row]]],
        accepted_us: int,
    ) -> list[list[str | None] | SpoolFull | None]:
        pending_bytes, quarantined_bytes = sql.execute("SELECT pending_bytes, quarantined_bytes FROM meta").fetchone()
        room = self.max_bytes - pending_bytes - quarantined_bytes
        (number,) = sql.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'entries'").fetchone()
        results: list[list[str | None] | SpoolFull | None] = []
        rows = []
        for ids, entries in prepared:
            size = sum(entry[2] for entry in entries)
            if size > room:
                results.append(SpoolFull(self.max_bytes))
                continue
            room -= size
            first = number + 1
            for queue, messages, entry_bytes, key_id, body in entries:
                number += 1
                rows.append((number, first, accepted_us, queue, messages, entry_bytes, key_id, body))
            results.append(ids)
        sql.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
        sql.execute(
            "UPDATE meta SET pending_entries = pending_entries + ?, pending_messages = pending_messages + ?,"
            " pending_bytes = pending_bytes + ?",
            (len(rows), sum(row[4] for row in rows), sum(row[5] for row in rows)),
        )
        return results

    # -- draining -------------------------------------------------------------------------------------------------

    def lead(self) -> bool:
        """Become the one worker that drains; False: another is. Does not wait."""
        try:
            fcntl.flock(self._drain_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def follow(self) -> None:
        """Leave the draining to others."""
        fcntl.flock(self._drain_fd, fcntl.LOCK_UN)

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Nobody appends in this block: what is read in it is all there is."""
        await self._in_thread(self._limit_drain, partial(fcntl.flock, self._drainer.lock_fd, fcntl.LOCK_EX))
        self._held = True
        try:
            yield
        finally:
            self._held = False
            fcntl.flock(self._drainer.lock_fd, fcntl.LOCK_UN)

    async def read(self, max_entries: int, max_bytes: int) -> Portion:
        """The first entries, at least one if there is any; entries of one push request are not parted."""
        return await self._in_thread(self._limit_drain, partial(self._read, max_entries, max_bytes))

    def _read(self, max_entries: int, max_bytes: int) -> Portion:
        rows: list[tuple[int, int, str, int, int, str | None, bytes]] = []
        size = 0
        cut = None
        select = "SELECT number, request, queue, messages, bytes, key_id, body FROM entries ORDER BY number"
        cursor = self._drainer.sql.execute(select)
        try:
            for row in cursor:
                is_enough = rows and (len(rows) >= max_entries or size + row[4] > max_bytes)
                if is_enough and row[1] != rows[-1][1]:
                    cut = row
                    break
                rows.append(row)
                size += row[4]
        finally:
            cursor.close()  # or its snapshot would keep the log from being checkpointed
        return Portion([self._entry(*row) for row in rows], whole=cut is None)

    def _entry(
        self, number: int, _request: int, queue: str, messages: int, size: int, key_id: str | None, body: bytes
    ) -> Entry:
        try:
            if key_id is not None:
                body = self._keyring.decrypt(body, _context(queue), key_id, queue)
            found = _decode_body(body)
        except (QueenError, msgspec.MsgspecError) as error:
            trouble = error.detail if isinstance(error, QueenError) else f"it does not decode: {error}"
            return Entry(number, queue, messages, size, None, trouble)
        columns = zip(found.partitions, found.payloads, found.transaction_ids, found.trace_ids, strict=True)
        kept = [KeptMessage(queue, *column) for column in columns]
        request = PushRequest(kept, found.producer_sub, promised=True)
        if found.doubt is None:
            return Entry(number, queue, messages, size, request, None)
        doubted = set(found.doubted)
        left = [message for place, message in enumerate(kept) if place not in doubted]
        rest = PushRequest(left, found.producer_sub, promised=True) if left else None
        return Entry(number, queue, messages, size, request, None, found.doubt, rest)

    async def remove(self, entries: Sequence[Entry], set_aside: Iterable[tuple[Entry, str]] = ()) -> None:
        """What was read is in PostgreSQL, or has to be ``set_aside``, each with its reason."""
        await self._in_thread(self._limit_drain, partial(self._remove, entries, list(set_aside)))

    def _remove(self, entries: Sequence[Entry], set_aside: Sequence[tuple[Entry, str]]) -> None:
        if self._held:
            self._remove_locked(entries, set_aside)
        else:
            with self._drainer.locked():
                self._remove_locked(entries, set_aside)

    def _remove_locked(self, entries: Sequence[Entry], set_aside: Sequence[tuple[Entry, str]]) -> None:
        def write() -> None:
            with self._drainer.transaction():
                for entry, reason in set_aside:
                    _quarantine(self._drainer.sql, entry.number, reason)
                self._delete(self._drainer.sql, [(entry.number, entry.messages, entry.size) for entry in entries])

        self._use_reserve(self._drainer, write)
        self._settle(self._drainer)

    def _use_reserve(self, file: _File, write: Callable[[], T]) -> T:
        """Write something by which room is got; once more, with the reserve, if the disk is full. Under the lock."""
        try:
            return write()
        except sqlite3.OperationalError as error:
            if not _is_full(error) or not self._reserve.spend():
                raise
            log.warning("the disk of the spool is full: it is drained with its reserve", directory=str(self.directory))
            file.sql.execute("PRAGMA wal_autocheckpoint = 0")  # one that does not fit would take the room, for nothing
            self._checkpoint_if_it_fits(file)
            return write()

    def _checkpoint_if_it_fits(self, file: _File) -> None:
        """While the reserve is spent. Once it has fitted, removals need no more room: the log begins anew each time."""
        if file.growth <= self._reserve.free_bytes:
            file.checkpoint()

    @staticmethod
    def _delete(sql: sqlite3.Connection, entries: Sequence[tuple[int, int, int]]) -> None:
        """``entries``: number, messages, bytes of each."""
        sql.execute(
            "UPDATE meta SET pending_entries = pending_entries - ?, pending_messages = pending_messages - ?,"
            " pending_bytes = pending_bytes - ?",
            (len(entries), sum(messages for _, messages, _ in entries), sum(size for *_, size in entries)),
        )
        sql.executemany("DELETE FROM entries WHERE number = ?", [(number,) for number, *_ in entries])

    def _settle(self, file: _File) -> None:
        """After a removal, under the lock: tell the figures, lower the flag when nothing waits, shrink the file."""
        self._publish(file)
        is_empty = not self.figures.pending_entries
        if is_empty:
            self._words[_BACKLOG] = 0
        if self._reserve.is_spent:
            self._checkpoint_if_it_fits(file)
        if is_empty and (file.size > CHECKPOINT_BYTES or self._reserve.is_spent):
            self._use_reserve(file, file.shrink)
        if self._reserve.is_spent and (is_empty or self._reserve.free_bytes > 2 * RESERVE_BYTES):
            self._reserve.make()
            file.sql.execute("PRAGMA wal_autocheckpoint = 1000")  # as it is by default

    # -- about queues ---------------------------------------------------------------------------------------------

    async def holds(self, queues: Collection[str]) -> bool:
        """Whether messages of any of these queues wait here."""
        return await self._in_thread(self._limit_writes, partial(self._holds, queues))

    def _holds(self, queues: Collection[str]) -> bool:
        select = "SELECT EXISTS (SELECT 1 FROM entries WHERE queue = ?)"
        return any(self._writer.sql.execute(select, (queue,)).fetchone()[0] for queue in queues)

    async def set_aside_queue(self, queue: str, reason: str) -> int:
        """Set aside what waits for a queue. Returns how many messages."""
        return await self._in_thread(self._limit_writes, partial(self._set_aside_queue, queue, reason))

    def _set_aside_queue(self, queue: str, reason: str) -> int:
        file = self._writer
        with file.locked():
            with file.transaction():
                select = "SELECT number, messages, bytes FROM entries WHERE queue = ?"
                rows = file.sql.execute(select, (queue,)).fetchall()
                for number, *_ in rows:
                    _quarantine(file.sql, number, reason)
                self._delete(file.sql, rows)
            self._settle(file)
        return sum(messages for _, messages, _ in rows)

    # -- the quarantine -------------------------------------------------------------------------------------------

    async def set_asides(self, after: int, limit: int) -> list[SetAside]:
        """What was set aside, in the order in which it was accepted, from behind a number."""
        return await self._in_thread(self._limit_writes, partial(self._set_asides, after, limit))

    def _set_asides(self, after: int, limit: int) -> list[SetAside]:
        select = (
            "SELECT number, accepted_us, set_aside_us, queue, messages, bytes, reason FROM quarantine"
            " WHERE number > ? ORDER BY number LIMIT ?"
        )
        return [SetAside(*row) for row in self._writer.sql.execute(select, (after, limit))]

    async def try_again(self, numbers: Collection[int]) -> int:
        """Put these of the quarantine behind all that waits. Returns how many messages they have."""
        return await self._in_thread(self._limit_writes, partial(self._take_out, numbers, again=True))

    async def discard(self, numbers: Collection[int]) -> int:
        """Delete these of the quarantine for good. Returns how many messages they had."""
        return await self._in_thread(self._limit_writes, partial(self._take_out, numbers, again=False))

    def _take_out(self, numbers: Collection[int], *, again: bool) -> int:
        file = self._writer

        def write() -> int:
            with file.transaction():
                messages = sum(_take_out(file.sql, number, again=again) for number in sorted(numbers))
                if again and messages:
                    self._words[_BACKLOG] = 1
            return messages

        with file.locked():
            before = self.backlog
            try:
                messages = write() if again else self._use_reserve(file, write)
            except BaseException:
                self._words[_BACKLOG] = int(before)
                raise
            self._settle(file)
        return messages

    # -- what is known of the database ----------------------------------------------------------------------------

    @property
    def buckets(self) -> int | None:
        """Buckets of the database, if a worker has ever reached it. Blocks; for the start."""
        found: int | None = self._writer.sql.execute("SELECT buckets FROM meta").fetchone()[0]
        return found

    async def belongs_to(self, born: str, buckets: int) -> bool:
        """Whether what waits here is for the database that was initialised then. An empty spool is anybody's.

        What is known of the database is kept, so that a worker can start while it is away.
        """
        return await self._in_thread(self._limit_writes, partial(self._belongs_to, born, buckets))

    def _belongs_to(self, born: str, buckets: int) -> bool:
        file = self._writer
        select = "SELECT database_born, buckets, pending_entries FROM meta"
        if file.sql.execute(select).fetchone()[:2] == (born, buckets):
            return True
        with file.locked(), file.transaction():
            was_born, _, pending = file.sql.execute(select).fetchone()
            if pending and was_born not in (None, born):
                return False
            file.sql.execute("UPDATE meta SET database_born = ?, buckets = ?", (born, buckets))
        return True

    # -- life -----------------------------------------------------------------------------------------------------

    async def _in_thread(self, limiter: trio.CapacityLimiter, work: Callable[[], T]) -> T:
        try:
            return await trio.to_thread.run_sync(work, limiter=limiter)
        except (sqlite3.Error, OSError) as error:
            log.error("the spool fails", directory=str(self.directory), error=str(error))
            raise SpoolUnavailable(str(error)) from error

    def _create(self) -> None:
        sql = self._writer.sql
        (version,) = sql.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise StartupError(
                f"the spool in {self.directory} was written by a newer version of queen-trio: start that one, let it "
                "drain, then come back"
            )
        if version == 0:
            with self._writer.transaction():
                for statement in _SCHEMA.split(";\n"):
                    if statement.strip():
                        sql.execute(statement)
                sql.execute(f"PRAGMA user_version = {VERSION}")

    def _publish(self, file: _File) -> None:
        """Tell the other workers how full it is. Under the lock."""
        row = file.sql.execute(
            "SELECT pending_entries, pending_messages, pending_bytes, quarantined_messages, quarantined_bytes,"
            " coalesce((SELECT accepted_us FROM entries ORDER BY number LIMIT 1), 0) FROM meta"
        ).fetchone()
        _STATE.pack_into(self._map, 0, self._words[_BACKLOG], *row)

    def close(self) -> None:
        """Blocks shortly."""
        self._opened.close()


def _is_full(error: sqlite3.OperationalError) -> bool:
    return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


def _quarantine(sql: sqlite3.Connection, number: int, reason: str) -> None:
    """Copy an entry to the quarantine."""
    sql.execute(
        "INSERT OR REPLACE INTO quarantine SELECT number, accepted_us, ?, ?, queue, messages, bytes, key_id, body"
        " FROM entries WHERE number = ?",
        (time.time_ns() // 1000, reason, number),
    )
    sql.execute(
        "UPDATE meta SET quarantined_messages = quarantined_messages + e.messages,"
        " quarantined_bytes = quarantined_bytes + e.bytes FROM entries e WHERE e.number = ?",
        (number,),
    )


def _take_out(sql: sqlite3.Connection, number: int, *, again: bool) -> int:
    """Delete an entry of the quarantine, after copying it to the end of those that wait if it is to be tried again.
    Returns its messages; 0: there is no such entry."""
    row = sql.execute("SELECT messages, bytes FROM quarantine WHERE number = ?", (number,)).fetchone()
    if row is None:
        return 0
    messages: int
    messages, size = row
    if again:
        cursor = sql.execute(
            "INSERT INTO entries (request, accepted_us, queue, messages, bytes, key_id, body)"
            " SELECT 0, accepted_us, queue, messages, bytes, key_id, body FROM quarantine WHERE number = ?",
            (number,),
        )
        sql.execute("UPDATE entries SET request = number WHERE number = ?", (cursor.lastrowid,))
        sql.execute(
            "UPDATE meta SET pending_entries = pending_entries + 1, pending_messages = pending_messages + ?,"
            " pending_bytes = pending_bytes + ?",
            (messages, size),
        )
    sql.execute(
        "UPDATE meta SET quarantined_messages = quarantined_messages - ?, quarantined_bytes = quarantined_bytes - ?",
        (messages, size),
    )
    sql.execute("DELETE FROM quarantine WHERE number = ?", (number,))
    return messages


def _context(queue: str) -> bytes:
    """What a sealed body is bound to."""
    return b"queen spool\0" + queue.encode()


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(
            f"the spool directory {directory} cannot be made: {error.strerror}; name another with FILE_BUFFER_DIR"
        ) from error


def _sync_directory(directory: Path) -> None:
    """A file that was just made is only there after a power loss if its directory was synced."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@asynccontextmanager
async def open_spool(directory: Path, max_bytes: int, keyring: Keyring) -> AsyncIterator[Spool]:
    """Open the spool, and make it if there is none. Raises StartupError with one sentence."""
    try:
        spool = await trio.to_thread.run_sync(Spool, directory, max_bytes, keyring)
    except (sqlite3.Error, OSError) as error:
        raise StartupError(f"the spool in {directory} cannot be opened: {error}") from error
    try:
        yield spool
    finally:
        spool.close()
