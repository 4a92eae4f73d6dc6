"""What becomes of dead letters: delivered again, removed by order, removed when they are old.

Delivering again appends a copy of the message to its partition and removes the dead letter, in one commit. The copy has
a transaction id of its own: the first one still names the stored message, which other groups may have under a lease.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Final
from uuid import UUID

import msgspec

from queen.errors import StorageUnavailable
from queen.model.browse import DeadLetterFilter
from queen.model.message import PushResult
from queen.model.queue import Queue
from queen.storage.bridge import Bridge
from queen.storage.catalogue import Catalogue
from queen.storage.connect import Connection
from queen.storage.ids import bucket_of, partition_id_of
from queen.storage.lines import Line, read_line
from queen.storage.places import Place, locate
from queen.storage.pushes import Pushes, PushRequest, Woken
from queen.storage.segments import Body, Keyring, unseal

STEP: Final = 100
"""Dead letters that one commit delivers again or removes: other requests of their partitions wait for no more."""

MAX_UNLISTED: Final = 1000
"""Dead letters of a partition that are searched for a transaction id whose message is no longer stored."""

_STALE_TRIES: Final = 8

_OF_PARTITION: Final = """
    SELECT d.* FROM queen.dead_letters d
    WHERE d.bucket = $1 AND d.partition_id = $2 AND ($3::bigint IS NULL OR d.message_offset = $3)
    ORDER BY d.message_offset, d.group_name LIMIT $4
"""
_NAMES: Final = """
    SELECT q.name AS queue, p.name AS partition FROM queen.partitions p
    JOIN queen.queues q ON q.queue_id = p.queue_id
    WHERE p.bucket = $1 AND p.partition_id = $2
"""
# the oldest failure first; $3 to $8 are the filter, each NULL for any
_MATCHING: Final = """
    SELECT {columns} FROM queen.dead_letters d
    WHERE d.bucket = $1 AND d.queue_id = $2 AND ($3::uuid IS NULL OR d.partition_id = $3)
        AND ($4::text IS NULL OR d.group_name = $4) AND ($5::timestamptz IS NULL OR d.failed_at >= $5)
        AND ($6::timestamptz IS NULL OR d.failed_at <= $6) AND ($7::text IS NULL OR position($7 IN d.error) > 0)
        AND ($8::uuid IS NULL OR d.message_id = $8)
    ORDER BY d.failed_at, d.message_offset, d.group_name LIMIT $9
"""
_LETTERS: Final = _MATCHING.replace("{columns}", "d.*")
_IDS: Final = _MATCHING.replace(
    "{columns}", "d.bucket, d.failed_at, d.message_id, d.partition_id, d.message_offset, d.group_name"
)
_DROP: Final = "SELECT queen.drop_dead_letters($1, $2, $3)"


class Retried(msgspec.Struct, frozen=True):
    """A dead letter that was appended again under a new transaction id."""

    result: PushResult
    woken: list[Woken]


class Redriven(msgspec.Struct, kw_only=True):
    """Dead letters that were delivered again: the ids of their messages, and whom their copies woke."""

    message_ids: list[UUID] = []
    woken: list[Woken] = []


class _Letter(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter, and the message in it."""

    place: Place
    line: Line
    message_id: UUID


class _Copy:
    """A message to push again: see ``queen.model.message.NewMessage``."""

    __slots__ = ("partition", "payload", "queue", "trace_id", "transaction_id")

    def __init__(self, letter: _Letter) -> None:
        self.queue = letter.place.queue
        self.partition = letter.place.partition
        self.payload = bytes(letter.line.data)
        self.transaction_id: str | None = None
        self.trace_id = letter.line.trace_id


class Redrive:
    """Dead letters on their way out of PostgreSQL."""

    def __init__(self, bridge: Bridge, catalogue: Catalogue, pushes: Pushes, keyring: Keyring, buckets: int) -> None:
        self._bridge = bridge
        self._catalogue = catalogue
        self._pushes = pushes
        self._keyring = keyring
        self._buckets = buckets

    async def retry(self, partition_id: str, transaction_id: str) -> Retried | Place | None:
        """Deliver a dead letter again. Returns the place of a message that is none; None where there is neither."""
        for _ in range(_STALE_TRIES):
            found = await self._bridge.run(
                lambda connection: self._find(connection, partition_id, transaction_id), writes=False
            )
            if found is None or isinstance(found, Place):
                return found
            appended = await self._append([found])
            if appended is not None:
                results, woken = appended
                return Retried(results[0], woken)
        raise StorageUnavailable("this dead letter kept changing; nothing was applied; try again")

    async def _find(self, connection: Connection, partition_id: str, transaction_id: str) -> _Letter | Place | None:
        """asyncio flavor. The dead letter of a message, which retention may have removed since; or just the message."""
        place = await locate(connection, self._buckets, partition_id, transaction_id)
        try:
            where = UUID(partition_id)
        except ValueError:
            return None
        bucket = bucket_of(where, self._buckets)
        names = await connection.fetchrow(_NAMES, bucket, where)
        if names is None:
            return None
        offset = None if place is None else place.offset
        for row in await connection.fetch(_OF_PARTITION, bucket, where, offset, MAX_UNLISTED):
            letter = self._letter(row, names["queue"], names["partition"])
            if place is not None or letter.line.transaction_id == transaction_id:
                return letter
        return place

    def _letter(self, row: Any, queue: str, partition: str) -> _Letter:
        body = Body(row["codec"], 0, row["key_id"], row["body"])  # the frame knows its size
        text = unseal(body, row["partition_id"], self._keyring, queue)
        return _Letter(
            place=Place(queue, partition, row["partition_id"], row["message_offset"]),
            line=read_line(text, str(row["message_id"])[:24]),
            message_id=row["message_id"],
        )

    async def _append(self, letters: Sequence[_Letter]) -> tuple[list[PushResult], list[Woken]] | None:
        """Append copies of these messages and remove their dead letters, all or none. None: one of them is gone, or the
        queue has changed; look again."""
        flush = self._pushes.flush_of([PushRequest([_Copy(letter)], letter.line.producer_sub) for letter in letters])
        await self._catalogue.ensure(flush.queue_names)
        if not flush.prepare(self._catalogue):
            return None

        async def write(connection: Connection) -> list[Woken] | str:
            transaction = connection.transaction()
            await transaction.start()
            try:
                verdict = await flush.store(connection, may_create=True)
                for letter in letters:
                    if isinstance(verdict, str):
                        break
                    bucket = bucket_of(letter.place.partition_id, self._buckets)
                    if not await connection.fetchval(_DROP, bucket, letter.place.partition_id, letter.place.offset):
                        verdict = "gone"
                if not isinstance(verdict, str) and (full := await flush.reserve(connection)):
                    raise next(iter(full.values()))
            except BaseException:
                await transaction.rollback()
                raise
            if isinstance(verdict, str):
                await transaction.rollback()
            else:
                await transaction.commit()
            return verdict

        verdict = await self._bridge.run(write)
        if isinstance(verdict, str):
            if verdict != "gone":
                self._pushes.recover(flush, verdict)
            return None
        flush.count(self._pushes.activity)
        return [results[0] for results in flush.results()], verdict

    async def matching(self, queue: Queue, chosen: DeadLetterFilter, limit: int) -> list[UUID]:
        """The messages of the dead letters that a filter chooses, at most ``limit``; one for each group."""

        async def read(connection: Connection) -> list[UUID]:
            return [row["message_id"] for row in await self._oldest(connection, queue, chosen, limit)]

        return await self._bridge.run(read, writes=False)

    async def _oldest(self, connection: Connection, queue: Queue, chosen: DeadLetterFilter, limit: int) -> list[Any]:
        """asyncio flavor. The rows of _IDS that a filter chooses over all buckets."""
        rows: list[Any] = []
        for bucket in range(self._buckets):
            rows += await connection.fetch(_IDS, bucket, *_given(queue, chosen), limit)
        return sorted(rows, key=itemgetter("failed_at"))[:limit]  # stable: the order of a bucket remains

    async def redrive(self, queue: Queue, chosen: DeadLetterFilter, limit: int) -> Redriven:
        """Deliver the chosen dead letters again, the oldest failure first, at most ``limit``; in steps.

        A message that several groups have set aside is appended once, and is no dead letter of any of them any more.
        """
        done = Redriven(message_ids=[], woken=[])
        tries = 0
        while len(done.message_ids) < limit:
            letters = await self._some(queue, chosen, min(STEP, limit - len(done.message_ids)))
            if not letters:
                break
            appended = await self._append(letters)
            if appended is None:
                tries += 1
                if tries >= _STALE_TRIES:
                    raise StorageUnavailable(
                        f"the dead letters kept changing; {len(done.message_ids)} were delivered again; try again"
                    )
                continue
            tries = 0
            done.message_ids += [letter.message_id for letter in letters]
            done.woken += appended[1]
        return done

    async def _some(self, queue: Queue, chosen: DeadLetterFilter, limit: int) -> list[_Letter]:
        """The next letters, one for each message."""

        async def read(connection: Connection) -> list[_Letter]:
            oldest = await self._oldest(connection, queue, chosen, limit)
            found: dict[tuple[UUID, int], _Letter] = {}
            for bucket, count in Counter(row["bucket"] for row in oldest).items():
                rows = await connection.fetch(_LETTERS, bucket, *_given(queue, chosen), count)
                names = {
                    row["partition_id"]: row["name"]
                    for row in await connection.fetch(
                        "SELECT partition_id, name FROM queen.partitions WHERE bucket = $1 AND partition_id = ANY ($2)",
                        bucket,
                        [row["partition_id"] for row in rows],
                    )
                }
                for row in rows:
                    name = names.get(row["partition_id"])
                    if name is not None:  # else the partition has just been deleted, and this with it
                        place = (row["partition_id"], row["message_offset"])
                        found[place] = self._letter(row, queue.name, name)
            order = [(row["partition_id"], row["message_offset"]) for row in oldest]
            return [found[place] for place in dict.fromkeys(order) if place in found]

        return await self._bridge.run(read, writes=False)

    async def remove(self, queue: Queue, chosen: DeadLetterFilter, limit: int) -> list[UUID]:
        """Remove the chosen dead letters, in steps; the messages stay, if they are still stored. Returns the ids of
        their messages, one for each group."""
        removed: list[UUID] = []

        async def step(connection: Connection) -> list[UUID]:
            async with connection.transaction():
                gone = []
                for row in await self._oldest(connection, queue, chosen, min(STEP, limit - len(removed))):
                    if await connection.fetchval(
                        "SELECT queen.drop_dead_letter($1, $2, $3, $4)",
                        row["bucket"],
                        row["partition_id"],
                        row["message_offset"],
                        row["group_name"],
                    ):
                        gone.append(row["message_id"])  # noqa: PERF401  await in the condition
                return gone

        while len(removed) < limit:
            gone = await self._bridge.run(step)
            if not gone:
                break
            removed += gone
        return removed

    async def expire(self, days: int) -> int:
        """Remove the dead letters that are older, in steps. Returns how many."""
        removed = 0
        for bucket in range(self._buckets):

            async def step(connection: Connection) -> int:
                return await connection.fetchval(  # type: ignore[no-any-return]
                    "SELECT queen.expire_dead_letters($1, clock_timestamp() - make_interval(days => $2), $3)",
                    bucket,  # noqa: B023  awaited here
                    days,
                    STEP,
                )

            while gone := await self._bridge.run(step):
                removed += gone
        return removed


def _given(queue: Queue, chosen: DeadLetterFilter) -> tuple[Any, ...]:
    """The filter as the queries want it, from $2 to $8."""
    partition_id = None if chosen.partition is None else partition_id_of(queue.queue_id, chosen.partition)
    return (
        queue.queue_id,
        partition_id,
        chosen.group,
        chosen.failed_from,
        chosen.failed_to,
        chosen.error,
        chosen.message_id,
    )
