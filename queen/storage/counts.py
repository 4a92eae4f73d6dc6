"""How much is where, without reading it: the sums of queues and groups, and how far groups lag, from samples.

Sums are exact (queen.counts plus what was added to queen.count_changes since); lags come from a bounded number of
cursors each. Decides nothing, changes nothing but where the sums are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from queen.model.queue import QUEUE_MODE
from queen.model.status import GroupCount, GroupLag, QueueCount, QueueStatus, six_of
from queen.storage.bridge import Bridge
from queen.storage.catalogue import SELECT_QUEUE, queue_of
from queen.storage.connect import Connection

SAMPLE_BUDGET: Final = 20_000
"""Cursors that one page looks at, over all groups that lag: some 100 ms of PostgreSQL when it is all in memory."""

SAMPLE_MOST: Final = 1000
SAMPLE_LEAST: Final = 8
"""Bounds of what one group gets of it."""

MOST_SLOWEST: Final = 4
"""Groups of a queue that are equally far behind and looked at for leases; what is leased most among them counts."""

MAX_SKIPPING: Final = 10_000
"""Cursors that skip deleted messages and are looked at by one page; past it the rest is counted as pending."""

_FOLD_LOCK: Final = 0x7175_6502
"""First key of the advisory locks of folding; the second is the bucket."""

_CHANGES: Final = """
    SELECT c.queue_id, c.group_name, CASE c.kind WHEN 1 THEN c.amount ELSE 0 END AS stored,
        CASE c.kind WHEN 2 THEN c.amount ELSE 0 END AS removed, CASE c.kind WHEN 3 THEN c.amount ELSE 0 END AS erased,
        CASE c.kind WHEN 4 THEN c.amount ELSE 0 END AS partitions,
        CASE c.kind WHEN 5 THEN c.amount ELSE 0 END AS consumed,
        CASE c.kind WHEN 6 THEN c.amount ELSE 0 END AS dead_letters,
        CASE c.kind WHEN 1 THEN clock_timestamp() END AS stored_at
    FROM queen.count_changes c
"""
_FOLDED: Final = """
    SELECT c.queue_id, c.group_name, c.stored, c.removed, c.erased, c.partitions, c.consumed, c.dead_letters,
        c.stored_at
    FROM queen.counts c
"""
_SUMS_OF: Final = (
    """
    SELECT t.queue_id, t.group_name, sum(t.stored)::bigint AS stored, sum(t.removed)::bigint AS removed,
        sum(t.erased)::bigint AS erased, sum(t.partitions)::bigint AS partitions, sum(t.consumed)::bigint AS consumed,
        sum(t.dead_letters)::bigint AS dead_letters, max(t.stored_at) AS stored_at
    FROM (""",
    " UNION ALL ",
    ") t GROUP BY t.queue_id, t.group_name",
)
ALL_SUMS: Final = _SUMS_OF[0] + _FOLDED + _SUMS_OF[1] + _CHANGES + _SUMS_OF[2]
"""The sums of all queues, over all buckets."""

PER_QUEUE: Final = (
    "WITH sums AS ("
    + ALL_SUMS
    + """), ahead AS (
        SELECT g.queue_id, g.name,
            greatest(o.stored - greatest(coalesce(s.consumed, 0), o.removed), 0) AS messages
        FROM queen.consumer_groups g
        JOIN sums o ON o.queue_id = g.queue_id AND o.group_name = ''
        LEFT JOIN sums s ON s.queue_id = g.queue_id AND s.group_name = g.name
    ), per_queue AS (
        SELECT o.queue_id, o.partitions, o.stored_at, o.stored - o.removed - o.erased AS total,
            least(coalesce(slow.messages, o.stored), o.stored - o.removed - o.erased) AS ahead
        FROM sums o
        LEFT JOIN (SELECT a.queue_id, max(a.messages) AS messages FROM ahead a GROUP BY a.queue_id) slow
            ON slow.queue_id = o.queue_id
        WHERE o.group_name = ''
    )
    """
)
"""Begins a query that wants, of all queues: ``sums``; ``ahead``, what each registered group has not consumed (skips
among it); ``per_queue``, with what the slowest group has not consumed."""

_BEHIND: Final = (
    PER_QUEUE
    + """
    SELECT a.queue_id, a.name, q.name AS queue, a.messages::bigint AS messages, count(*) OVER () AS groups
    FROM ahead a JOIN queen.queues q ON q.queue_id = a.queue_id
    ORDER BY a.messages DESC LIMIT $1
    """
)

_IN_BUCKET: Final = " WHERE c.bucket = $1 AND ($2::uuid[] IS NULL OR c.queue_id = ANY ($2))"
_SOME_IN_BUCKET: Final = " WHERE c.bucket = $1 AND c.queue_id = ANY ($2)"
_SUMS: Final = _SUMS_OF[0] + _FOLDED + _IN_BUCKET + _SUMS_OF[1] + _CHANGES + _IN_BUCKET + _SUMS_OF[2]
_SOME_SUMS: Final = _SUMS_OF[0] + _FOLDED + _SOME_IN_BUCKET + _SUMS_OF[1] + _CHANGES + _SOME_IN_BUCKET + _SUMS_OF[2]
_SKIPS: Final = """
    SELECT c.queue_id, c.group_name, sum(queen.skips_ahead(c.skips, c.committed))::bigint AS skips
    FROM (
        SELECT cu.queue_id, cu.group_name, cu.committed, cu.skips FROM queen.cursors cu
        WHERE cu.bucket = $1 AND cu.skips IS NOT NULL AND ($2::uuid[] IS NULL OR cu.queue_id = ANY ($2)) LIMIT $3
    ) c
    GROUP BY c.queue_id, c.group_name
"""
_GROUPS: Final = (
    "SELECT g.queue_id, g.name FROM queen.consumer_groups g WHERE $1::uuid[] IS NULL OR g.queue_id = ANY ($1)"
)
_LAG: Final = "SELECT * FROM queen.group_lag($1, NULL, $2, $3, $4, $5)"
_QUEUES: Final = (
    SELECT_QUEUE.replace("SELECT ", "SELECT created_at, ", 1)
    + " WHERE ($1::text IS NULL OR name = $1) AND ($2::text IS NULL OR namespace = $2)"
    " AND ($3::text IS NULL OR task = $3) ORDER BY created_at DESC, name LIMIT $4 OFFSET $5"
)


class Counts:
    """Reads of the statistics. All that names a connection is asyncio-flavored and meant to run inside
    :meth:`read_only`, so that what one page says fits together."""

    def __init__(self, bridge: Bridge, buckets: int) -> None:
        self._bridge = bridge
        self.buckets = buckets

    async def sums(self, connection: Connection, queue_ids: Sequence[UUID] | None) -> dict[UUID, QueueCount]:
        """asyncio flavor. The sums of these queues, or of all; a queue that nothing was ever counted for is absent."""
        counts: dict[UUID, QueueCount] = {}
        for bucket in range(self.buckets):
            for row in await connection.fetch(_SUMS if queue_ids is None else _SOME_SUMS, bucket, queue_ids):
                count = counts.setdefault(row["queue_id"], QueueCount(groups={}))
                if row["group_name"] == "":
                    count.stored += row["stored"]
                    count.removed += row["removed"]
                    count.erased += row["erased"]
                    count.partitions += row["partitions"]
                    if row["stored_at"] is not None and (count.stored_at is None or row["stored_at"] > count.stored_at):
                        count.stored_at = row["stored_at"]
                else:
                    group = count.groups.setdefault(row["group_name"], GroupCount())
                    group.consumed += row["consumed"]
                    group.dead_letters += row["dead_letters"]
        for (queue_id, name), skips in (await self.skips(connection, queue_ids)).items():
            count = counts.setdefault(queue_id, QueueCount(groups={}))
            count.groups.setdefault(name, GroupCount()).skips = skips
        return counts

    async def skips(self, connection: Connection, queue_ids: Sequence[UUID] | None) -> dict[tuple[UUID, str], int]:
        """asyncio flavor. How many messages ahead of them groups will not be given, of those that skip any."""
        skips: dict[tuple[UUID, str], int] = {}
        for bucket in range(self.buckets):
            for row in await connection.fetch(_SKIPS, bucket, queue_ids, MAX_SKIPPING):
                key = (row["queue_id"], row["group_name"])
                skips[key] = skips.get(key, 0) + row["skips"]
        return skips

    async def behind(self, connection: Connection, limit: int) -> tuple[int, list[Any]]:
        """asyncio flavor. How many registrations there are, and those that have most ahead: queue_id, name, queue,
        messages; none with nothing."""
        rows = await connection.fetch(_BEHIND, limit)
        return (rows[0]["groups"] if rows else 0), [row for row in rows if row["messages"] > 0]

    async def lags(self, connection: Connection, pairs: Sequence[tuple[UUID, str]]) -> list[GroupLag]:
        """asyncio flavor. How far each (queue, group) lags, in the order given. The more pairs, the smaller the sample
        of each."""
        if not pairs:
            return []
        sample = max(SAMPLE_LEAST, min(SAMPLE_BUDGET // len(pairs), SAMPLE_MOST))
        lags = [GroupLag()] * len(pairs)
        for bucket in range(self.buckets):
            rows = await connection.fetch(
                _LAG, bucket, connection.epoch, [queue for queue, _ in pairs], [group for _, group in pairs], sample
            )
            for row in rows:
                place = row["place"] - 1
                lags[place] = _merge(lags[place], row)
        return lags

    async def queues(
        self,
        *,
        name: str | None = None,
        namespace: str | None = None,
        task: str | None = None,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[QueueStatus]:
        """The queues asked for with what is in them, newest first."""

        async def read(connection: Connection) -> list[QueueStatus]:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                return await self.read_queues(connection, name, namespace, task, limit, offset)

        return await self._bridge.run(read, writes=False)

    async def partitions(self, queues: Sequence[str]) -> dict[str, int]:
        """How many partitions queues have, by name."""

        async def read(connection: Connection) -> dict[str, int]:
            rows = await connection.fetch("SELECT queue_id, name FROM queen.queues WHERE name = ANY ($1)", queues)
            sums = await self.sums(connection, [row["queue_id"] for row in rows])
            return {row["name"]: sums[row["queue_id"]].partitions for row in rows if row["queue_id"] in sums}

        return await self._bridge.run(read, writes=False)

    async def read_queues(
        self,
        connection: Connection,
        name: str | None = None,
        namespace: str | None = None,
        task: str | None = None,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[QueueStatus]:
        """asyncio flavor. See :meth:`queues`."""
        rows = await connection.fetch(_QUEUES, name, namespace, task, limit, offset)
        everything = name is None and namespace is None and task is None and limit is None
        queue_ids = None if everything else [row["queue_id"] for row in rows]
        counts = await self.sums(connection, queue_ids)
        groups: dict[UUID, list[str]] = {}
        for row in await connection.fetch(_GROUPS, queue_ids):
            groups.setdefault(row["queue_id"], []).append(row["name"])
        slowest: list[tuple[UUID, str]] = []
        for queue_id, names in groups.items():
            count = counts.get(queue_id)
            if count is not None and (most := max(map(count.ahead, names))) > 0:
                slowest += [(queue_id, name) for name in names if count.ahead(name) == most][:MOST_SLOWEST]
        leased: dict[UUID, int] = {}
        for (queue_id, _), lag in zip(slowest, await self.lags(connection, slowest), strict=True):
            leased[queue_id] = max(leased.get(queue_id, 0), lag.processing)
        found = []
        for row in rows:
            queue_id = row["queue_id"]
            count = counts.get(queue_id) or QueueCount(groups={})
            names = groups.get(queue_id, [])
            ahead = max((count.ahead(group) for group in names), default=count.total)
            processing = leased.get(queue_id, 0)
            found.append(
                QueueStatus(
                    queue=queue_of(row),
                    created_at=row["created_at"],
                    count=count,
                    groups=tuple(sorted(names, key=lambda group: (group != QUEUE_MODE, group))),
                    six=six_of(total=count.total, ahead=ahead, processing=processing, dead_letters=count.dead_letters),
                )
            )
        return found

    async def fold(self) -> tuple[int, list[tuple[str, int, int]]]:
        """Put the changes counted since the last time into the sums, unless another worker is at it. Returns how many,
        and for queues how many partitions came and went."""

        async def fold(connection: Connection) -> tuple[int, list[tuple[str, int, int]]]:
            folded = 0
            births: list[tuple[str, int, int]] = []
            for bucket in range(self.buckets):
                async with connection.transaction():
                    if await connection.fetchval("SELECT pg_try_advisory_xact_lock($1, $2)", _FOLD_LOCK, bucket):
                        row = await connection.fetchrow("SELECT * FROM queen.fold_counts($1, NULL)", bucket)
                        folded += row["folded"]
                        births += zip(row["queue_names"] or (), row["created"] or (), row["deleted"] or (), strict=True)
            return folded, births

        return await self._bridge.run(fold)


def _merge(lag: GroupLag, row: object) -> GroupLag:
    """A bucket's part of a lag."""
    oldest_at: datetime | None = row["oldest_at"]  # type: ignore[index]
    if lag.oldest_at is not None and (oldest_at is None or lag.oldest_at < oldest_at):
        oldest_at = lag.oldest_at
    return GroupLag(
        partitions=lag.partitions + row["partitions"],  # type: ignore[index]
        oldest_at=oldest_at,
        processing=lag.processing + row["processing"],  # type: ignore[index]
        leases=lag.leases + row["leases"],  # type: ignore[index]
        whole=lag.whole and row["whole"],  # type: ignore[index]
    )
