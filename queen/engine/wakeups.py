"""Who waits for what: parked pops, and the hints, timers and sweeps that wake them. Reads no message.

A pop that finds nothing parks in the *lot* of what it waits for. A hint wakes as many as there is news for, first
come first served; whoever finds something wakes the next, so nobody stampedes and nothing is left over. A hint may be
spurious; it may not be lost: a pop notes the lot's signal count before it looks, and looks again instead of
parking when the count has moved. Compare ``trio.lowlevel.ParkingLot``, which has no such memory.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import trio

from queen.model.queue import Queue

UNNAMED: Final = ""
"""In place of a partition: no partition is called so, it is news for pops that name none."""


class Topic(NamedTuple):
    """What a pop waits for: a queue (of which perhaps one partition), or any queue with a label."""

    group: str
    queue: str | None = None
    partition: str | None = None
    namespace: str | None = None
    task: str | None = None

    @property
    def hints(self) -> tuple[str, str]:
        """The hints that concern it: news for its group, and news that its queue was born or changed."""
        if self.queue is not None:
            return hint("queue", self.queue, self.group), hint("queue", self.queue, "")
        if self.namespace is not None:
            return hint("namespace", self.namespace, self.group), hint("namespace", self.namespace, "")
        return hint("task", self.task or "", self.group), hint("task", self.task or "", "")


def hint(kind: str, name: str, group: str) -> str:
    """A short name that workers tell each other; two things with one hint would only wake each other."""
    return hashlib.blake2b(f"{kind}\0{name}\0{group}".encode(), digest_size=8).hexdigest()


def hints_of(queue: Queue, group: str) -> list[str]:
    """The hints for news of a queue: its own and those of its labels. ``group`` empty: for every group."""
    hints = [hint("queue", queue.name, group)]
    if queue.namespace:
        hints.append(hint("namespace", queue.namespace, group))
    if queue.task:
        hints.append(hint("task", queue.task, group))
    return hints


class _Parked:
    """A pop that waits. ``early``: it was woken for news that is just being written."""

    __slots__ = ("early", "event")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.early = False


class Lot:
    """The pops that wait for one topic."""

    __slots__ = ("due", "hints", "signals", "topic", "users", "waiting")

    def __init__(self, topic: Topic) -> None:
        self.topic = topic
        self.hints = topic.hints
        self.users = 0
        self.signals = 0
        self.due = math.inf  # Trio time at which something may be ready
        self.waiting: deque[_Parked] = deque()

    def wake(self, count: int) -> int:
        """Wake up to ``count`` of those parked, and have those that are just looking look again."""
        self.signals += 1
        woken = 0
        while self.waiting and woken < count:
            self.waiting.popleft().event.set()
            woken += 1
        return woken

    def wake_early(self) -> bool:
        """Wake one of those parked for what is about to be written; when it is, there is news as ever."""
        if not self.waiting:
            return False
        first = self.waiting.popleft()
        first.early = True
        first.event.set()
        return True

    async def park(self) -> bool:
        """Wait to be woken; true: early. A wake-up that meets a cancelled waiter goes to the next."""
        parked = _Parked()
        self.waiting.append(parked)
        try:
            await parked.event.wait()
        except trio.Cancelled:
            if parked.event.is_set():
                self.wake(1)
            else:
                self.waiting.remove(parked)
            raise
        return parked.early


class Wakeups:
    """All lots of a worker. A lot exists while somebody uses it."""

    def __init__(self) -> None:
        self._lots: dict[Topic, Lot] = {}
        self._by_hint: dict[str, set[Topic]] = {}
        self._timers: list[tuple[float, int, Topic]] = []
        self._set = itertools.count()  # timers due at one moment are told apart by it: topics have no order
        self._earlier = trio.Event()

    @contextmanager
    def visit(self, topic: Topic) -> Iterator[Lot]:
        """The lot of a topic, for as long as a pop looks or waits."""
        lot = self._lots.get(topic)
        if lot is None:
            lot = self._lots[topic] = Lot(topic)
            for name in lot.hints:
                self._by_hint.setdefault(name, set()).add(topic)
        lot.users += 1
        try:
            yield lot
        finally:
            lot.users -= 1
            if lot.users == 0:
                del self._lots[topic]
                for name in lot.hints:
                    topics = self._by_hint[name]
                    topics.discard(topic)
                    if not topics:
                        del self._by_hint[name]

    def tell(self, hints: Iterable[str], count: int, partition: str | None = None) -> int:
        """News: wake up to ``count`` pops a topic. Pops of another partition than the one named stay parked.

        Returns how many were woken.
        """
        return sum(lot.wake(count) for lot in self._concerned(hints, _only(partition)))

    def tell_early(self, queue: str, partitions: Collection[str]) -> int:
        """Something is about to be pushed: wake a pop of each topic of the queue that it may be for, and say how many.

        Pops that wait for a label have more to ask first, and would come too late."""
        return sum(lot.wake_early() for lot in self._concerned([hint("queue", queue, "")], partitions))

    def is_looking(self, hints: Iterable[str], partition: str) -> bool:
        """Whether somebody looks for it, or waits to: told of it, they look again."""
        return any(True for _ in self._concerned(hints, (partition,)))

    def _concerned(self, hints: Iterable[str], partitions: Collection[str] | None) -> Iterator[Lot]:
        for name in hints:
            for topic in tuple(self._by_hint.get(name, ())):
                if partitions is None or topic.partition is None or topic.partition in partitions:
                    yield self._lots[topic]

    def tell_at(self, hints: Iterable[str], seconds: float, partition: str | None = None) -> None:
        """News that becomes true in ``seconds``."""
        for lot in self._concerned(hints, _only(partition)):
            self.set_timer(lot, seconds)
        self._forget_timers()

    def tell_all(self) -> None:
        """Anything may have happened: everybody looks."""
        for lot in tuple(self._lots.values()):
            lot.wake(len(lot.waiting))

    def set_timer(self, lot: Lot, seconds: float) -> None:
        """Wake one pop of the lot in ``seconds``, unless it is to be woken earlier already."""
        due = trio.current_time() + seconds
        if due < lot.due:
            lot.due = due
            heapq.heappush(self._timers, (due, next(self._set), lot.topic))
            if self._timers[0][0] == due:
                self._earlier.set()

    def _forget_timers(self) -> None:
        """Timers of lots that are gone are not removed one by one: all at once, when they are the most."""
        if len(self._timers) > 1000 + 2 * len(self._lots):
            live = {lot.topic: lot.due for lot in self._lots.values()}
            self._timers = [timer for timer in self._timers if live.get(timer[2], -1.0) == timer[0]]
            heapq.heapify(self._timers)

    async def run_timers(self) -> None:
        """Fire timers until cancelled. Sleeps to the earliest; no tick."""
        while True:
            self._earlier = trio.Event()
            with trio.move_on_at(self._timers[0][0] if self._timers else math.inf):
                await self._earlier.wait()
            now = trio.current_time()
            while self._timers and self._timers[0][0] <= now:
                due, _, topic = heapq.heappop(self._timers)
                lot = self._lots.get(topic)
                if lot is not None and lot.due <= due:
                    lot.due = math.inf
                    lot.wake(1)

    def parked(self) -> Sequence[Lot]:
        """The lots in which somebody waits."""
        return [lot for lot in self._lots.values() if lot.waiting]

    @property
    def parked_count(self) -> int:
        """Pops that wait now, for a gauge."""
        return sum(len(lot.waiting) for lot in self._lots.values())


def _only(partition: str | None) -> tuple[str] | None:
    return None if partition is None else (partition,)
