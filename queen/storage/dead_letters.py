"""Reading what was set aside. Writing a dead letter belongs to the ack that makes it one: see acks.py."""

from __future__ import annotations

import heapq
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import msgspec

from queen.storage.bridge import Bridge
from queen.storage.connect import Connection
from queen.storage.counts import ALL_SUMS, Counts
from queen.storage.ids import partition_id_of
from queen.storage.segments import Body, Keyring, unseal

MAX_COUNTED: Final = 10_000
"""Where the total of a filter has to be counted and is no sum that is kept: counting stops here."""

# $1 bucket, $2 group or NULL, $3 and $4 when it failed, or NULL, $5 most, $6 the place. A query for each kind of place:
# with one that says "or NULL" PostgreSQL would settle for a plan that reads the dead letters of all queues.
_WHERE: Final = """
    WHERE d.bucket = $1 AND ($2::text IS NULL OR d.group_name = $2)
        AND ($3::timestamptz IS NULL OR d.failed_at >= $3) AND ($4::timestamptz IS NULL OR d.failed_at <= $4)
"""
_PLACES: Final = {
    "anywhere": " AND $6::uuid[] IS NULL",
    "group": " AND d.group_name = $2::text AND $6::uuid[] IS NULL",
    "queue": " AND d.queue_id = ($6::uuid[])[1]",
    "partitions": " AND d.partition_id = ANY ($6::uuid[])",
}
_LIST: Final = {
    place: "SELECT d.*, p.name AS partition, q.name AS queue, q.namespace, q.task"
    " FROM (SELECT d.* FROM queen.dead_letters d"
    + _WHERE
    + there
    + " ORDER BY d.failed_at DESC, d.message_offset DESC LIMIT $5) d"
    " CROSS JOIN LATERAL (SELECT qu.name, qu.namespace, qu.task FROM queen.queues qu"
    " WHERE qu.queue_id = d.queue_id LIMIT 1) q"
    " CROSS JOIN LATERAL (SELECT pa.name FROM queen.partitions pa"
    " WHERE pa.bucket = $1 AND pa.partition_id = d.partition_id LIMIT 1) p"
    " ORDER BY d.failed_at DESC, d.message_offset DESC"
    for place, there in _PLACES.items()
}
_TOTAL: Final = (
    "SELECT coalesce(sum(s.dead_letters), 0)::bigint FROM ("
    + ALL_SUMS
    + ") s JOIN queen.queues q ON q.queue_id = s.queue_id"
    " WHERE ($1::uuid[] IS NULL OR s.queue_id = ANY ($1)) AND ($2::text IS NULL OR s.group_name = $2)"
)
_COUNT: Final = {
    place: "SELECT count(*) FROM (SELECT FROM queen.dead_letters d" + _WHERE + there + " LIMIT $5) d"
    for place, there in _PLACES.items()
}


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter as stored. ``line``: see segments.py; the id prefix is the start of ``message_id``."""

    queue: str
    namespace: str
    task: str
    partition: str
    partition_id: UUID
    group: str
    message_id: UUID
    retry_count: int
    created_at: datetime
    failed_at: datetime
    error: str
    minted: bool
    line: bytes


class DeadLetters:
    """The dead letters in PostgreSQL."""

    def __init__(self, bridge: Bridge, keyring: Keyring, counts: Counts) -> None:
        self._bridge = bridge
        self._keyring = keyring
        self._counts = counts

    async def find(
        self,
        *,
        queue: str | None,
        partition: str | None,
        group: str | None,
        failed_from: datetime | None,
        failed_to: datetime | None,
        limit: int,
        offset: int,
    ) -> tuple[int, list[DeadLetter]]:
        """How many match, and a page of them, newest failure first.

        The total is a kept sum, unless a partition or a time is asked for: then it is counted, up to MAX_COUNTED.
        """

        async def read(connection: Connection) -> tuple[int, list[Any]]:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                place, ids = await self._place(connection, queue, partition)
                if place == "anywhere" and group is not None:
                    place = "group"
                pages = []
                counted = 0
                for bucket in range(self._counts.buckets):
                    pages.append(
                        await connection.fetch(_LIST[place], bucket, group, failed_from, failed_to, offset + limit, ids)
                    )
                    if place == "partitions" or failed_from is not None or failed_to is not None:
                        counted += await connection.fetchval(
                            _COUNT[place], bucket, group, failed_from, failed_to, MAX_COUNTED, ids
                        )
                if place != "partitions" and failed_from is None and failed_to is None:
                    counted = await connection.fetchval(_TOTAL, ids, group)
                newest = heapq.merge(*pages, key=lambda row: (row["failed_at"], row["message_offset"]), reverse=True)
                return counted, list(newest)[offset : offset + limit]

        total, rows = await self._bridge.run(read, writes=False)
        return total, [self._dead_letter(row) for row in rows]

    async def _place(
        self, connection: Connection, queue: str | None, partition: str | None
    ) -> tuple[str, list[UUID] | None]:
        """asyncio flavor. Which kind of place is asked for, and its ids. A partition of no queue may be of any."""
        if queue is None and partition is None:
            return "anywhere", None
        rows = await connection.fetch("SELECT queue_id FROM queen.queues WHERE $1::text IS NULL OR name = $1", queue)
        queue_ids = [row["queue_id"] for row in rows]
        if partition is not None:
            return "partitions", [partition_id_of(queue_id, partition) for queue_id in queue_ids]
        return "queue", queue_ids

    def _dead_letter(self, row: Any) -> DeadLetter:
        body = Body(row["codec"], 0, row["key_id"], row["body"])  # the frame knows its size
        return DeadLetter(
            queue=row["queue"],
            namespace=row["namespace"],
            task=row["task"],
            partition=row["partition"],
            partition_id=row["partition_id"],
            group=row["group_name"],
            message_id=row["message_id"],
            retry_count=row["retry_count"],
            created_at=row["created_at"],
            failed_at=row["failed_at"],
            error=row["error"],
            minted=row["minted"],
            line=unseal(body, row["partition_id"], self._keyring, row["queue"]),
        )
