"""What operators ask and order: groups, messages, statistics. The verbs of producers and consumers are in engine.py.

Whatever makes messages ready again wakes who waits for them, here and on the other workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from queen.model.queue import Queue
from queen.model.status import GroupPosition, GroupStatus
from queen.storage.groups import Moved, Target
from queen.storage.store import Store


class Admin:
    """See the module. ``tell_group`` wakes the pops of a group on a queue."""

    def __init__(self, store: Store, tell_group: Callable[[Queue, str], None]) -> None:
        self._store = store
        self._tell_group = tell_group

    # -- groups ---------------------------------------------------------------------------------------------------

    async def groups(self) -> list[GroupStatus]:
        """Every group on every queue, with its lag."""
        return await self._store.groups.registered()

    async def lagging(self, min_lag_seconds: float, limit: int) -> list[GroupPosition]:
        """Partitions in which a group is at least so far behind, the worst first, at most ``limit``."""
        found = await self._store.groups.lagging(limit)
        behind = [position for position in found if position.lag_seconds >= min_lag_seconds]
        behind.sort(key=lambda position: -position.lag_seconds)
        return behind[:limit]

    async def positions(self, group: str) -> dict[str, list[GroupPosition]]:
        """Where a group stands, by queue."""
        return await self._store.groups.positions(group)

    async def forget_group(self, group: str, queue_name: str | None) -> int:
        """Unregister a group from one queue or from all of its queues. Returns how many cursors went."""
        cursors = 0
        for queue in await self._queues_of(group, queue_name):
            gone = await self._store.groups.forget(queue, group)
            if gone is not None:
                cursors += gone
                self._tell_group(queue, group)
        return cursors

    async def restart_group(self, group: str, queue_name: str | None) -> int:
        """Put a group back to where its subscription starts, on one queue or on all. Returns how many cursors moved."""
        moved = 0
        for queue in await self._queues_of(group, queue_name):
            moved += (await self._store.groups.move(queue, group, Target("start"))).cursors
            self._tell_group(queue, group)
        return moved

    async def move_group(self, group: str, queue_name: str, target: Target, partition: str | None = None) -> Moved:
        """Move a group on a queue, or on one of its partitions; leases end."""
        queue = await self._store.catalogue.find(queue_name)
        if queue is None:
            return Moved(0)
        moved = await self._store.groups.move(queue, group, target, partition)
        self._tell_group(queue, group)
        return moved

    async def subscribe_from(self, group: str, at: datetime) -> int:
        """Change where a group starts when it is put back to its start. Returns on how many queues."""
        return await self._store.groups.subscribe_from(group, at)

    async def _queues_of(self, group: str, queue_name: str | None) -> Sequence[Queue]:
        if queue_name is None:
            return await self._store.groups.queues_of(group)
        queue = await self._store.catalogue.find(queue_name)
        return [] if queue is None else [queue]
