"""Counting what this process does, by queue. Passive: whoever does something says so, and one reader takes the counts.

A count costs some hundred nanoseconds and is made once a batch where there is one.
"""

from __future__ import annotations

from typing import Final

from queen.model.metrics import Tally

MAX_QUEUES: Final = 10_000
"""Queues that are counted apart between two readings; the rest counts in the total alone."""

MAX_POPPED: Final = 10_000
"""Pairs of queue and group that are remembered as popped between two readings."""


class Activity:
    """The counts since the last reading."""

    def __init__(self) -> None:
        self._queues: dict[str, Tally] = {}
        self._all = Tally()
        self._popped: set[tuple[str, str]] = set()
        self.db_errors = 0  # since the start
        self.jobs = 0

    def _of(self, queue: str | None) -> Tally | None:
        if queue is None:
            return None
        tally = self._queues.get(queue)
        if tally is None and len(self._queues) < MAX_QUEUES:
            tally = self._queues[queue] = Tally()
        return tally

    def count(self, queue: str | None, **amounts: int) -> None:
        """Add to the counts of a queue (None: none in particular) and of all."""
        for tally in (self._all, self._of(queue)):
            if tally is not None:
                for name, amount in amounts.items():
                    setattr(tally, name, getattr(tally, name) + amount)

    def popped(self, queue: str | None, group: str, messages: int) -> None:
        """A pop was answered; ``messages`` 0: with nothing."""
        if queue is not None and len(self._popped) < MAX_POPPED:
            self._popped.add((queue, group))
        for tally in (self._all, self._of(queue)):
            if tally is not None:
                tally.pop_requests += 1
                tally.pop_messages += messages
                tally.pop_empty += messages == 0

    def delivered(self, queue: str, messages: int, lag_seconds: float) -> None:
        """Messages that were pushed together are on their way, so long after it."""
        lag_ms = max(0, round(lag_seconds * 1000))
        for tally in (self._all, self._of(queue)):
            if tally is not None:
                tally.lag_count += messages
                tally.lag_ms += messages * lag_ms
                tally.lag_max_ms = max(tally.lag_max_ms, lag_ms)

    @property
    def active_queues(self) -> int:
        """Queues counted since the last reading."""
        return len(self._queues)

    def take_queues(self) -> dict[str, Tally]:
        """Hand over the counts of queues and begin anew."""
        queues, self._queues = self._queues, {}
        return queues

    def take(self) -> tuple[Tally, list[tuple[str, str]]]:
        """Hand over the counts of all queues together, and who popped, and begin anew."""
        everything, self._all = self._all, Tally()
        popped, self._popped = sorted(self._popped), set()
        return everything, popped
