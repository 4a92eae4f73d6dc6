"""What operators ask and order: groups, messages, statistics. The verbs of producers and consumers are in engine.py.

Whatever makes messages ready again wakes who waits for them, here and on the other workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import msgspec
import trio

from queen.engine.batcher import Batcher
from queen.engine.monitor import Monitor
from queen.engine.spooling import PUSH_MAINTENANCE
from queen.model.browse import DeadLetterFilter, Found, MessageDetail, MessageQuery
from queen.model.message import PushResult
from queen.model.metrics import (
    DeadLetterSummary,
    Leases,
    ParkedPoint,
    Process,
    QueuePoint,
    Window,
    WorkerPoint,
)
from queen.model.queue import QUEUE_MODE, Queue
from queen.model.status import (
    Depth,
    GroupPosition,
    GroupStatus,
    LabelStatus,
    Overview,
    PartitionStatus,
    QueueStatus,
)
from queen.model.trace import NamedTrace, NewTrace, Trace, TraceName
from queen.storage.groups import Moved, Target
from queen.storage.places import Place
from queen.storage.pushes import Woken
from queen.storage.reencrypt import Step
from queen.storage.store import Store

POP_MAINTENANCE: Final = "pop_maintenance"
"""The switch that makes every pop answer with nothing."""

MAX_WAITING_TRACES: Final = 10_000
"""Traces that may wait to be recorded; past it a consumer is told so, and goes on without."""


class Admin:
    """See the module. ``tell_group`` wakes the pops of a group on a queue, ``tell_woken`` those of woken cursors."""

    def __init__(
        self,
        store: Store,
        monitor: Monitor,
        tell_group: Callable[[Queue, str], None],
        tell_woken: Callable[[Iterable[Woken]], None],
        tell_switched: Callable[[], None],
    ) -> None:
        self._store = store
        self._monitor = monitor
        self._tell_switched = tell_switched
        self._tell_group = tell_group
        self._tell_woken = tell_woken
        # one write at a time: two would wait for each other at the totals of a name that everybody uses
        self._traces: Batcher[NewTrace, UUID | None] = Batcher(
            "trace", store.traces.record, max_weight=1000, max_waiting=MAX_WAITING_TRACES
        )

    # -- resources ------------------------------------------------------------------------------------------------

    async def queues(
        self, name: str | None, namespace: str | None, task: str | None, limit: int, offset: int
    ) -> list[QueueStatus]:
        """Queues with what is in them, newest first."""
        return await self._store.counts.queues(name=name, namespace=namespace, task=task, limit=limit, offset=offset)

    async def queue(self, name: str) -> tuple[QueueStatus, list[PartitionStatus]] | None:
        """A queue and its partitions, as many as a page holds."""
        return await self._store.resources.queue(name)

    async def partitions(self, queue: str | None, min_depth: int, limit: int) -> list[tuple[Queue, PartitionStatus]]:
        """Partitions, those with at least ``min_depth`` pending."""
        return await self._store.resources.partitions(queue, min_depth, limit)

    async def depth(self, queue: str, group: str | None) -> Depth | None:
        """What is pending on a queue, for a group or for the slowest one."""
        return await self._store.resources.depth(queue, group)

    async def labels(self) -> list[LabelStatus]:
        """Namespaces and tasks with what is in them."""
        return await self._store.resources.labels()

    async def overview(self) -> tuple[Overview, float, float, float]:
        """Everything in a few numbers; messages stored and consumed a second; age of the numbers in seconds."""
        overview = await self._store.resources.overview()
        recent = self._monitor.recent
        return overview, recent.get("push_messages", 0.0), recent.get("ack_success", 0.0), 0.0

    async def clear(self, queue_name: str, partition: str | None) -> int | None:
        """Remove the messages and dead letters that a queue, or one of its partitions, holds now; None: no queue."""
        queue = await self._store.catalogue.find(queue_name)
        return None if queue is None else await self._store.messages.clear(queue, partition)

    async def delete_partition(self, queue_name: str, partition: str) -> int | None:
        """Remove a partition with all that is in it. How many messages; None: there is no such partition."""
        queue = await self._store.catalogue.find(queue_name)
        return None if queue is None else await self._store.expiry.drop_partition(queue, partition)

    # -- messages -------------------------------------------------------------------------------------------------

    async def messages(self, query: MessageQuery) -> Found:
        """A page of messages, newest first."""
        return await self._store.messages.find(query)

    async def message(self, partition_id: str, transaction_id: str) -> MessageDetail | None:
        """One message with its payload."""
        return await self._store.messages.detail(partition_id, transaction_id)

    async def erase(self, partition_id: str, transaction_id: str) -> bool:
        """Delete a message for everybody. False: there is none."""
        erased = await self._store.messages.erase(partition_id, transaction_id)
        if erased is None:
            return False
        place, released = erased
        for group in released:
            await self._tell(place, group)
        return True

    async def set_aside(self, partition_id: str, transaction_id: str) -> bool:
        """Make a message a dead letter of the consumers without a group. False: there is none."""
        place = await self._store.messages.set_aside(partition_id, transaction_id)
        if place is None:
            return False
        await self._tell(place, QUEUE_MODE)
        return True

    async def retry(self, partition_id: str, transaction_id: str) -> PushResult | Place | None:
        """Deliver a dead letter again, as a copy at the end of its partition. Place: it is no dead letter."""
        retried = await self._store.redrive.retry(partition_id, transaction_id)
        if retried is None or isinstance(retried, Place):
            return retried
        self._tell_woken(retried.woken)
        return retried.result

    # -- traces ---------------------------------------------------------------------------------------------------

    async def record_trace(self, trace: NewTrace) -> UUID | None:
        """Record a trace with whatever others wait to be recorded. Its id; None: there is no such message."""
        return await self._traces.submit(trace)

    async def traces_of(self, partition_id: str, transaction_id: str) -> list[Trace]:
        """The traces of a message, oldest first."""
        return await self._store.traces.of_message(partition_id, transaction_id)

    async def traces_by_name(self, name: str, limit: int, offset: int) -> tuple[int, list[NamedTrace]]:
        """How many traces have a name, and a page of them, oldest first."""
        return await self._store.traces.by_name(name, limit, offset)

    async def trace_names(self, limit: int, offset: int) -> tuple[int, list[TraceName]]:
        """How many names there are, and a page of them, the latest first."""
        return await self._store.traces.names(limit, offset)

    # -- metrics --------------------------------------------------------------------------------------------------

    @property
    def monitor(self) -> Monitor:
        """What is known without asking storage."""
        return self._monitor

    async def partition_counts(self, queues: Sequence[str]) -> dict[str, int]:
        """How many partitions these queues have."""
        return await self._store.counts.partitions(queues)

    async def count_queues(self, namespace: str | None, task: str | None) -> int:
        """How many queues have these labels."""
        labels = await self._store.resources.labels()
        return sum(
            label.queues
            for label in labels
            if (namespace is None or label.namespace == namespace) and (task is None or label.task == task)
        )

    async def everything(self, window: Window) -> list[QueuePoint]:
        """What was done on all queues together, newest first."""
        return await self._store.metrics.everything(window)

    async def series(self, window: Window, queue: str | None) -> list[QueuePoint]:
        """What was done on a queue, or on each of the busiest, newest first."""
        return await self._store.metrics.queues(window, queue)

    async def workers(self, window: Window) -> list[WorkerPoint]:
        """Each worker in each point of time, oldest first."""
        return await self._store.metrics.workers(window)

    async def parked(self, window: Window, queue: str | None) -> list[ParkedPoint]:
        """How many pops waited, by queue and worker."""
        return await self._store.metrics.parked(window, queue)

    async def processes(self) -> list[Process]:
        """The workers that live."""
        return await self._store.metrics.processes(self._monitor.live_seconds)

    async def cluster(self) -> dict[str, int]:
        """What all workers have done since the database was made."""
        return await self._store.metrics.cluster()

    async def leases(self) -> Leases:
        """The live leases."""
        return await self._store.metrics.leases(self._store.buckets)

    async def dead_letter_summary(self) -> DeadLetterSummary:
        """Dead letters in a few numbers."""
        return await self._store.metrics.dead_letters(self._store.buckets)

    async def dead_letters_by_queue(self) -> dict[str, int]:
        """Dead letters of the queues that have any."""
        return await self._store.metrics.dead_letters_by_queue()

    async def postgres(self) -> dict[str, list[dict[str, Any]]]:
        """What PostgreSQL says of itself."""
        return await self._store.metrics.postgres()

    async def refresh(self) -> int:
        """Bring the numbers of this worker up to date. Returns how many counted changes were folded."""
        return await self._monitor.refresh()

    # -- switches -------------------------------------------------------------------------------------------------

    async def pops_paused(self) -> bool:
        """Whether pops are switched off."""
        return POP_MAINTENANCE in await self._store.metrics.switches()

    async def pause_pops(self, *, paused: bool) -> None:
        """Switch pops off or on, on every server of this database, until it is switched back."""
        await self._store.metrics.switch(POP_MAINTENANCE, enabled=paused)
        self._tell_switched()

    async def reencrypt(self, after: str | None) -> Step | None:
        """One step of sealing again what an old key seals. None: another server is at one."""
        return await self._store.reencryption.step(after)

    @property
    def key_ids(self) -> list[str]:
        """Of the encryption keys of this server, the current one first."""
        return self._store.keyring.ids

    async def pushes_paused(self) -> bool:
        """Whether pushes are sent to the spool."""
        return PUSH_MAINTENANCE in await self._store.metrics.switches()

    async def pause_pushes(self, *, paused: bool) -> None:
        """Send pushes to the spool or store them again, on every server of this database: within a second, and until it
        is switched back."""
        await self._store.metrics.switch(PUSH_MAINTENANCE, enabled=paused)
        self._tell_switched()

    # -- life -----------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """What runs in the background, until cancelled."""
        await self._traces.run(task_status=task_status)

    # -- dead letters ---------------------------------------------------------------------------------------------

    async def matching_dead_letters(self, queue_name: str, chosen: DeadLetterFilter, limit: int) -> list[UUID] | None:
        """The messages of the dead letters that a filter chooses. None: no such queue."""
        queue = await self._store.catalogue.find(queue_name)
        return None if queue is None else await self._store.redrive.matching(queue, chosen, limit)

    async def redrive(self, queue_name: str, chosen: DeadLetterFilter, limit: int) -> list[UUID] | None:
        """Deliver dead letters again, as copies at the end of their partitions. Their messages; None: no such queue."""
        queue = await self._store.catalogue.find(queue_name)
        if queue is None:
            return None
        done = await self._store.redrive.redrive(queue, chosen, limit)
        self._tell_woken(done.woken)
        return done.message_ids

    async def remove_dead_letters(self, queue_name: str, chosen: DeadLetterFilter, limit: int) -> list[UUID] | None:
        """Remove dead letters; messages that are still stored stay. Their messages; None: no such queue."""
        queue = await self._store.catalogue.find(queue_name)
        return None if queue is None else await self._store.redrive.remove(queue, chosen, limit)

    async def _tell(self, place: Place, group: str) -> None:
        queue = await self._store.catalogue.find(place.queue)
        if queue is not None:
            self._tell_group(queue, group)

    # -- groups ---------------------------------------------------------------------------------------------------

    async def groups(self) -> list[GroupStatus]:
        """Every group on every queue, with its lag."""
        waiting = self._monitor.consumers(await self._monitor.live_processes())
        return [
            msgspec.structs.replace(group, members=group.members + waiting.get((group.queue, group.name), 0))
            for group in await self._store.groups.registered()
        ]

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
