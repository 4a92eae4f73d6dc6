"""A supervised nursery: children that are kept running, replaced without a gap, watched, and drained by a deadline.

Nothing here knows what a child is: a process, a task, something made up by a test. All time is Trio's, so that every
rule can be tried on a mock clock. The rules are those of Erlang's supervisors, with two additions: a child can be
replaced by a successor that is ready before it leaves, and a place that has used up its restarts is parked and tried
again now and then, instead of taking everything down with it.

    Place: one Life after another

        booting ──ready──▶ serving ──drain──▶ ended
           ▲  │               │
           │  └──── died ◀────┴── silent for too long (Vigil)
           │          │
           └──────────┘ at once, after a wait, or parked (Restarts)
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Generic, Literal, TypeVar

import trio

PlaceState = Literal["waiting", "booting", "serving", "draining", "parked"]

TICK_SECONDS: Final = 0.5
"""Between two looks at who is silent; how exact that limit is."""


@dataclass(frozen=True)
class RestartPolicy:
    """When a child that died is started again.

    At once after a first death, then after a wait that doubles, with jitter so that places do not march in step. A
    child that served for a while had a mishap, not a fault: the count starts anew. After ``max_restarts`` of children
    that did not, within ``window_seconds``, the place is parked: tried again only every ``parked_seconds``, until a
    child serves for a while.
    """

    first_seconds: float = 1.0
    max_wait_seconds: float = 10.0
    jitter: float = 0.25  # a wait is longer by up to this part of it
    served_seconds: float = 2.0  # a child that was ready for so long has served
    max_restarts: float = 5
    window_seconds: float = 60.0
    parked_seconds: float = 60.0


class Restarts:
    """How often one place has lost its child lately, and what follows from it."""

    def __init__(self, policy: RestartPolicy, draw: Callable[[], float] = random.random) -> None:
        self.parked = False
        self._policy = policy
        self._draw = draw
        self._in_a_row = 0
        self._recent: deque[float] = deque()  # when restarts happened; the last may still be to come

    def after_death(self, now: float, served_seconds: float) -> float:
        """Seconds to wait, given how long the child that just died had served. Sets ``parked``."""
        policy = self._policy
        if served_seconds >= policy.served_seconds:
            self._in_a_row, self.parked = 0, False
            self._recent.clear()
        while self._recent and self._recent[0] <= now - policy.window_seconds:
            self._recent.popleft()
        self.parked = self.parked or len(self._recent) >= policy.max_restarts
        wait_seconds = self._wait_seconds()
        self._in_a_row += 1
        self._recent.append(now + wait_seconds)
        return wait_seconds

    @property
    def repeated(self) -> bool:
        """Whether more than one child in a row has died without having served for a while."""
        return self._in_a_row > 1

    def _wait_seconds(self) -> float:
        policy = self._policy
        stretch = 1.0 + policy.jitter * self._draw()
        if self.parked:
            return policy.parked_seconds * stretch
        if self._in_a_row == 0:
            return 0.0
        doubled: float = policy.first_seconds * 2.0 ** min(self._in_a_row - 1, 16)
        return min(policy.max_wait_seconds, doubled * stretch)


class Life(ABC):
    """One child from its start to its end. ``live`` says what that is; a Place has it run, in the nursery it was given.

    Made inside ``trio.run``.
    """

    def __init__(self) -> None:
        self.begun = False  # it is running, or has run
        self.begun_at = trio.current_time()
        self.ready = trio.Event()
        self.ready_at: float | None = None
        self.draining = trio.Event()
        self.ended = trio.Event()
        self.came_up = trio.Event()  # it was ready for something once, or has ended
        self.after: trio.Event | None = None  # it begins when that is set
        self.how = ""  # it ended, for people
        self.condemned = ""  # why it is being ended before its time
        self.heard = False  # it has given a sign of life since the Vigil last looked
        self.has_spoken = False  # it has given one at all
        self.silent_seconds = 0.0  # by the Vigil's count
        self.tell: Callable[[], None] = lambda: None  # called when it is ready, and when it has ended
        self._scope = trio.CancelScope()

    @abstractmethod
    async def live(self) -> str:
        """Run to the end; returns how it ended. Cancelled when its time is up: then it ends at once."""

    async def run(self) -> None:
        """Live, and let it be known that this is over."""
        try:
            with self._scope:
                if self.after is not None:
                    await self.after.wait()
                    self.begun_at = trio.current_time()
                self.how = await self.live()
            self.how = self.condemned or self.how or "was ended at its deadline"
        finally:
            self.ended.set()
            self.came_up.set()
            self.tell()

    @property
    def waits(self) -> bool:
        """Whether it is still to begin."""
        return self.after is not None and not self.after.is_set()

    def note_sign_of_life(self) -> None:
        self.heard = self.has_spoken = True

    def note_ready(self) -> None:
        """It serves now. Harmless when repeated."""
        if not self.ready.is_set():
            self.ready_at = trio.current_time()
            self.ready.set()
            self.came_up.set()
            self.tell()

    def served_seconds(self) -> float:
        return 0.0 if self.ready_at is None else trio.current_time() - self.ready_at

    def drain(self, seconds: float) -> None:
        """Have it finish what is begun; what is left after ``seconds`` is ended. Repeated, it can only be sooner."""
        self._scope.deadline = min(self._scope.deadline, trio.current_time() + seconds)
        self.draining.set()

    def condemn(self, why: str) -> None:
        """End it now."""
        self.condemned = self.condemned or why
        self._scope.cancel()


L = TypeVar("L", bound=Life)


class Place(Generic[L]):
    """A place that is to have one living child at any time.

    Args:
        lives: the nursery that children run in; one that drains may stay there when its place has another.
        make: the next child. One that runs already is taken as it is.
        after_death: told of every child that died as the present one, and of the wait that follows. What it raises
            ends the place.
    """

    def __init__(
        self,
        lives: trio.Nursery,
        make: Callable[[], L],
        policy: RestartPolicy,
        *,
        after_death: Callable[[L, float], None] = lambda _life, _wait_seconds: None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.present: L | None = None
        self.successor: L | None = None  # booting, while the present one serves
        self.predecessors: list[L] = []  # draining
        self.restarts = 0
        self._lives = lives
        self._make = make
        self._after_death = after_death
        self._policy = Restarts(policy, draw)
        self._replacing = trio.Lock()
        self._closing = trio.Event()
        self._retry = trio.Event()  # ends the wait before the next start
        self._news = trio.Event()  # set, and another made, when anything about a child changes

    @property
    def state(self) -> PlaceState:
        life = self.present
        if life is None or life.ended.is_set():
            return "parked" if self._policy.parked else "waiting"
        if life.draining.is_set():
            return "draining"
        return "serving" if life.ready.is_set() else "booting"

    @property
    def is_failing(self) -> bool:
        """Whether it has no child that serves, and that the next one will is not to be expected."""
        return self.state in ("waiting", "parked") or (self.state == "booting" and self._policy.repeated)

    def lives(self) -> list[L]:
        """All children that may be alive."""
        return [life for life in (*self.predecessors, self.present, self.successor) if life is not None]

    async def run(self) -> None:
        """Keep a child alive until ``close``; returns when the last one has ended."""
        while not self._closing.is_set():
            self.present = self._begin(self._make())
            await self._wait_gone()
            if self._closing.is_set():
                break
            wait_seconds = self._policy.after_death(trio.current_time(), self.present.served_seconds())
            self.restarts += 1
            self._retry = trio.Event()
            self._after_death(self.present, wait_seconds)
            with trio.move_on_after(wait_seconds):
                await self._retry.wait()
        await self.wait_closed()

    async def wait_closed(self) -> None:
        """After ``close``: until the last child has ended."""
        for life in self.lives():
            await life.ended.wait()

    async def replace(
        self, drain_seconds: float, boot_seconds: float, before_drain: Callable[[L], None] = lambda _life: None
    ) -> str:
        """Put a successor into this place that is ready before the present child drains.

        One replacement at a time; others wait. Where there is no child, the next one is started without a wait.

        Returns:
            Nothing, or why there is no successor: then all is as it was.
        """
        async with self._replacing:
            if self._closing.is_set():
                return "the place is being closed"
            if self.present is None or self.present.ended.is_set():
                self._retry.set()
                return ""
            self.successor = successor = self._begin(self._make())
            try:
                with trio.move_on_after(boot_seconds):
                    while not (successor.ready.is_set() or successor.ended.is_set()):
                        await self._news.wait()
                if successor.ended.is_set():
                    return successor.how
                if not successor.ready.is_set():
                    successor.condemn(f"was not ready after {boot_seconds:g} s")
                    await successor.ended.wait()
                    return successor.how
                predecessor = self.present
                self._promote(successor)
                if predecessor is not successor and not predecessor.ended.is_set():
                    self.predecessors.append(predecessor)
                    before_drain(predecessor)
                    predecessor.drain(drain_seconds)
                return ""
            finally:
                self.successor = None

    def take(self) -> L | None:
        """Give the present child away; another is started here in its stead. One that boots is given too: it is further
        than any that would be started now, and has the machine to itself: the other one begins when it has come up."""
        life = self.present
        if life is None or life.ended.is_set() or life.draining.is_set() or life.waits:
            return None
        other = self._make()
        if not other.begun:
            other.after = life.came_up
        self.present = self._begin(other)
        self._tell()
        return life

    def close(self, drain_seconds: float) -> None:
        """Drain, and start nothing more. Repeated, it can only be sooner."""
        self._closing.set()
        self._retry.set()
        for life in self.lives():
            life.drain(drain_seconds)
        self._tell()

    async def _wait_gone(self) -> None:
        """Until there is no present child and none that could stand in for it is coming up."""
        while not self._closing.is_set():
            assert self.present is not None
            if self.present.ended.is_set():
                if self.successor is None or self.successor.ended.is_set():
                    return
                if self.successor.ready.is_set():
                    self._promote(self.successor)
                    continue
            await self._news.wait()

    def _begin(self, life: L) -> L:
        life.tell = self._tell
        if not life.begun:
            life.begun = True
            self._lives.start_soon(life.run)
        return life

    def _promote(self, successor: L) -> None:
        self.present = successor
        self._tell()

    def _tell(self) -> None:
        self.predecessors = [life for life in self.predecessors if not life.ended.is_set()]
        self._news.set()
        self._news = trio.Event()


class Vigil:
    """Finds children that have been silent for too long.

    Time counts only while we could have heard them: one who was stopped or starved himself, and comes to, must not
    take everybody else for dead.

    Args:
        limit_seconds: of silence.
        first_seconds: the same for one that has given no sign yet: it may still be reading its code.
    """

    def __init__(self, limit_seconds: float, first_seconds: float = 60.0) -> None:
        self._limit_seconds = limit_seconds
        self._first_seconds = max(first_seconds, limit_seconds)

    async def run(self, lives: Callable[[], Iterable[L]], silent: Callable[[L], None]) -> None:
        """Look until cancelled. ``silent`` is called once for each child."""
        told: set[Life] = set()
        looked_at = trio.current_time()
        while True:
            await trio.sleep(TICK_SECONDS)
            now = trio.current_time()
            awake_seconds = min(now - looked_at, TICK_SECONDS)
            looked_at = now
            alive = list(lives())
            told.intersection_update(alive)
            for life in alive:
                life.silent_seconds = 0.0 if life.heard else life.silent_seconds + awake_seconds
                life.heard = False
                limit_seconds = self._limit_seconds if life.has_spoken else self._first_seconds
                if life.silent_seconds >= limit_seconds and life not in told:
                    told.add(life)
                    silent(life)
