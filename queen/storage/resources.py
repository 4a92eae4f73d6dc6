"""Queues, partitions and labels with what is in them, for pages. Reads sums and bounded samples, no messages."""

from __future__ import annotations

from typing import Any, Final
from uuid import UUID

from queen.model.queue import Queue
from queen.model.status import Depth, LabelStatus, Overview, PartitionStatus, QueueStatus, Six, six_of
from queen.storage.bridge import Bridge
from queen.storage.catalogue import SELECT_QUEUE, queue_of
from queen.storage.connect import Connection
from queen.storage.counts import PER_QUEUE, Counts

MAX_PARTITIONS: Final = 1000
"""Partitions of one queue that a page shows."""

MAX_CANDIDATES: Final = 2000
"""Partitions that a page looks at in search of those with something pending."""

MAX_LAGS: Final = 1000
"""Groups whose time lag the overview samples, those with the most messages ahead first."""

MAX_LEASES: Final = 10_000
"""Leases that the overview sums."""

_STATES: Final = "SELECT * FROM queen.partition_states($1, NULL, $2, $3, $4)"
_LIST: Final = "SELECT queen.list_partitions($1, $2, $3, $4)"
_LABELS: Final = (
    PER_QUEUE
    + """
    SELECT q.namespace, q.task, count(*) AS queues, coalesce(sum(p.partitions), 0)::bigint AS partitions,
        coalesce(sum(p.total), 0)::bigint AS total, coalesce(sum(p.ahead), 0)::bigint AS ahead,
        coalesce(sum(dead.letters), 0)::bigint AS dead_letters
    FROM queen.queues q
    LEFT JOIN per_queue p ON p.queue_id = q.queue_id
    LEFT JOIN (SELECT s.queue_id, sum(s.dead_letters) AS letters FROM sums s GROUP BY s.queue_id) dead
        ON dead.queue_id = q.queue_id
    GROUP BY q.namespace, q.task
    ORDER BY q.namespace, q.task
    """
)
_PENDING_QUEUES: Final = (
    PER_QUEUE
    + "SELECT p.queue_id FROM per_queue p WHERE p.ahead > 0 AND p.queue_id = ANY ($1) ORDER BY p.ahead DESC LIMIT 1000"
)
_LEASED: Final = """
    SELECT coalesce(sum(c.messages), 0)::bigint FROM (
        SELECT cu.lease_end - greatest(cu.lease_first, cu.committed) AS messages FROM queen.cursors cu
        WHERE cu.bucket = $1 AND cu.lease_id IS NOT NULL AND cu.lease_expires_at > clock_timestamp()
            AND cu.lease_epoch = $2
        LIMIT $3
    ) c
"""
_SOME_PARTITIONS: Final = """
    SELECT q.queue_id, p.partition_id
    FROM unnest($2::uuid[]) AS q (queue_id)
    CROSS JOIN LATERAL unnest(queen.list_partitions($1, q.queue_id, false, $3)) AS p (partition_id)
    LIMIT $3
"""
_PENDING_PARTITIONS: Final = """
    SELECT q.queue_id, p.partition_id
    FROM unnest($2::uuid[]) AS q (queue_id)
    CROSS JOIN LATERAL unnest(queen.list_partitions($1, q.queue_id, true, $3)) AS p (partition_id)
    LIMIT $3
"""


class Resources:
    """What there is, in PostgreSQL."""

    def __init__(self, bridge: Bridge, counts: Counts) -> None:
        self._bridge = bridge
        self._counts = counts
        self._buckets = counts.buckets

    async def queue(self, name: str) -> tuple[QueueStatus, list[PartitionStatus]] | None:
        """A queue and its partitions, at most MAX_PARTITIONS a bucket; None when there is none of that name."""

        async def read(connection: Connection) -> tuple[QueueStatus, list[PartitionStatus]] | None:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                queues = await self._counts.read_queues(connection, name)
                if not queues:
                    return None
                queue_id = queues[0].queue.queue_id
                partitions: list[PartitionStatus] = []
                for bucket in range(self._buckets):
                    ids = await connection.fetchval(_LIST, bucket, queue_id, False, MAX_PARTITIONS)
                    partitions += await self._states(connection, bucket, queue_id, ids)
                partitions.sort(key=lambda partition: partition.name)
                return queues[0], partitions

        return await self._bridge.run(read, writes=False)

    async def _states(
        self, connection: Connection, bucket: int, queue_id: UUID, ids: list[UUID]
    ) -> list[PartitionStatus]:
        """asyncio flavor."""
        rows = await connection.fetch(_STATES, bucket, connection.epoch, queue_id, ids)
        return [_partition(row) for row in rows]

    async def partitions(self, queue: str | None, min_depth: int, limit: int) -> list[tuple[Queue, PartitionStatus]]:
        """Partitions of a queue or of all, at most ``limit``; with ``min_depth`` those that have so much pending, as
        far as they are among MAX_CANDIDATES that may have something."""

        async def read(connection: Connection) -> list[tuple[Queue, PartitionStatus]]:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                rows = await connection.fetch(
                    SELECT_QUEUE + " WHERE $1::text IS NULL OR name = $1 ORDER BY name", queue
                )
                queues = {row["queue_id"]: row for row in rows}
                sql, most, queue_ids = _SOME_PARTITIONS, limit, list(queues)
                if min_depth > 0:
                    sql, most = _PENDING_PARTITIONS, MAX_CANDIDATES
                    queue_ids = [row["queue_id"] for row in await connection.fetch(_PENDING_QUEUES, queue_ids)]
                found: list[tuple[Queue, PartitionStatus]] = []
                for bucket in range(self._buckets):
                    ids: dict[UUID, list[UUID]] = {}
                    for row in await connection.fetch(sql, bucket, queue_ids, most):
                        ids.setdefault(row["queue_id"], []).append(row["partition_id"])
                    for queue_id, some in ids.items():
                        owner = queue_of(queues[queue_id])
                        found += [
                            (owner, partition)
                            for partition in await self._states(connection, bucket, queue_id, some)
                            if partition.six.pending >= min_depth
                        ]
                        if len(found) >= limit and min_depth <= 0:
                            break
                return found[:limit]

        return await self._bridge.run(read, writes=False)

    async def depth(self, name: str, group: str | None) -> Depth | None:
        """What is pending on a queue for a group (a group that is not registered has consumed nothing), or for the
        slowest group. None: no such queue."""

        async def read(connection: Connection) -> Depth | None:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                queues = await self._counts.read_queues(connection, name)
                if not queues:
                    return None
                status = queues[0]
                registered = group is not None and group in status.groups
                queue_id = status.queue.queue_id
                waiting: list[tuple[str, int]] = []
                partitions = 0
                for bucket in range(self._buckets):
                    if registered:
                        rows = await connection.fetch(
                            "SELECT * FROM queen.lagging_partitions($1, NULL, $2, $3, $4, $5)",
                            bucket,
                            connection.epoch,
                            [queue_id],
                            [group],
                            MAX_CANDIDATES,
                        )
                        here = [(row["partition_name"], row["ahead"]) for row in rows]
                    else:
                        ids = await connection.fetchval(_LIST, bucket, queue_id, group is None, MAX_CANDIDATES)
                        states = await self._states(connection, bucket, queue_id, ids)
                        here = [
                            (state.name, state.six.total if group is not None else _ahead(state.six))
                            for state in states
                        ]
                    here = [(partition, messages) for partition, messages in here if messages > 0]
                    partitions += len(here)
                    waiting += here
                waiting.sort(key=lambda pair: (-pair[1], pair[0]))
                if registered and group is not None:
                    pending = min(status.count.ahead(group), status.count.total)
                else:
                    pending = status.count.total if group is not None else _ahead(status.six)
                return Depth(pending=pending, partitions_pending=partitions, partitions=tuple(waiting[:MAX_PARTITIONS]))

        return await self._bridge.run(read, writes=False)

    async def labels(self) -> list[LabelStatus]:
        """Every combination of namespace and task that queues have."""

        async def read(connection: Connection) -> list[LabelStatus]:
            return [_label(row) for row in await connection.fetch(_LABELS)]

        return await self._bridge.run(read, writes=False)

    async def overview(self) -> Overview:
        """Everything, in a few numbers."""

        async def read(connection: Connection) -> Overview:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                now = await connection.fetchval("SELECT clock_timestamp()")
                labels = [_label(row) for row in await connection.fetch(_LABELS)]
                whole = Six()
                for label in labels:
                    whole = whole.plus(label.six)
                leased = 0
                for bucket in range(self._buckets):
                    leased += await connection.fetchval(_LEASED, bucket, connection.epoch, MAX_LEASES)
                groups, lagging = await self._counts.behind(connection, MAX_LAGS)
                lags = await self._counts.lags(connection, [(row["queue_id"], row["name"]) for row in lagging])
                seconds = [
                    0.0 if lag.oldest_at is None else max(0.0, (now - lag.oldest_at).total_seconds()) for lag in lags
                ]
                on_time = groups - len(lagging)
                return Overview(
                    labels=tuple(labels),
                    six=six_of(
                        total=whole.total,
                        ahead=whole.pending,
                        processing=leased,
                        dead_letters=whole.dead_letter,
                    ),
                    lag_seconds=(*seconds, *[0.0] * on_time),
                    lag_messages=(*(row["messages"] for row in lagging), *[0] * on_time),
                    now=now,
                )

        return await self._bridge.run(read, writes=False)


def _ahead(six: Six) -> int:
    return six.pending + six.processing


def _partition(row: Any) -> PartitionStatus:
    return PartitionStatus(
        partition_id=row["partition_id"],
        name=row["name"],
        created_at=row["created_at"],
        six=six_of(
            total=row["total"], ahead=row["ahead"], processing=row["processing"], dead_letters=row["dead_letters"]
        ),
        consumed=row["consumed"],
        oldest_at=row["oldest_at"],
        newest_at=row["newest_at"],
        active_at=row["active_at"],
    )


def _label(row: Any) -> LabelStatus:
    return LabelStatus(
        namespace=row["namespace"],
        task=row["task"],
        queues=row["queues"],
        partitions=row["partitions"],
        six=six_of(total=row["total"], ahead=row["ahead"], processing=0, dead_letters=row["dead_letters"]),
    )
