"""Many waiting requests become one write. Knows nothing of what is written.

The idea is group commit: while a write is in flight, whoever arrives waits, and all who wait become the next
write. An idle server adds no delay (the first arrival is written at once); a busy one makes its batches as large as
its writes are slow. Compared with a timer there is nothing to tune and nothing to wait for; compared with one write a
request, fsync and the crossing into asyncio are paid once for all.

The batcher's own tasks do the writing. A caller that is cancelled loses its answer, never the batch, and ``abandoned``
is told what it would have got. One poisoned request does not fail its neighbours: after an error that is not the
storage's own state, each request of the batch is written alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import structlog
import trio
from outcome import Error, Outcome, Value

from queen.errors import Overloaded, QueenError
from queen.observability.doing import BatchWrite

Item = TypeVar("Item")
Result = TypeVar("Result")

log = structlog.get_logger("queen.engine")


@dataclass(eq=False, slots=True)
class _Entry(Generic[Item, Result]):
    item: Item
    weight: int
    done: trio.Event = field(default_factory=trio.Event)
    outcome: Outcome[Result] | None = None
    abandoned: bool = False
    task: trio.lowlevel.Task = field(default_factory=trio.lowlevel.current_task)  # that waits for it
    since: float = field(default_factory=trio.current_time)


@dataclass(frozen=True, slots=True)
class BatcherStatistics:
    """A snapshot: requests waiting, writes in flight, and totals since the start."""

    waiting: int
    writing: int
    requests: int
    writes: int
    busy_seconds: float  # all writes together


class Batcher(Generic[Item, Result]):
    """Folds submitted items into calls of ``write``.

    Args:
        name: for logs.
        write: one call for many items; results in the order of the items. Atomic: an exception means none was applied.
            An error of ours in place of a result is raised to whoever submitted that item.
        writers: calls that may be in flight at once.
        max_weight: of one call; an item heavier than that is written alone.
        max_waiting: items that may wait; past it :class:`~queen.errors.Overloaded`.
        abandoned: told the result of an item whose caller is gone; must not block.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[Sequence[Item]], Awaitable[Sequence[Result | QueenError]]],
        *,
        writers: int,
        max_weight: int,
        max_waiting: int,
        abandoned: Callable[[Item, Result], None] | None = None,
    ) -> None:
        self._name = name
        self._write = write
        self._writers = writers
        self._max_weight = max_weight
        self._max_waiting = max_waiting
        self._abandoned = abandoned
        self._waiting: deque[_Entry[Item, Result]] = deque()
        self._arrived = trio.Event()
        self._writing: dict[trio.lowlevel.Task, tuple[float, list[_Entry[Item, Result]]]] = {}  # by writer
        self._requests = 0
        self._writes = 0
        self._busy_seconds = 0.0

    async def submit(self, item: Item, weight: int = 1) -> Result:
        """Have ``item`` written with whatever else waits; return its own result or raise its own error."""
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"too many requests wait for {self._name}; nothing was applied; try again")
        entry: _Entry[Item, Result] = _Entry(item, weight)
        self._waiting.append(entry)
        self._requests += 1
        self._arrived.set()
        try:
            await entry.done.wait()
        except trio.Cancelled:
            entry.abandoned = True
            if entry.outcome is not None:
                self._tell_abandoned(entry)
            raise
        assert entry.outcome is not None
        return entry.outcome.unwrap()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write until cancelled."""
        async with trio.open_nursery() as writers:
            for _ in range(self._writers):
                writers.start_soon(self._write_batches)
            task_status.started()

    def statistics(self) -> BatcherStatistics:
        return BatcherStatistics(
            len(self._waiting), len(self._writing), self._requests, self._writes, self._busy_seconds
        )

    def doing(self) -> list[BatchWrite]:
        """The writes in flight, and the one that is to come if anybody waits for it."""
        now = trio.current_time()
        writes = [
            BatchWrite(self._name, now - began, [entry.task for entry in batch], writer)
            for writer, (began, batch) in self._writing.items()
        ]
        if self._waiting:
            waiting = [entry.task for entry in self._waiting]
            writes.append(BatchWrite(self._name, now - self._waiting[0].since, waiting, None))
        return writes

    async def _write_batches(self) -> None:
        ours = trio.lowlevel.current_task()
        while True:
            while not self._waiting:
                if self._arrived.is_set():  # else another idle writer waits for it: one event wakes them all
                    self._arrived = trio.Event()
                await self._arrived.wait()
            batch = self._take()
            if not batch:
                continue
            started_at = trio.current_time()
            self._writing[ours] = started_at, batch
            try:
                await self._write_batch(batch)
            finally:
                del self._writing[ours]
                self._busy_seconds += trio.current_time() - started_at

    def _take(self) -> list[_Entry[Item, Result]]:
        batch: list[_Entry[Item, Result]] = []
        weight = 0
        while self._waiting and (not batch or weight + self._waiting[0].weight <= self._max_weight):
            entry = self._waiting.popleft()
            if entry.abandoned:
                continue  # not begun: its caller is gone, so it is not applied
            batch.append(entry)
            weight += entry.weight
        return batch

    async def _write_batch(self, batch: list[_Entry[Item, Result]]) -> None:
        self._writes += 1
        try:
            results = await self._write([entry.item for entry in batch])
        except Exception as error:  # noqa: BLE001  every caller gets it or a verdict of its own
            if len(batch) > 1 and not (isinstance(error, QueenError) and error.status == 503):
                log.warning("batch failed, writing its requests one by one", batcher=self._name, error=repr(error))
                for entry in batch:
                    await self._write_batch([entry])
                return
            for entry in batch:
                self._finish(entry, Error(error))
            return
        for entry, result in zip(batch, results, strict=True):
            self._finish(entry, Error(result) if isinstance(result, QueenError) else Value(result))

    def _finish(self, entry: _Entry[Item, Result], result: Outcome[Result]) -> None:
        entry.outcome = result
        entry.done.set()
        if entry.abandoned:
            self._tell_abandoned(entry)

    def _tell_abandoned(self, entry: _Entry[Item, Result]) -> None:
        if self._abandoned is not None and isinstance(entry.outcome, Value):
            self._abandoned(entry.item, entry.outcome.value)
