"""How many writes of one kind may be in flight: found by trying, not set. Pure; who writes is told by the batcher.

More writes at once help where each mostly waits (a distant PostgreSQL, a slow disk) and cost where they take turns
anyway (one disk, no free core, one partition's lock): then there are more commits for the same messages. No figure of
a single write tells the two apart, because writes get smaller as they get more; what is stored in a second does. So the
limiter climbs that hill, as the thread pool of .NET does: J. Hellerstein, V. Morrison, E. Eilebrecht, "Optimizing
Concurrency Levels in the .NET ThreadPool: A Case Study of Controller Design and Implementation" (FeBID 2008). Like
TCP Vegas (Brakmo, Peterson, 1995) it goes up by one at a time and prefers the lower of two that do the same.

    hold ──(enough of it, and somebody always waited)──> try one more ──(a tenth better)──> hold, one higher
     ^                                                       │
     └──────(no better: wait twice as long before the next)──┘          every other trial is of one fewer

Where this differs: no periodic perturbation once a limit is known to be good; a failed trial is repeated ever less
often, so that a server at rest in its limit loses nothing to searching.
"""

from __future__ import annotations

from typing import Final

WINDOW_WRITES: Final = 24
"""Writes whose rate is compared: about a tenth of a second of commits, above the noise of single ones."""

FIRST_PATIENCE: Final = 2
MOST_PATIENCE: Final = 128
"""Windows between trials: from a fifth of a second to a quarter of a minute under full load."""

_WORTH: Final = 1.1
"""What one more has to bring: less is noise, and each costs commits."""

_AS_GOOD: Final = 0.97
"""What one fewer may lose."""


class Limiter:
    """A limit from 1 to ``most``. Tell it of every write that ends."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = 1
        self._held = 1  # the limit outside trials
        self._rate = 0.0  # of the last window at it
        self._windows = 0  # since the last trial
        self._patience = FIRST_PATIENCE
        self._upwards = True
        self._begin(0.0)

    def _begin(self, now: float) -> None:
        self._since = now
        self._writes = 0
        self._weight = 0
        self._hungry = True

    def ended(self, now: float, weight: int, *, hungry: bool) -> None:
        """A write of ``weight`` ended at ``now``. ``hungry``: something waits that could not be written yet."""
        if self._writes == 0 and self._weight == 0:
            self._since, self._weight = now, -1  # the first only begins the window: it was begun before
            return
        self._weight = max(self._weight, 0) + weight
        self._writes += 1
        self._hungry = self._hungry and hungry
        if self._writes < WINDOW_WRITES:
            return
        rate = self._weight / max(now - self._since, 1e-9)
        self._judge(rate) if self.limit != self._held else self._hold(rate)
        self._begin(now)

    def _hold(self, rate: float) -> None:
        self._rate = rate
        self._windows += 1
        if self._windows < self._patience:
            return
        if self._held > 1 and not (self._upwards and self._hungry):
            self.limit = self._held - 1
        elif self._held < self.most and self._hungry:  # who never waits needs no more of them
            self.limit = self._held + 1
        self._upwards = not self._upwards

    def _judge(self, rate: float) -> None:
        better = rate >= self._rate * (_WORTH if self.limit > self._held else _AS_GOOD)
        if better:
            self._upwards = self.limit > self._held  # on in this direction
            self._held, self._rate = self.limit, rate
            self._patience = FIRST_PATIENCE
        else:
            self.limit = self._held
            self._patience = min(2 * self._patience, MOST_PATIENCE)
        self._windows = 0
