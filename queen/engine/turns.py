"""In which order several queues are served by pops that name a label: priority, with a bound on how long it may starve.

Strict priority lets a busy queue of a higher one keep another waiting for ever. Raising the priority of whatever has
waited long enough (aging) forgets priority altogether as soon as everything is late, which is when it matters. So
every 32nd batch, of the pops of one group and label at one worker, goes by waiting time alone: the queue whose
partition has been ready longest is served, whatever its priority. With n queues that have something, none waits for
more than 32·n batches, and a higher priority still gets 31 of 32. (Compare weighted fair queueing; two classes are
enough here.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from queen.model.message import PopRequest
from queen.model.queue import Queue

FAIR_TURN: Final = 32
"""One batch in so many goes to who has waited longest."""

MAX_COUNTED: Final = 10_000
"""Groups and labels that are counted; past it the count starts over, and each gets its turn at most FAIR_TURN later."""


class Turns:
    """Whose turn it is."""

    def __init__(self) -> None:
        self._served: dict[tuple[str | None, str | None, str], int] = {}

    def order(self, request: PopRequest, queues: Sequence[Queue], dues: Mapping[int, float]) -> list[Queue]:
        """The queues in the order to serve them: what is ready by priority, then by who has waited longest, or by that
        alone; the rest after it, for a claim to say when they are due, or that they are gone.

        Args:
            dues: in how many seconds something of the queue in that place may be ready; below 0: it has been that long.
        """
        fair = self._served.get(_key(request), 0) % FAIR_TURN == FAIR_TURN - 1

        def rank(at: int) -> tuple[bool, int, float]:
            due = dues.get(at, math.inf)
            return due > 0, 0 if fair else -queues[at].options.priority, due

        return [queues[at] for at in sorted(range(len(queues)), key=rank)]

    def served(self, request: PopRequest) -> None:
        """A pop of several queues got a batch."""
        key = _key(request)
        if key not in self._served and len(self._served) >= MAX_COUNTED:
            self._served.clear()
        self._served[key] = self._served.get(key, 0) + 1


def _key(request: PopRequest) -> tuple[str | None, str | None, str]:
    return request.namespace, request.task, request.group
