"""One place for a worker: its socket, the worker that serves it, and what becomes of both when that one dies."""

from __future__ import annotations

import socket
from collections import Counter, deque
from collections.abc import Callable
from typing import Final

import structlog
import trio

from queen.balance import ABSENT
from queen.control import Heartbeat
from queen.model.snapshot import SlotSnapshot
from queen.supervision.children import NEVER_SERVED
from queen.supervision.handover import LeftSlot
from queen.supervision.listeners import PassedPort, Port
from queen.supervision.nursery import Place, RestartPolicy
from queen.supervision.process import KILL_MARGIN_SECONDS, Surroundings, WorkerProcess

log = structlog.get_logger(__name__)

TALLIES: Final = ("requests", "pushed", "popped", "acked")
RATE_SECONDS: Final = 5.0  # what a rate is taken over
BOOT_SECONDS: Final = 120.0
"""For a successor to be ready, or the one it was to replace stays. Migrations of a large database run in here, too."""


class Slot:
    """A listening socket, and one worker after another to serve it.

    The socket outlives a worker that is replaced at once: connections wait in its backlog for the successor instead
    of being refused. Before a wait it is closed, so that the kernel gives connections to the other slots only, and what
    waits in it is given to them; it is opened again when there is a worker that lacks nothing else.

    Args:
        lives: the nursery that workers run in.
        spare: a worker that has booted and needs a socket only, if there is one.
        left: by the supervisor before: what goes on here.
    """

    def __init__(
        self,
        around: Surroundings,
        index: int,
        port: Port,
        lives: trio.Nursery,
        policy: RestartPolicy,
        spare: Callable[[], WorkerProcess | None] = lambda: None,
        left: LeftSlot | None = None,
    ) -> None:
        self.index = index
        self.ever_ready = False
        self.hopeless = False  # the next worker will not come up here either
        self.boot_failure = ""  # why the last one did not
        self.boot_crashes = 0
        self.last_exit = ""
        self.done: Counter[str] = Counter()  # what the workers here have done, one after another
        self.place = Place(lives, self._make, policy, after_death=self._after_death)
        self._around = around
        self._port = port
        self._spare = spare
        self._listener: socket.socket | None = None
        self._left: WorkerProcess | None = None  # by the supervisor before, until the place has it
        self._history: deque[tuple[float, int, int]] = deque()  # time, requests, messages: to take rates of

        if left is not None:
            self._take_over(left)

    def _take_over(self, left: LeftSlot) -> None:
        self.last_exit, self.done = left.last_exit, Counter(left.done)
        self.place.restarts = left.restarts
        if left.listener is not None:
            self._listener = socket.socket(fileno=left.listener)
        if left.worker is not None:
            self.ever_ready = True
            self._left = WorkerProcess(self._around, left.worker)
            self._left.take_over(self.index)

    def leave(self) -> LeftSlot:
        """What a successor of this supervisor has to know of it."""
        return LeftSlot(
            listener=None if self._listener is None else self._listener.fileno(),
            worker=None if self.worker is None else self.worker.leave(),
            restarts=self.restarts,
            last_exit=self.last_exit,
            done=dict(self.done),
        )

    @property
    def worker(self) -> WorkerProcess | None:
        return self.place.present

    @property
    def ready(self) -> bool:
        return self.place.state == "serving"

    @property
    def restarts(self) -> int:
        return self.place.restarts

    def listen(self) -> socket.socket:
        """The socket of this slot, opened if it is closed.

        Raises:
            OSError: there is no descriptor left for it.
        """
        if self._listener is None:
            self._listener = self._port.listen()
        return self._listener

    def close_listener(self) -> None:
        """Leave accepting to the worker alone, or to nobody. Safe to repeat."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def give_backlog(self, *, and_close: bool = False) -> None:
        """Let other slots have the connections that wait here: nobody will come for a while. ``and_close``: at once
        after it; whoever comes in between is reset."""
        pool, given = self._around.pool, 0
        if self._listener is not None and pool is not None and not isinstance(self._port, PassedPort):
            given = pool.give_backlog(self._listener)
        if and_close:
            self.close_listener()
        if given:
            log.info("other slots have the connections that waited", slot=self.index, connections=given)

    async def run(self) -> None:
        """Keep a worker running until ``close``.

        Raises:
            StartupError: no slot can bring up a worker and none ever did.
        """
        await self.place.run()

    def close(self, *, others: bool = False) -> None:
        """Drain, and serve no more. ``others``: other slots go on."""
        for worker in self.place.lives():
            worker.others = others
        self.close_listener()  # or the kernel would go on taking connections for nobody
        self.place.close(self._around.settings.grace_seconds + KILL_MARGIN_SECONDS)

    async def replace(self, why: str) -> str:
        """Put a new worker in the place of the present one, without a gap. Returns why there is none, if so."""
        before = self.worker
        failure = await self.place.replace(
            self._around.settings.grace_seconds + KILL_MARGIN_SECONDS, BOOT_SECONDS, _leave_socket_to_successor
        )
        if failure:
            log.error("worker not replaced, the old one stays", slot=self.index, why=why, failure=failure)
        elif before is not None and before is not self.worker:
            log.info("worker replaced", slot=self.index, why=why, pid=self._pid(), old_pid=before.pid)
        return failure

    def snapshot(self) -> SlotSnapshot:
        worker, now = self.worker, trio.current_time()
        requests, messages = self._rates(now)
        beat = Heartbeat() if worker is None or worker.ended.is_set() else worker.heartbeat
        alive = worker is not None and not worker.ended.is_set()
        return SlotSnapshot(
            slot=self.index,
            state=self.place.state,
            pid=self._pid() if alive else None,
            generation=worker.generation if worker is not None else 0,
            uptime_seconds=round(now - worker.begun_at, 3) if alive and worker is not None else 0.0,
            restarts=self.restarts,
            last_exit=self.last_exit,
            rss_bytes=beat.rss_bytes,
            loop_lag_p50_ms=beat.loop_lag_p50_ms,
            loop_lag_p99_ms=beat.loop_lag_p99_ms,
            loop_lag_max_ms=beat.loop_lag_max_ms,
            connections=beat.connections,
            requests_in_flight=beat.requests_in_flight,
            requests=self.done["requests"],
            pushed=self.done["pushed"],
            popped=self.done["popped"],
            acked=self.done["acked"],
            requests_per_second=requests,
            messages_per_second=messages,
        )

    def note_heartbeat(self, before: Heartbeat, now: Heartbeat) -> None:
        """A worker here, also one that drains, tells what it has done."""
        for name in TALLIES:
            self.done[name] += getattr(now, name) - getattr(before, name)
        at = trio.current_time()
        self._history.append((at, self.done["requests"], self.done["pushed"] + self.done["popped"]))
        while len(self._history) > 2 and self._history[1][0] <= at - RATE_SECONDS:
            self._history.popleft()

    def note_ready(self, worker: WorkerProcess) -> None:
        self.ever_ready = True
        self.hopeless, self.boot_failure, self.boot_crashes = False, "", 0
        log.info(
            "worker ready",
            slot=self.index,
            pid=worker.pid,
            generation=worker.generation,
            seconds=round(trio.current_time() - worker.begun_at, 3),
        )
        self._around.note_ready()

    def _make(self) -> WorkerProcess:
        left, self._left = self._left, None
        if left is not None:
            left.heard_heartbeat = self.note_heartbeat
            return left
        worker = self._spare() or WorkerProcess(self._around, gently=self.ready)  # it is to follow one that serves
        worker.heard_heartbeat = self.note_heartbeat
        worker.serves = lambda: self.note_ready(worker)
        worker.assign(self.index, self.listen)
        return worker

    def _after_death(self, worker: WorkerProcess, wait_seconds: float) -> None:
        if self._around.pool is not None:
            self._around.pool.board.write(self.index, ABSENT)
        if wait_seconds:
            self.give_backlog(and_close=True)
        self.last_exit = worker.how
        served_seconds = worker.served_seconds()
        log.error(
            "worker died",
            slot=self.index,
            pid=worker.pid,
            how=worker.how,
            served_seconds=round(served_seconds, 1),
            again_in_seconds=round(wait_seconds, 1),
        )
        if self.place.state == "parked":
            log.error("too many workers died here: the slot is parked", slot=self.index, restarts=self.restarts)
        if worker.ready_at is None:
            self.boot_crashes += 1
            if worker.returncode == NEVER_SERVED and worker.failure:
                self.hopeless, self.boot_failure = True, worker.failure
            else:
                self.boot_failure = (
                    f"workers die before they are ready: the last {worker.how}; what it wrote is in the log above"
                )
            self._around.note_boot_failure()

    def _pid(self) -> int | None:
        return None if self.worker is None else self.worker.pid

    def _rates(self, now: float) -> tuple[float, float]:
        """Requests and messages a second, lately."""
        if len(self._history) < 2 or now - self._history[-1][0] > RATE_SECONDS:
            return 0.0, 0.0
        (since, requests, messages), (until, requests_now, messages_now) = self._history[0], self._history[-1]
        seconds = until - since
        return round((requests_now - requests) / seconds, 1), round((messages_now - messages) / seconds, 1)


def _leave_socket_to_successor(worker: WorkerProcess) -> None:
    worker.others = worker.replaced = True
