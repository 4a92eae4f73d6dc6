"""Many waiting requests become one write. Knows nothing of what is written.

The idea is group commit: while a write is in flight, whoever arrives waits, and all who wait become the next
write. An idle server adds no delay (the first arrival is written at once); a busy one makes its batches as large as
its writes are slow. Compared with one write a request, fsync and the crossing into asyncio are paid once for all.

Alone that splits a crowd of clients in two: the half that was just answered comes back a moment after the next write
has begun, with the other half in it. So under load a write is put off for a moment, see :class:`Pause`; and how many
writes may be in flight is found by the :class:`~queen.engine.limiter.Limiter`.

The batcher's own tasks do the writing. A caller that is cancelled loses its answer, never the batch, and ``abandoned``
is told what it would have got. One poisoned request does not fail its neighbours: after an error that is not the
storage's own state, each request of the batch is written alone.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import structlog
import trio
from outcome import Error, Outcome, Value

from queen.engine.limiter import Limiter
from queen.errors import Overloaded, QueenError
from queen.observability.doing import BatchWrite

Item = TypeVar("Item")
Result = TypeVar("Result")

_PAUSE_SHARE: Final = 0.5
"""Of the time of a write: a request waits that long at most, for half as many writes. Of the shortest write of late it
was too short for a busy machine (perf.bench push-1, 50 connections, 2 workers: 0.080 commits a message without a pause,
0.074 with that, 0.045 with this; 2026-11)."""

_SILENCE: Final = 5
"""Times that of a write after which a crowd is taken to be gone. Consumers return after an ack, a write of another
kind."""

_WORTH: Final = 0.6
"""Share of those expected who have to come in such a time. Clients that go on once answered all do; of requests that
come whenever they like about half of a crowd does in half a round."""

_LATE: Final = 0.9
"""Share of those expected after whose coming nobody waits for the rest."""

_LONG_AGO: Final = -1e9

log = structlog.get_logger("queen.engine")


@dataclass(eq=False, slots=True)
class _Entry(Generic[Item, Result]):
    item: Item
    weight: int
    kind: str
    done: trio.Event = field(default_factory=trio.Event)
    outcome: Outcome[Result] | None = None
    abandoned: bool = False
    task: trio.lowlevel.Task = field(default_factory=trio.lowlevel.current_task)  # that waits for it
    since: float = field(default_factory=trio.current_time)


class Pause:
    """How long the next write is put off for those who are about to come. Pure: it is told the time.

    Whoever was in the last write or came during it is the crowd. When the next write could begin, those of the crowd
    who are not there yet are expected, for half the time that a write takes. Whether they come in that time is
    always watched, and only while most of them do is it waited. A single client, or the first after a silence, has no
    crowd and never waits. That large writes are not put off comes by itself: the moment is too short for their
    clients.
    """

    def __init__(self) -> None:
        self._write_seconds = 0.0  # of late, on the average
        self._crowd = 0
        self._ended_at = _LONG_AGO
        self._until = _LONG_AGO
        self._expected = 0
        self._came = 0
        self._share = 0.5  # of those expected who came in time; to begin with, not enough

    def ended(self, now: float, seconds: float, written: int, waiting: int) -> None:
        """A write ended, and now so many wait."""
        self._write_seconds += 0.1 * (seconds - self._write_seconds) if self._write_seconds else seconds
        self._crowd = written + waiting
        self._ended_at = now

    def arrived(self, now: float) -> None:
        """A request came."""
        if now <= self._until:
            self._came += 1

    def begin(self, now: float, waiting: int) -> tuple[float, int]:
        """A write could begin. Until when it is put off, and with how many waiting it begins before that."""
        if self._expected:
            self._share += 0.25 * (min(self._came / self._expected, 1.0) - self._share)
            self._expected = 0
        expected = self._crowd - waiting
        if expected <= 0 or now > self._ended_at + _SILENCE * self._write_seconds:
            return now, waiting
        self._expected = max(int(expected * _LATE), 1)
        self._came = 0
        self._until = now + self._write_seconds * _PAUSE_SHARE
        return (self._until, waiting + self._expected) if self._share >= _WORTH else (now, waiting)


@dataclass(slots=True)
class Tally:
    """Of requests of one kind: those that wait, and totals since the start. A write is counted for every kind in it,
    its time for the kind it has most of."""

    waiting: int = 0
    requests: int = 0
    writes: int = 0
    busy_seconds: float = 0.0


class Batcher(Generic[Item, Result]):
    """Folds submitted items into calls of ``write``.

    Args:
        name: for logs.
        write: one call for many items; results in the order of the items. Atomic: an exception means none was applied.
            An error of ours in place of a result is raised to whoever submitted that item.
        most_writers: calls that may be in flight at once; below that the limiter decides.
        max_weight: of one call; an item heavier than that is written alone.
        max_waiting: items that may wait; past it :class:`~queen.errors.Overloaded`.
        abandoned: told the result of an item whose caller is gone; must not block.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[Sequence[Item]], Awaitable[Sequence[Result | QueenError]]],
        *,
        max_weight: int,
        max_waiting: int,
        most_writers: int = 1,
        abandoned: Callable[[Item, Result], None] | None = None,
    ) -> None:
        self._name = name
        self._write = write
        self._limiter = Limiter(most_writers)
        self._pause = Pause()
        self._max_weight = max_weight
        self._max_waiting = max_waiting
        self._abandoned = abandoned
        self._waiting: deque[_Entry[Item, Result]] = deque()
        self._waiting_weight = 0
        self._wanted = 1  # with so many waiting the dispatcher is woken
        self._wake = trio.Event()
        self._begun = 0  # writes in flight, or about to be
        self._writing: dict[trio.lowlevel.Task, tuple[float, list[_Entry[Item, Result]]]] = {}  # by writer
        self._tallies: dict[str, Tally] = {}
        self._idle = trio.Event()

    async def submit(self, item: Item, weight: int = 1, kind: str | None = None) -> Result:
        """Have ``item`` written with whatever else waits; return its own result or raise its own error.

        ``kind``: what it counts as, where not all items are alike.
        """
        kind = kind or self._name
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"too many requests wait for {kind}; nothing was applied; try again")
        entry: _Entry[Item, Result] = _Entry(item, weight, kind)
        self._waiting.append(entry)
        self._waiting_weight += weight
        tally = self.tally(kind)
        tally.waiting += 1
        tally.requests += 1
        self._pause.arrived(entry.since)
        if len(self._waiting) >= self._wanted or self._waiting_weight >= self._max_weight:
            self._wake.set()
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
            task_status.started()
            while True:
                while not self._waiting or self._begun >= self._limiter.limit:
                    await self._wait_for(1)
                await self._wait_for_crowd()
                if batch := self._take():
                    self._begun += 1
                    writers.start_soon(self._write_and_count, batch)

    async def wait_idle(self) -> None:
        """Until no write is in flight. Those that are to come are not waited for."""
        while self._begun:
            self._idle = trio.Event()
            await self._idle.wait()

    async def _wait_for(self, wanted: int) -> None:
        """Until so many wait, or what waits fills a write, or a write has ended."""
        self._wanted = wanted
        self._wake = trio.Event()
        await self._wake.wait()

    async def _wait_for_crowd(self) -> None:
        """Put the write off, if that is worth it now."""
        until, wanted = self._pause.begin(trio.current_time(), len(self._waiting))
        with trio.move_on_at(until):
            while len(self._waiting) < wanted and self._waiting_weight < self._max_weight:
                await self._wait_for(wanted)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is written or waits to be: what is submitted now is written at once."""
        return not self._begun and not self._waiting

    def fits(self, weight: int) -> bool:
        """Whether the next write would hold an item like that."""
        return self._waiting_weight + weight <= self._max_weight

    def tally(self, kind: str | None = None) -> Tally:
        """What there was of a kind; it goes on counting."""
        return self._tallies.setdefault(kind or self._name, Tally())

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

    async def _write_and_count(self, batch: list[_Entry[Item, Result]]) -> None:
        ours = trio.lowlevel.current_task()
        weight = sum(entry.weight for entry in batch)
        started_at = trio.current_time()
        self._writing[ours] = started_at, batch
        try:
            await self._write_batch(batch)
        finally:
            now = trio.current_time()
            del self._writing[ours]
            self._begun -= 1
            self._idle.set()
            self._count(batch, now - started_at)
            self._limiter.ended(now, weight, hungry=bool(self._waiting))
            self._pause.ended(now, now - started_at, len(batch), len(self._waiting))
            self._wake.set()

    def _count(self, batch: list[_Entry[Item, Result]], seconds: float) -> None:
        counts = Counter(entry.kind for entry in batch)
        for kind in counts:
            self._tallies[kind].writes += 1
        ((most, _),) = counts.most_common(1)
        self._tallies[most].busy_seconds += seconds

    def _take(self) -> list[_Entry[Item, Result]]:
        batch: list[_Entry[Item, Result]] = []
        weight = 0
        while self._waiting and (not batch or weight + self._waiting[0].weight <= self._max_weight):
            entry = self._waiting.popleft()
            self._waiting_weight -= entry.weight
            self._tallies[entry.kind].waiting -= 1
            if entry.abandoned:
                continue  # not begun: its caller is gone, so it is not applied
            batch.append(entry)
            weight += entry.weight
        return batch

    async def _write_batch(self, batch: list[_Entry[Item, Result]]) -> None:
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
