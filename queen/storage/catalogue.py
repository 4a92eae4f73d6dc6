"""Queues and consumer groups: the small tables, with a cache that PostgreSQL corrects. No message passes here.

The cache may be stale: every push names the version of the queue it relied on, every claim joins the group's row, and
both say so when it is gone; then :meth:`Catalogue.forget` and look again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Final
from uuid import UUID, uuid4

import msgspec
import trio

from queen.model.queue import DEFAULT_PARTITION, Queue, QueueOptions, StartFrom, StartMode, labels_of
from queen.storage.bridge import Bridge
from queen.storage.connect import Connection
from queen.storage.ids import bucket_of, partition_id_of

MAX_CACHED: Final = 50_000
"""Queues (about 500 bytes each) and registrations kept in memory; past it the cache starts over."""

_OPTIONS: Final = tuple(field.name for field in msgspec.structs.fields(QueueOptions))
SELECT_QUEUE: Final = "SELECT queue_id, name, namespace, task, version, " + ", ".join(_OPTIONS) + " FROM queen.queues"
_CONFIGURE: Final = "SELECT queen.configure(NULL, " + ", ".join(f"${i}" for i in range(1, 6 + len(_OPTIONS))) + ")"
_IS_REGISTERED: Final = """
    SELECT EXISTS (SELECT FROM queen.consumer_groups g JOIN queen.queues q ON q.queue_id = g.queue_id
        WHERE g.queue_id = $1 AND g.name = $2)
"""
_PURGE_PARTITIONS: Final = 500


def queue_of(row: dict[str, object]) -> Queue:
    """A queue from its row."""
    return Queue(
        queue_id=row["queue_id"],  # type: ignore[arg-type]
        name=row["name"],  # type: ignore[arg-type]
        namespace=row["namespace"],  # type: ignore[arg-type]
        task=row["task"],  # type: ignore[arg-type]
        version=row["version"],  # type: ignore[arg-type]
        options=QueueOptions(**{name: row[name] for name in _OPTIONS}),  # type: ignore[arg-type]
    )


class _QueueGone(Exception):
    """Another session has deleted the queue meanwhile. Does not leave this module."""


class Catalogue:
    """What queues and groups there are."""

    def __init__(self, bridge: Bridge, buckets: int, defaults: QueueOptions) -> None:
        self._bridge = bridge
        self._buckets = buckets
        self._defaults = defaults
        self._queues: dict[str, Queue] = {}
        self._registered: set[tuple[UUID, str]] = set()
        self._registering: dict[tuple[UUID, str], trio.Event] = {}
        self.changed: Callable[[Queue], None] = lambda queue: None  # told after a queue was created or configured

    def cached(self, name: str) -> Queue | None:
        """The queue as last seen; may be stale."""
        return self._queues.get(name)

    def forget(self, name: str) -> None:
        """Look again next time."""
        self._queues.pop(name, None)

    def forget_group(self, queue_id: UUID, group: str) -> None:
        """The group is not registered any more."""
        self._registered.discard((queue_id, group))

    def _remember(self, queue: Queue) -> Queue:
        if len(self._queues) >= MAX_CACHED:
            self._queues.clear()
        self._queues[queue.name] = queue
        return queue

    async def find(self, name: str) -> Queue | None:
        """The queue as stored now."""

        async def read(connection: Connection) -> Queue | None:
            row = await connection.fetchrow(SELECT_QUEUE + " WHERE name = $1", name)
            return queue_of(row) if row else None

        queue = await self._bridge.run(read, writes=False)
        if queue is None:
            self.forget(name)
            return None
        return self._remember(queue)

    async def labelled(self, namespace: str | None, task: str | None) -> list[Queue]:
        """The queues with both labels given, highest priority first."""

        async def read(connection: Connection) -> list[Queue]:
            rows = await connection.fetch(
                SELECT_QUEUE + " WHERE ($1::text IS NULL OR namespace = $1) AND ($2::text IS NULL OR task = $2)"
                " ORDER BY priority DESC, name",
                namespace,
                task,
            )
            return [queue_of(row) for row in rows]

        return [self._remember(queue) for queue in await self._bridge.run(read, writes=False)]

    async def configure(
        self, name: str, namespace: str, task: str, options: QueueOptions, *, only_if_missing: bool = False
    ) -> Queue:
        """Create the queue or replace its options; atomic over all buckets. Its Default partition exists afterwards,
        unless ``only_if_missing`` (then partitions are born by pushes)."""

        async def write(connection: Connection) -> Queue | None:  # asyncio flavor, as all that the bridge runs
            with suppress(_QueueGone):
                return await write_all(connection)
            return None

        async def write_all(connection: Connection) -> Queue:
            async with connection.transaction():
                queue_id = await connection.fetchval(
                    _CONFIGURE, only_if_missing, uuid4(), name, namespace, task, *msgspec.structs.astuple(options)
                )
                default = partition_id_of(queue_id, DEFAULT_PARTITION)
                await connection.executemany(
                    "SELECT queen.configure_bucket($1, NULL, $2, $3, $4)",
                    [
                        (
                            bucket,
                            queue_id,
                            default if not only_if_missing and bucket == bucket_of(default, self._buckets) else None,
                            DEFAULT_PARTITION,
                        )
                        for bucket in range(self._buckets)
                    ],
                )
                row = await connection.fetchrow(SELECT_QUEUE + " WHERE queue_id = $1", queue_id)
                if row is None:
                    raise _QueueGone  # and what was written for it goes too
                return queue_of(row)

        while (found := await self._bridge.run(write)) is None:
            pass  # it was deleted between our two looks at it: make it anew
        queue = self._remember(found)
        self.changed(queue)
        return queue

    async def ensure(self, names: Iterable[str]) -> None:
        """Know every queue named; create those that do not exist, with default options and labels from their names."""
        for name in names:
            if name not in self._queues and await self.find(name) is None:
                namespace, task = labels_of(name)
                await self.configure(name, namespace, task, self._defaults, only_if_missing=True)

    def is_registered(self, queue_id: UUID, group: str) -> bool:
        """Whether this worker has seen the registration."""
        return (queue_id, group) in self._registered

    async def register(self, queue: Queue, group: str, start: StartFrom, since: datetime | None) -> bool:
        """Store where a group starts on a queue (what is stored already wins) and give it its cursors.

        ``since``: the moment a pop with mode NEW came, if the queue did not exist then. False: the queue is gone.
        Many consumers of a group start together: the first registers, the others wait for it.
        """
        key = (queue.queue_id, group)
        while (ongoing := self._registering.get(key)) is not None:
            await ongoing.wait()
            if key in self._registered:
                return True
        self._registering[key] = trio.Event()
        try:
            return await self._register(queue, group, start, since)
        finally:
            self._registering.pop(key).set()

    async def _register(self, queue: Queue, group: str, start: StartFrom, since: datetime | None) -> bool:
        start_at = {StartMode.ALL: None, StartMode.NEW: since, StartMode.FROM: start.at}[start.mode]

        async def write(connection: Connection) -> bool:
            # A group that can be seen has all its cursors: they came with it in one transaction, and partitions that
            # are born later bring theirs. To make sure of each would read all partitions, for every worker's first pop.
            if await connection.fetchval(_IS_REGISTERED, queue.queue_id, group):
                return True
            async with connection.transaction():
                if not await connection.fetchval(
                    "SELECT queen.register_group(NULL, $1, $2, $3, $4)",
                    queue.queue_id,
                    group,
                    start.mode.value,
                    start_at,
                ):
                    return False
                await connection.executemany(
                    "SELECT queen.register_group_bucket($1, NULL, $2, $3)",
                    [(bucket, queue.queue_id, group) for bucket in range(self._buckets)],
                )
                return True

        if not await self._bridge.run(write):
            self.forget(queue.name)
            return False
        if len(self._registered) >= MAX_CACHED:
            self._registered.clear()
        self._registered.add((queue.queue_id, group))
        return True

    async def delete(self, name: str) -> bool:
        """Delete a queue and remove its data. True if it existed. Nobody can reach it from the first commit on; a
        crash in between leaves the rest to housekeeping."""

        async def unlink(connection: Connection) -> UUID | None:
            return await connection.fetchval("SELECT queen.delete_queue(NULL, $1)", name)  # type: ignore[no-any-return]

        queue_id = await self._bridge.run(unlink)
        self.forget(name)
        if queue_id is None:
            return False
        await self.purge(queue_id)
        return True

    async def purge(self, queue_id: UUID) -> None:
        """Remove what a deleted queue left behind, in bounded steps."""

        async def step(connection: Connection) -> int:
            removed = 0
            for bucket in range(self._buckets):
                removed += await connection.fetchval(
                    "SELECT queen.purge($1, $2, $3)", bucket, queue_id, _PURGE_PARTITIONS
                )
            return removed

        async def finish(connection: Connection) -> None:
            await connection.execute("DELETE FROM queen.deleted_queues WHERE queue_id = $1", queue_id)

        while await self._bridge.run(step):
            pass
        await self._bridge.run(finish)

    async def deleted(self) -> Sequence[UUID]:
        """Queues whose data may not be wholly removed yet."""

        async def read(connection: Connection) -> list[UUID]:
            rows = await connection.fetch("SELECT queue_id FROM queen.deleted_queues ORDER BY deleted_at LIMIT 100")
            return [row["queue_id"] for row in rows]

        return await self._bridge.run(read, writes=False)
