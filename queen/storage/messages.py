"""Single messages for operators: list them, show one, delete it, set it aside, deliver it again; empty a queue.

Lists read a bounded number of partitions and segment rows, and only the bodies that the page shows. A message is
named by its partition and transaction id, like in an ack.
"""

from __future__ import annotations

import heapq
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

from queen.model.browse import (
    Cursor,
    Found,
    FoundMessage,
    MessageDetail,
    MessageQuery,
    Standing,
    standing_of,
)
from queen.model.queue import QUEUE_MODE, Queue, StartFrom
from queen.storage.acks import bury
from queen.storage.bridge import Bridge
from queen.storage.catalogue import SELECT_QUEUE, Catalogue, queue_of
from queen.storage.connect import Connection
from queen.storage.counts import PER_QUEUE, Counts
from queen.storage.ids import bucket_of, id_prefix_text, partition_id_of, transaction_key
from queen.storage.lines import without_payload
from queen.storage.places import Place, locate
from queen.storage.segments import Body, Keyring, seal, unseal

MAX_QUEUES: Final = 100
"""Queues in which a list that names none looks, those that were pushed to last."""

MAX_PARTITIONS: Final = 1000
"""Partitions in which a list that names none looks, over all its queues; see queen.partitions_to_look_at."""

MAX_SEGMENTS: Final = 20_000
"""Segment rows that one list goes through; a status that few messages have may be cut off by it."""

BODY_BYTES: Final = 8 * 1024 * 1024
"""Raw bytes of bodies read at a time, or one body."""

CLEAR_PARTITIONS: Final = 100
CLEAR_DEAD_LETTERS: Final = 1000
"""Of one step, and so of one transaction: other requests of these partitions wait no longer than that takes."""

MAX_GROUPS: Final = 1000
"""Groups whose dead letters of one message are looked at."""

MOVED: Final = "Moved to the dead letter queue by hand"

_BEGINNING: Final = datetime(1970, 1, 1, tzinfo=UTC)
_END: Final = datetime(9999, 1, 1, tzinfo=UTC)
_STALE_TRIES: Final = 8

_QUEUE: Final = (
    SELECT_QUEUE + " WHERE name = $1 AND ($2::text IS NULL OR namespace = $2) AND ($3::text IS NULL OR task = $3)"
)
_QUEUES: Final = (
    PER_QUEUE + "SELECT q.* FROM (" + SELECT_QUEUE + ") q JOIN per_queue p ON p.queue_id = q.queue_id"
    " WHERE p.total > 0 AND ($1::text IS NULL OR q.namespace = $1) AND ($2::text IS NULL OR q.task = $2)"
    " ORDER BY p.stored_at DESC NULLS LAST, q.name LIMIT $3"
)
_PARTITIONS: Final = """
    SELECT p.partition_id, p.queue_id, p.name, p.first_offset, p.next_offset, p.last_created_at
    FROM queen.partitions p WHERE p.bucket = $1 AND p.partition_id = ANY ($2)
"""
_CURSORS: Final = """
    SELECT c.partition_id, c.group_name, c.committed, c.retry_count, c.lease_first, c.lease_end,
        CASE WHEN c.lease_expires_at > clock_timestamp() AND c.lease_epoch = $3
            THEN c.lease_expires_at END AS expires_at
    FROM queen.cursors c
    CROSS JOIN LATERAL (
        SELECT FROM queen.consumer_groups r WHERE r.queue_id = c.queue_id AND r.name = c.group_name LIMIT 1
    ) registered
    WHERE c.bucket = $1 AND c.partition_id = ANY ($2)
"""
_SEGMENTS: Final = "SELECT * FROM queen.newest_segments($1, $2, $3, $4, $5, $6)"
_DEAD: Final = """
    SELECT d.partition_id, d.message_offset, d.group_name
    FROM unnest($2::uuid[], $3::bigint[], $4::bigint[]) AS run (partition_id, first, until)
    CROSS JOIN LATERAL (
        SELECT l.partition_id, l.message_offset, l.group_name FROM queen.dead_letters l
        WHERE l.bucket = $1 AND l.partition_id = run.partition_id AND l.message_offset >= run.first
            AND l.message_offset < run.until
        ORDER BY l.message_offset OFFSET 0
    ) d
"""
_BODIES: Final = "SELECT * FROM queen.read_segments($1, $2, $3, $4, 1, 1, true)"
_SEGMENT_OF: Final = """
    SELECT * FROM queen.segments s WHERE s.bucket = $1 AND s.partition_id = $2 AND s.base_offset <= $3
    ORDER BY s.base_offset DESC LIMIT 1
"""
_DEAD_LETTERS_OF: Final = """
    SELECT d.* FROM queen.dead_letters d
    WHERE d.bucket = $1 AND d.partition_id = $2 AND ($3::bigint IS NULL OR d.message_offset = $3)
    ORDER BY d.message_offset, d.group_name LIMIT $4
"""


class _View:
    """A partition in which a list looks, and its segments that were fetched but not yet taken, newest first."""

    def __init__(self, queue: Queue, row: Any) -> None:
        self.queue = queue
        self.partition_id: UUID = row["partition_id"]
        self.name: str = row["name"]
        self.below: int = row["next_offset"]
        self.cursors: dict[str, Cursor] = {}
        self.fetched: list[Any] = []
        self.dead: dict[int, list[str]] = {}
        self.exhausted = False


class _Picked(NamedTuple):
    view: _View
    segment: Any
    offset: int
    standing: Standing


class Messages:
    """Single messages in PostgreSQL."""

    def __init__(self, bridge: Bridge, catalogue: Catalogue, keyring: Keyring, counts: Counts) -> None:
        self._bridge = bridge
        self._catalogue = catalogue
        self._keyring = keyring
        self._counts = counts
        self._buckets = counts.buckets

    # -- lists ----------------------------------------------------------------------------------------------------

    async def find(self, query: MessageQuery) -> Found:
        """A page of messages, newest first, without their payloads."""

        async def read(connection: Connection) -> Found:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                queues, groups = await self._queues(connection, query)
                views = await self._views(connection, queues, query.partition)
                picked = await self._pick(connection, views, query)
                found = [message async for message in self._bodies(connection, picked)]
                return Found(found, groups)

        return await self._bridge.run(read, writes=False)

    async def _queues(self, connection: Connection, query: MessageQuery) -> tuple[dict[UUID, Queue], frozenset[str]]:
        """asyncio flavor. The queues to look in, and the groups that they have."""
        if query.queue is not None:
            rows = await connection.fetch(_QUEUE, query.queue, query.namespace, query.task)
        else:
            rows = await connection.fetch(_QUEUES, query.namespace, query.task, MAX_QUEUES)
        names = await connection.fetch(
            "SELECT DISTINCT name FROM queen.consumer_groups WHERE queue_id = ANY ($1)",
            [row["queue_id"] for row in rows],
        )
        return {row["queue_id"]: queue_of(row) for row in rows}, frozenset(row["name"] for row in names)

    async def _views(self, connection: Connection, queues: Mapping[UUID, Queue], partition: str | None) -> list[_View]:
        """asyncio flavor."""
        views: list[_View] = []
        if not queues:
            return views
        each = max(MAX_PARTITIONS // len(queues) // self._buckets, 2)
        by_bucket: dict[int, list[UUID]] = {}
        if partition is not None:
            for queue_id in queues:
                partition_id = partition_id_of(queue_id, partition)
                by_bucket.setdefault(bucket_of(partition_id, self._buckets), []).append(partition_id)
        for bucket in range(self._buckets):
            if partition is not None:
                rows = await connection.fetch(_PARTITIONS, bucket, by_bucket.get(bucket, []))
            else:
                rows = await connection.fetch(
                    "SELECT * FROM queen.partitions_to_look_at($1, $2, $3)", bucket, list(queues), each
                )
            here = {row["partition_id"]: _View(queues[row["queue_id"]], row) for row in rows}
            await self._read_cursors(connection, bucket, here)
            views += here.values()
        return views

    async def _read_cursors(self, connection: Connection, bucket: int, views: Mapping[UUID, _View]) -> None:
        """asyncio flavor."""
        if views:
            for row in await connection.fetch(_CURSORS, bucket, list(views), connection.epoch):
                views[row["partition_id"]].cursors[row["group_name"]] = _cursor(row)

    async def _pick(self, connection: Connection, views: Sequence[_View], query: MessageQuery) -> list[_Picked]:
        """asyncio flavor. The messages of the page."""
        picked: list[_Picked] = []
        skipped = 0
        async with aclosing(self._newest(connection, views, query)) as segments:
            async for view, segment in segments:
                erased = set(segment["erased"] or ())
                base = segment["base_offset"]
                for offset in range(base + segment["message_count"] - 1, base - 1, -1):
                    if offset - base in erased:
                        continue
                    standing = standing_of(offset, view.cursors, view.dead.get(offset, ()))
                    if query.status is not None and standing.status is not query.status:
                        continue
                    if skipped < query.offset:
                        skipped += 1
                        continue
                    picked.append(_Picked(view, segment, offset, standing))
                    if len(picked) == query.limit:
                        return picked
        return picked

    async def _newest(
        self, connection: Connection, views: Sequence[_View], query: MessageQuery
    ) -> AsyncGenerator[tuple[_View, Any]]:
        """asyncio flavor. Segments of all views, newest first: a merge of what each has, fetched as it is used up."""
        left = MAX_SEGMENTS
        most = max(4, 2000 // max(len(views), 1))
        heap: list[tuple[float, int, _View]] = []

        async def fetch(wanted: Sequence[_View]) -> None:
            nonlocal left, most
            await self._fetch(connection, wanted, query, most)
            left -= sum(len(view.fetched) for view in wanted)
            most = min(most * 2, 2000)
            for view in wanted:
                if view.fetched:
                    heapq.heappush(heap, (-view.fetched[0]["created_at"].timestamp(), view.partition_id.int, view))

        await fetch(views)
        while heap:
            _, order, view = heapq.heappop(heap)
            segment = view.fetched.pop(0)
            yield view, segment
            if view.fetched:
                heapq.heappush(heap, (-view.fetched[0]["created_at"].timestamp(), order, view))
            elif not view.exhausted and left > 0:
                await fetch([view])

    async def _fetch(self, connection: Connection, views: Sequence[_View], query: MessageQuery, most: int) -> None:
        """asyncio flavor. Up to ``most`` more segments of each view, and what was set aside of them."""
        created_from, created_to = query.created_from or _BEGINNING, query.created_to or _END
        for bucket, here in _by_bucket(views, self._buckets):
            rows = await connection.fetch(
                _SEGMENTS,
                bucket,
                [view.partition_id for view in here],
                [view.below for view in here],
                created_from,
                created_to,
                most,
            )
            for row in rows:
                here[row["part"] - 1].fetched.append(row)
            runs = []
            for view in here:
                view.exhausted = len(view.fetched) < most
                if view.fetched:
                    runs.append((view.partition_id, view.fetched[-1]["base_offset"], view.below))
                    view.below = view.fetched[-1]["base_offset"]
            by_id = {view.partition_id: view for view in here}
            if runs:
                for row in await connection.fetch(
                    _DEAD, bucket, [run[0] for run in runs], [run[1] for run in runs], [run[2] for run in runs]
                ):
                    by_id[row["partition_id"]].dead.setdefault(row["message_offset"], []).append(row["group_name"])

    async def _bodies(self, connection: Connection, picked: Sequence[_Picked]) -> AsyncIterator[FoundMessage]:
        """asyncio flavor. The messages picked, a few bodies at a time."""
        for some in _runs_of_bodies(picked):
            bodies: dict[tuple[UUID, int], tuple[Any, list[bytes]]] = {}
            for bucket, here in _by_bucket([pick.view for pick in some], self._buckets):
                ids = {view.partition_id for view in here}
                wanted = list(
                    {(p.view.partition_id, p.segment["base_offset"]) for p in some if p.view.partition_id in ids}
                )
                rows = await connection.fetch(
                    _BODIES,
                    bucket,
                    [partition_id for partition_id, _ in wanted],
                    [base for _, base in wanted],
                    [base + 1 for _, base in wanted],
                )
                queues = {view.partition_id: view.queue.name for view in here}
                for row in rows:
                    partition_id = wanted[row["part"] - 1][0]
                    lines = self._lines(row, partition_id, queues[partition_id])
                    bodies[partition_id, row["base_offset"]] = (row, lines)
            for pick in some:
                found = bodies.get((pick.view.partition_id, pick.segment["base_offset"]))
                if found is not None:
                    row, lines = found
                    line = lines[pick.offset - row["base_offset"]]
                    yield _message(pick.view, row, pick.offset, without_payload(line), pick.standing)

    def _lines(self, row: Any, partition_id: UUID, queue: str) -> list[bytes]:
        body = Body(row["codec"], row["raw_bytes"], row["key_id"], row["body"])
        return unseal(body, partition_id, self._keyring, queue).split(b"\n")

    # -- one message ----------------------------------------------------------------------------------------------

    async def place_of(self, partition_id: str, transaction_id: str) -> Place | None:
        """Where a message lies; None where there is none."""
        return await self._bridge.run(
            lambda connection: locate(connection, self._buckets, partition_id, transaction_id), writes=False
        )

    async def detail(self, partition_id: str, transaction_id: str) -> MessageDetail | None:
        """A message with its payload; None where there is none."""

        async def read(connection: Connection) -> MessageDetail | None:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                place = await locate(connection, self._buckets, partition_id, transaction_id)
                if place is None:
                    return None
                bucket = bucket_of(place.partition_id, self._buckets)
                queue = queue_of(await connection.fetchrow(SELECT_QUEUE + " WHERE name = $1", place.queue))
                (partition,) = await connection.fetch(_PARTITIONS, bucket, [place.partition_id])
                view = _View(queue, partition)
                await self._read_cursors(connection, bucket, {place.partition_id: view})
                letters = await connection.fetch(_DEAD_LETTERS_OF, bucket, place.partition_id, place.offset, MAX_GROUPS)
                segment = await connection.fetchrow(_SEGMENT_OF, bucket, place.partition_id, place.offset)
                line = self._lines(segment, place.partition_id, place.queue)[place.offset - segment["base_offset"]]
                standing = standing_of(place.offset, view.cursors, [letter["group_name"] for letter in letters])
                holding = [cursor for cursor in view.cursors.values() if cursor.holds(place.offset)]
                return MessageDetail(
                    message=_message(view, segment, place.offset, line, standing),
                    encrypted=segment["key_id"] is not None,
                    error=letters[0]["error"] if letters else None,
                    retry_count=letters[0]["retry_count"] if letters else holding[0].retry_count if holding else 0,
                    cursors=view.cursors,
                )

        return await self._bridge.run(read, writes=False)

    async def erase(self, partition_id: str, transaction_id: str) -> tuple[Place, list[str]] | None:
        """Delete a message, payload and all; its offset stays a gap. Returns where it lay and the groups whose lease
        ended with it; None when there is no such message."""

        async def write(connection: Connection) -> tuple[Place, list[str]] | None:
            place = await locate(connection, self._buckets, partition_id, transaction_id)
            if place is None:
                return None
            bucket = bucket_of(place.partition_id, self._buckets)
            async with connection.transaction():
                first_offset = await connection.fetchval(
                    "SELECT first_offset FROM queen.partitions WHERE bucket = $1 AND partition_id = $2"
                    " FOR NO KEY UPDATE",
                    bucket,
                    place.partition_id,
                )
                if first_offset is None or place.offset < first_offset:
                    return None
                row = await connection.fetchrow(_SEGMENT_OF, bucket, place.partition_id, place.offset)
                number = place.offset - row["base_offset"]
                if number in (row["erased"] or ()):
                    return None
                lines = self._lines(row, place.partition_id, place.queue)
                lines[number] = b""
                sealed = seal(b"\n".join(lines), place.partition_id, self._keyring if row["key_id"] else None)
                packed = row["transaction_ids"]
                if packed is not None:
                    packed = packed[: 16 * number] + bytes(16) + packed[16 * (number + 1) :]
                rows = await connection.fetch(
                    "SELECT * FROM queen.erase_message($1, NULL, $2, $3, $4, $5, $6, $7, $8, $9, $10) AS group_name",
                    bucket,
                    place.partition_id,
                    row["base_offset"],
                    number,
                    transaction_key(transaction_id),
                    packed,
                    sealed.codec,
                    sealed.raw_bytes,
                    sealed.key_id,
                    sealed.data,
                )
                return place, [released["group_name"] for released in rows]

        return await self._bridge.run(write)

    async def set_aside(self, partition_id: str, transaction_id: str) -> Place | None:
        """Make a message a dead letter of the consumers without a group; the others still get it. None: no such
        message."""
        place = await self.place_of(partition_id, transaction_id)
        if place is None:
            return None
        queue = await self._catalogue.find(place.queue)
        if queue is None or not await self._catalogue.register(queue, QUEUE_MODE, StartFrom(), None):
            return None
        bucket = bucket_of(place.partition_id, self._buckets)

        async def write(connection: Connection) -> bool:
            async with connection.transaction():
                cursor = await connection.fetchrow(
                    "SELECT clock_timestamp() AS now, committed FROM queen.cursors"
                    " WHERE bucket = $1 AND partition_id = $2 AND group_name = $3 FOR NO KEY UPDATE",
                    bucket,
                    place.partition_id,
                    QUEUE_MODE,
                )
                if cursor is None:
                    return False
                if not await bury(
                    connection,
                    bucket,
                    place.partition_id,
                    place.queue,
                    QUEUE_MODE,
                    place.offset,
                    0,
                    MOVED,
                    self._keyring,
                ):
                    return False
                if cursor["committed"] <= place.offset:
                    await connection.fetchval(
                        "SELECT queen.skip_offset($1, $2, $3, $4, $5)",
                        bucket,
                        cursor["now"],
                        place.partition_id,
                        QUEUE_MODE,
                        place.offset,
                    )
                return True

        return place if await self._bridge.run(write) else None

    # -- whole queues ---------------------------------------------------------------------------------------------

    async def clear(self, queue: Queue, partition: str | None) -> int:
        """Remove all messages that a queue, or one of its partitions, holds now, and their dead letters; in steps.
        Cursors stand at the end. Returns how many messages."""
        partition_id = None if partition is None else partition_id_of(queue.queue_id, partition)
        buckets: Sequence[int] = range(self._buckets)
        if partition_id is not None:
            buckets = [bucket_of(partition_id, self._buckets)]
        before = await self._bridge.run(
            lambda connection: connection.fetchval("SELECT clock_timestamp()"), writes=False
        )
        removed = 0
        for bucket in buckets:

            async def empty(connection: Connection) -> tuple[int, int]:
                row = await connection.fetchrow(
                    "SELECT * FROM queen.clear_step($1, $2, $3, $4, $5)",
                    bucket,  # noqa: B023  awaited here
                    queue.queue_id,
                    partition_id,
                    before,
                    CLEAR_PARTITIONS,
                )
                return row["removed"], row["partitions"]

            async def forget(connection: Connection) -> int:
                return await connection.fetchval(  # type: ignore[no-any-return]
                    "SELECT queen.clear_dead_letters_step($1, $2, $3, $4, $5)",
                    bucket,  # noqa: B023
                    queue.queue_id,
                    partition_id,
                    before,
                    CLEAR_DEAD_LETTERS,
                )

            partitions = 1
            while partitions:
                messages, partitions = await self._bridge.run(empty)
                removed += messages
            while await self._bridge.run(forget):
                pass
        return removed


def _by_bucket(views: Sequence[_View], buckets: int) -> Iterator[tuple[int, list[_View]]]:
    found: dict[int, dict[UUID, _View]] = {}
    for view in views:
        found.setdefault(bucket_of(view.partition_id, buckets), {})[view.partition_id] = view
    for bucket in sorted(found):
        yield bucket, list(found[bucket].values())


def _runs_of_bodies(picked: Sequence[_Picked]) -> Iterator[list[_Picked]]:
    """Cut what was picked so that the bodies of a run are not too much to hold."""
    run: list[_Picked] = []
    seen: set[tuple[UUID, int]] = set()
    held = 0
    for pick in picked:
        key = (pick.view.partition_id, pick.segment["base_offset"])
        if key not in seen:
            if run and held + pick.segment["raw_bytes"] > BODY_BYTES:
                yield run
                run, held = [], 0
                seen.clear()
            seen.add(key)
            held += pick.segment["raw_bytes"]
        run.append(pick)
    if run:
        yield run


def _cursor(row: Any) -> Cursor:
    if row["expires_at"] is None:
        return Cursor(committed=row["committed"], retry_count=row["retry_count"])
    return Cursor(
        committed=row["committed"],
        retry_count=row["retry_count"],
        lease_first=row["lease_first"],
        lease_end=row["lease_end"],
        lease_expires_at=row["expires_at"],
    )


def _message(view: _View, row: Any, offset: int, line: bytes, standing: Standing) -> FoundMessage:
    return FoundMessage(
        queue=view.queue,
        partition=view.name,
        partition_id=view.partition_id,
        offset=offset,
        created_at=row["created_at"],
        id_prefix=id_prefix_text(row["id_prefix"]),
        line=line,
        standing=standing,
    )
