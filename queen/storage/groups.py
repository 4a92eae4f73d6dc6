"""Consumer groups after their registration: what they are, how far, and moving or forgetting them.

A group's place is its cursors; every move is one transaction over all buckets, so that no pop sees half of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import msgspec

from queen.model.queue import QUEUE_MODE, Queue
from queen.model.status import GroupLag, GroupPosition, GroupStatus
from queen.storage.bridge import Bridge
from queen.storage.catalogue import SELECT_QUEUE, Catalogue, queue_of
from queen.storage.connect import Connection
from queen.storage.counts import PER_QUEUE, Counts
from queen.storage.ids import bucket_of, partition_id_of

POSITIONS_MOST: Final = 1000
"""Partitions of one queue that a page lists; a queue may have millions."""

PAGE_MOST: Final = 4_000
"""Partitions that a page lists over all queues of a group."""

_POSITIONS: Final = """
    SELECT q.queue_id, p.*
    FROM unnest($3::uuid[]) AS q (queue_id)
    CROSS JOIN LATERAL queen.group_positions($1, NULL, $2, q.queue_id, $4, $5) p
    LIMIT $6
"""
_MOVE: Final = "SELECT queen.move_group_bucket($1, NULL, $2, $3, $4, $5, $6, $7)"
_FORGET: Final = "SELECT queen.forget_group_bucket($1, $2, $3)"
_LAST_CONSUMED: Final = """
    SELECT queen.message_id(s.id_prefix, s.partition_id, c.committed - 1 - s.base_offset)
    FROM queen.cursors c
    JOIN queen.segments s ON s.bucket = $1 AND s.partition_id = c.partition_id AND s.base_offset < c.committed
    WHERE c.bucket = $1 AND c.partition_id = $2 AND c.group_name = $3
    ORDER BY s.base_offset DESC LIMIT 1
"""
_OF_GROUP: Final = (
    SELECT_QUEUE + " WHERE queue_id IN (SELECT g.queue_id FROM queen.consumer_groups g WHERE g.name = $1) ORDER BY name"
)
_REGISTERED: Final = (
    PER_QUEUE
    + """
    SELECT g.queue_id, g.name, g.mode, g.start_at, g.created_at, q.name AS queue,
        coalesce(a.messages, 0)::bigint AS ahead
    FROM queen.consumer_groups g
    JOIN queen.queues q ON q.queue_id = g.queue_id
    LEFT JOIN ahead a ON a.queue_id = g.queue_id AND a.name = g.name
    ORDER BY q.name, g.name
    """
)


class Target(msgspec.Struct, frozen=True):
    """Where to move a group: ``start`` of its subscription, ``end``, a ``time`` (``at``: the last moment that is taken
    as consumed) or an ``offset``."""

    to: str
    at: datetime | None = None
    offset: int | None = None


class Moved(msgspec.Struct, frozen=True):
    """How many cursors were moved; of a move in one partition, the last message that is behind the cursor now."""

    cursors: int
    message_id: UUID | None = None


class Groups:
    """Consumer groups in PostgreSQL."""

    def __init__(self, bridge: Bridge, catalogue: Catalogue, counts: Counts) -> None:
        self._bridge = bridge
        self._catalogue = catalogue
        self._counts = counts

    async def queues_of(self, group: str) -> list[Queue]:
        """The queues that a group is registered on."""

        async def read(connection: Connection) -> list[Queue]:
            return [queue_of(row) for row in await connection.fetch(_OF_GROUP, group)]

        return await self._bridge.run(read, writes=False)

    async def forget(self, queue: Queue, group: str) -> int | None:
        """Unregister a group from a queue: its next pop begins anew. Returns how many cursors went; None when there was
        nothing to forget."""

        async def write(connection: Connection) -> int | None:
            async with connection.transaction():
                gone = await connection.fetchval(
                    "DELETE FROM queen.consumer_groups WHERE queue_id = $1 AND name = $2 RETURNING 1",
                    queue.queue_id,
                    group,
                )
                cursors = 0
                for bucket in range(self._counts.buckets):
                    cursors += await connection.fetchval(_FORGET, bucket, queue.queue_id, group)
                return cursors if gone is not None or cursors else None

        cursors = await self._bridge.run(write)
        self._catalogue.forget_group(queue.queue_id, group)
        return cursors

    async def move(self, queue: Queue, group: str, target: Target, partition: str | None = None) -> Moved:
        """Move a group's cursors on a queue, or on one partition of it."""

        async def write(connection: Connection) -> Moved:
            async with connection.transaction():
                floor_at = await connection.fetchval(
                    "SELECT floor_at FROM queen.consumer_groups WHERE queue_id = $1 AND name = $2 FOR UPDATE",
                    queue.queue_id,
                    group,
                )
                if partition is not None:
                    return await self._move_one(connection, queue, group, target, partition, floor_at)
                await connection.execute(
                    "UPDATE queen.consumer_groups SET floor_at = CASE WHEN $3 THEN start_at END"
                    " WHERE queue_id = $1 AND name = $2",
                    queue.queue_id,
                    group,
                    target.to == "start",
                )
                return Moved(await self._move(connection, queue, group, target, None))

        return await self._bridge.run(write)

    async def _move_one(
        self,
        connection: Connection,
        queue: Queue,
        group: str,
        target: Target,
        partition: str,
        floor_at: datetime | None,
    ) -> Moved:
        """asyncio flavor. Before one cursor goes where the floor would hide what is there, the others are put where
        the floor holds them, and the floor is taken away."""
        partition_id = partition_id_of(queue.queue_id, partition)
        if floor_at is not None and target.to != "end":
            await self._move(connection, queue, group, Target("floor"), None)
            await connection.execute(
                "UPDATE queen.consumer_groups SET floor_at = NULL WHERE queue_id = $1 AND name = $2",
                queue.queue_id,
                group,
            )
        cursors = await self._move(connection, queue, group, target, partition_id)
        bucket = bucket_of(partition_id, self._counts.buckets)
        return Moved(cursors, await connection.fetchval(_LAST_CONSUMED, bucket, partition_id, group))

    async def _move(
        self, connection: Connection, queue: Queue, group: str, target: Target, partition_id: UUID | None
    ) -> int:
        """asyncio flavor."""
        buckets: Sequence[int] = range(self._counts.buckets)
        if partition_id is not None:
            buckets = [bucket_of(partition_id, self._counts.buckets)]
        moved = 0
        for bucket in buckets:
            moved += await connection.fetchval(
                _MOVE, bucket, queue.queue_id, group, partition_id, target.to, target.at, target.offset
            )
        return moved

    async def subscribe_from(self, group: str, at: datetime) -> int:
        """Change where a group starts the next time it is to start over; its cursors stay. Returns how many queues."""

        async def write(connection: Connection) -> int:
            rows = await connection.fetch(
                "UPDATE queen.consumer_groups SET mode = 'from', start_at = $2 WHERE name = $1 AND name <> $3"
                " RETURNING 1",
                group,
                at,
                QUEUE_MODE,
            )
            return len(rows)

        return await self._bridge.run(write)

    async def registered(self) -> list[GroupStatus]:
        """Every group on every queue."""

        async def read(connection: Connection) -> list[GroupStatus]:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                now = await connection.fetchval("SELECT clock_timestamp()")
                rows = await connection.fetch(_REGISTERED)
                skips = await self._counts.skips(connection, None)
                ahead = [max(0, row["ahead"] - skips.get((row["queue_id"], row["name"]), 0)) for row in rows]
                lagging = [at for at, messages in enumerate(ahead) if messages > 0]
                lags = [GroupLag()] * len(rows)
                sampled = await self._counts.lags(
                    connection, [(rows[at]["queue_id"], rows[at]["name"]) for at in lagging]
                )
                for at, lag in zip(lagging, sampled, strict=True):
                    lags[at] = lag
                return [
                    _group_status(row, messages, lag, now) for row, messages, lag in zip(rows, ahead, lags, strict=True)
                ]

        return await self._bridge.run(read, writes=False)

    async def lagging(self, limit: int) -> list[GroupPosition]:
        """Partitions in which groups lag, at most ``limit`` of each group."""

        async def read(connection: Connection) -> list[GroupPosition]:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                now = await connection.fetchval("SELECT clock_timestamp()")
                _, behind = await self._counts.behind(connection, limit)
                found = []
                for bucket in range(self._counts.buckets):
                    rows = await connection.fetch(
                        "SELECT * FROM queen.lagging_partitions($1, NULL, $2, $3, $4, $5)",
                        bucket,
                        connection.epoch,
                        [row["queue_id"] for row in behind],
                        [row["name"] for row in behind],
                        limit,
                    )
                    found += [
                        _position(row, behind[row["place"] - 1]["name"], behind[row["place"] - 1]["queue"], now)
                        for row in rows
                    ]
                return found

        return await self._bridge.run(read, writes=False)

    async def positions(self, group: str) -> dict[str, list[GroupPosition]]:
        """Where a group stands, by queue; at most POSITIONS_MOST partitions a queue, and PAGE_MOST, of a bucket."""

        async def read(connection: Connection) -> dict[str, list[GroupPosition]]:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                now = await connection.fetchval("SELECT clock_timestamp()")
                found: dict[str, list[GroupPosition]] = {}
                queues = {row["queue_id"]: row["name"] for row in await connection.fetch(_OF_GROUP, group)}
                for bucket in range(self._counts.buckets):
                    rows = await connection.fetch(
                        _POSITIONS, bucket, connection.epoch, list(queues), group, POSITIONS_MOST, PAGE_MOST
                    )
                    for row in rows:
                        queue = queues[row["queue_id"]]
                        found.setdefault(queue, []).append(_position(row, group, queue, now))
                for places in found.values():
                    places.sort(key=lambda position: position.partition)
                return dict(sorted(found.items()))

        return await self._bridge.run(read, writes=False)


def _seconds_since(then: datetime | None, now: datetime) -> float:
    return 0.0 if then is None else max(0.0, (now - then).total_seconds())


def _group_status(row: Any, ahead: int, lag: GroupLag, now: datetime) -> GroupStatus:
    return GroupStatus(
        name=row["name"],
        queue=row["queue"],
        mode=row["mode"],
        start_at=row["start_at"],
        created_at=row["created_at"],
        ahead=ahead,
        lag=lag,
        members=lag.leases,
        lag_seconds=_seconds_since(lag.oldest_at, now),
    )


def _position(row: Any, group: str, queue: str, now: datetime) -> GroupPosition:
    return GroupPosition(
        group=group,
        queue=queue,
        partition=row["partition_name"],
        partition_id=row["partition_id"],
        lease_id=row["lease_id"] if row["lease_live"] else None,
        committed=row["committed"],
        ahead=max(0, row["ahead"]),
        oldest_at=row["oldest_at"],
        lag_seconds=_seconds_since(row["oldest_at"], now),
        consumed_at=row["consumed_at"],
    )
