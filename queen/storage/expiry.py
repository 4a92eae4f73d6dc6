"""What goes by itself: messages that are too old, with their dead letters where the queue asks for them, and partitions
that have long been empty. In bounded steps; one server at a time works on a bucket.

That something is too old is decided by pops when they look (queen.claim_v2): here the space is freed. What a group
misses by that is noted down as a range of offsets by whoever moves its cursor, because a body can only be opened here.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

import structlog
import trio

from queen.errors import QueenError
from queen.model.queue import Queue
from queen.storage.bridge import Bridge
from queen.storage.catalogue import SELECT_QUEUE, queue_of
from queen.storage.connect import Connection
from queen.storage.ids import bucket_of, id_prefix_text, partition_id_of
from queen.storage.segments import Body, Keyring, seal, unseal

BURY_MESSAGES: Final = 500
"""Dead letters that one commit writes: sealing them keeps the loop some milliseconds, as a large push does."""

BURY_BYTES: Final = 512 * 1024
"""Raw envelopes read for them, at least one segment."""

DUE_QUEUES: Final = 1000
"""Queues of a bucket that one sweep looks at: some milliseconds. Those left are the first of the next."""

_SWEEP_LOCK: Final = 0x7175_6501
"""First key of the advisory locks of sweeps; the second is the bucket."""

_LOCK: Final = "SELECT pg_try_advisory_xact_lock($1, $2)"
_DUE: Final = "SELECT due_queues AS queue_id FROM queen.due_queues($1, NULL, $2)"
_EXPIRE: Final = """
    SELECT * FROM queen.expire($1, NULL, $2,
        clock_timestamp() - make_interval(secs => $3), clock_timestamp() - make_interval(secs => $4),
        coalesce($5, '-infinity'::timestamptz), coalesce($6, '00000000-0000-0000-0000-000000000000'::uuid), $7)
"""
_CLEAN: Final = "SELECT * FROM queen.clean_partitions($1, NULL, clock_timestamp() - make_interval(days => $2), $3)"
_DROP: Final = "SELECT queen.drop_partition($1, $2, $3)"
_RANGE: Final = "SELECT * FROM queen.next_expired($1, $2, $3, $4)"
_READ: Final = "SELECT * FROM queen.read_segments($1, $2, $3, $4, $5, 64, true)"
_BURY: Final = """
    WITH buried AS (
        INSERT INTO queen.dead_letters AS d (bucket, partition_id, message_offset, group_name, queue_id, message_id,
            retry_count, created_at, failed_at, codec, minted, key_id, error, body)
        SELECT $1, $2, g.message_offset, $3, $4, g.message_id, $5, g.created_at, clock_timestamp(), g.codec, g.minted,
            g.key_id, $6, g.body
        FROM unnest($7::bigint[], $8::uuid[], $9::timestamptz[], $10::smallint[], $11::boolean[], $12::text[],
            $13::bytea[]) AS g (message_offset, message_id, created_at, codec, minted, key_id, body)
        ON CONFLICT ON CONSTRAINT dead_letters_once_per_group DO NOTHING
        RETURNING 1
    ), counted AS (
        INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
        SELECT $1, 6, $4, count(*), $3 FROM buried HAVING count(*) > 0
    )
    SELECT count(*) FROM buried
"""
_SHORTEN: Final = "SELECT queen.shorten_expired($1, $2, $3, $4, $5)"

log = structlog.get_logger("queen.storage")


class _Key(NamedTuple):
    """Where the ranges of a bucket have been dealt with up to."""

    partition_id: UUID = UUID(int=0)
    group: str = ""
    first: int = -1


class _Letter(NamedTuple):
    """A message as it goes into the dead letters; the columns of _BURY in order."""

    offset: int
    message_id: UUID
    created_at: datetime
    codec: int
    minted: bool
    key_id: str | None
    body: bytes


class Expiry:
    """Sweeps in PostgreSQL."""

    def __init__(self, bridge: Bridge, keyring: Keyring, buckets: int) -> None:
        self._bridge = bridge
        self._keyring = keyring
        self._buckets = buckets
        self._noticed = trio.Event()

    def notice(self) -> None:
        """Something has expired that is to become dead letters."""
        self._noticed.set()

    async def wait_noticed(self) -> None:
        """Until that has been said since the last time."""
        await self._noticed.wait()
        self._noticed = trio.Event()

    async def due(self) -> list[Queue]:
        """The queues that have something for a sweep to do, of at most DUE_QUEUES a bucket that are due for a look."""

        async def read(connection: Connection) -> list[Queue]:
            ids: set[UUID] = set()
            for bucket in range(self._buckets):
                ids.update(row["queue_id"] for row in await connection.fetch(_DUE, bucket, DUE_QUEUES))
            if not ids:
                return []
            rows = await connection.fetch(SELECT_QUEUE + " WHERE queue_id = ANY ($1) ORDER BY name", list(ids))
            return [queue_of(row) for row in rows]

        return await self._bridge.run(read)

    async def expire(self, queue: Queue, limit: int) -> int:
        """Remove what ttl, eviction and retention let go of one queue, in steps of ``limit`` partitions; before that,
        make dead letters of what some group has missed, if the queue asks for it. Returns messages removed. A server
        that finds another at it leaves it to that one."""
        removed = await self._sweep(queue, limit)
        if queue.options.dead_letter_queue and await self.bury():
            removed += await self._sweep(queue, limit)
        return removed

    async def _sweep(self, queue: Queue, limit: int) -> int:
        options = queue.options
        ages = [
            options.max_wait_time_seconds,
            options.ttl_seconds if options.ttl_enforced else 0,
            options.retention_seconds if options.retention_enabled else 0,
        ]
        age = min((seconds for seconds in ages if seconds > 0), default=None)
        completed = options.completed_retention_seconds if options.retention_enabled else 0
        removed = 0
        for bucket in range(self._buckets):
            after: tuple[datetime | None, UUID | None] = (None, None)
            while True:

                async def step(connection: Connection) -> tuple[int, int, datetime | None, UUID | None]:
                    async with connection.transaction():
                        if not await connection.fetchval(_LOCK, _SWEEP_LOCK, bucket):  # noqa: B023  awaited here
                            return 0, 0, None, None
                        row = await connection.fetchrow(
                            _EXPIRE,
                            bucket,  # noqa: B023
                            queue.queue_id,
                            age,
                            completed if completed > 0 else None,
                            *after,  # noqa: B023
                            limit,
                        )
                        return row["removed"], row["partitions"], row["last_oldest"], row["last_id"]

                gone, seen, oldest, last_id = await self._bridge.run(step)
                removed += gone
                after = (oldest, last_id)
                if seen < limit:
                    break
        return removed

    async def bury(self) -> int:
        """Make dead letters of all that is noted down. Returns how many. What cannot be opened (its key is missing) is
        told, and stays for the next time."""
        buried = 0
        for bucket in range(self._buckets):
            key: _Key | None = _Key()
            while key is not None:

                async def step(connection: Connection) -> tuple[int, _Key | None]:
                    async with connection.transaction():
                        return await self._bury_some(connection, bucket, key or _Key())  # noqa: B023  awaited here

                letters, key = await self._bridge.run(step)
                buried += letters
        return buried

    async def _bury_some(self, connection: Connection, bucket: int, after: _Key) -> tuple[int, _Key | None]:
        """asyncio flavor, inside a transaction. Some of the next range. Returns the dead letters written, and where to
        go on; None: there is nothing more."""
        found = await connection.fetchrow(_RANGE, bucket, *after)
        if found is None:
            return 0, None
        key = _Key(found["partition_id"], found["group_name"], found["first_offset"])
        queue = await connection.fetchval("SELECT q.name FROM queen.queues q WHERE q.queue_id = $1", found["queue_id"])
        rows: Sequence[Any] = ()
        if queue is not None:
            rows = await connection.fetch(
                _READ, bucket, [key.partition_id], [key.first], [found["end_offset"]], BURY_BYTES
            )
        try:
            letters, done = self._letters(rows, key, found["end_offset"], queue)
        except QueenError as error:
            log.warning("expired messages cannot become dead letters yet", queue=queue, error=error.detail)
            return 0, key
        written = 0
        if letters:
            columns = [list(column) for column in zip(*letters, strict=True)]
            written = await connection.fetchval(
                _BURY,
                bucket,
                key.partition_id,
                key.group,
                found["queue_id"],
                found["retry_count"],
                found["reason"],
                *columns,
            )
        await connection.execute(_SHORTEN, bucket, key.partition_id, key.group, key.first, done)
        return written, key  # what is left of it comes next: it begins later now

    def _letters(self, rows: Sequence[Any], key: _Key, end: int, queue: str) -> tuple[list[_Letter], int]:
        """The first messages of a range, and up to which offset that is."""
        letters: list[_Letter] = []
        for row in rows:
            body = Body(row["codec"], row["raw_bytes"], row["key_id"], row["body"])
            prefix = id_prefix_text(row["id_prefix"])
            lines = unseal(body, key.partition_id, self._keyring, queue).split(b"\n")
            for offset, line in enumerate(lines, start=row["base_offset"]):
                if not key.first <= offset < end or not line:  # an empty line: the message was deleted
                    continue
                if len(letters) >= BURY_MESSAGES:
                    return letters, offset
                sealed = seal(line, key.partition_id, self._keyring if row["key_id"] else None)
                message_id = UUID(prefix + line[:12].decode())
                letters.append(
                    _Letter(
                        offset, message_id, row["created_at"], sealed.codec, row["minted"], sealed.key_id, sealed.data
                    )
                )
        last = rows[-1]["base_offset"] + rows[-1]["message_count"] if rows else end
        return letters, min(last, end)

    async def clean(self, days: int, limit: int) -> int:
        """Remove the partitions that have been empty for so many days, in steps of ``limit``. Returns how many."""
        removed = 0
        for bucket in range(self._buckets):

            async def step(connection: Connection) -> tuple[int, int]:
                async with connection.transaction():
                    if not await connection.fetchval(_LOCK, _SWEEP_LOCK, bucket):  # noqa: B023  awaited here
                        return 0, 0
                    row = await connection.fetchrow(_CLEAN, bucket, days, limit)  # noqa: B023
                    return row["looked_at"], row["removed"]

            looked_at = limit
            while looked_at >= limit:
                looked_at, gone = await self._bridge.run(step)
                removed += gone
        return removed

    async def drop_partition(self, queue: Queue, partition: str) -> int | None:
        """Remove a partition with all that is in it and hangs on it. Returns how many messages; None: there is none."""
        partition_id = partition_id_of(queue.queue_id, partition)
        bucket = bucket_of(partition_id, self._buckets)

        async def step(connection: Connection) -> int | None:
            async with connection.transaction():
                return await connection.fetchval(_DROP, bucket, queue.queue_id, partition_id)  # type: ignore[no-any-return]

        while (messages := await self._bridge.run(step)) == -1:
            pass  # more traces than one step removes
        return messages
