"""One run of one fault: a server, its load, what the fault needs to know and to tell. Which fault is not known here."""

from __future__ import annotations

import json
import math
import random
import re
import signal
import statistics
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import trio

from perf.polite import Unanswered, Wire
from perf.server import free_port
from tests.acceptance.support import Server, is_alive, kill

from . import processes
from .checkers import check_resources, judge
from .history import Resources
from .load import Load
from .proxy import Proxy

START_SECONDS = 40.0
STOP_SECONDS = 30.0
LOOK_SECONDS = 0.02  # between two looks at other processes: there is no event to wait for
SETTLE_SECONDS = 15.0
SPARE_SECONDS = 15.0


class Figure(msgspec.Struct, frozen=True):
    """Something measured. With a limit it is judged: of several values, and over several seeds, the median is.

    The machine is rarely ours alone; ``worst`` is told beside it.
    """

    name: str
    values: list[float]
    limit: float | None = None
    at_least: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.values) if self.values else math.nan

    @property
    def worst(self) -> float:
        return (min if self.at_least else max)(self.values, default=math.nan)

    def passes(self) -> bool:
        if self.limit is None:
            return True
        return self.median >= self.limit if self.at_least else self.median <= self.limit


class Skipped(Exception):
    """This fault cannot be made here; the text says why."""


class Timing(msgspec.Struct, frozen=True):
    """Seconds of load before a fault, of the fault, and after it."""

    before: float
    fault: float
    after: float


class Needs(msgspec.Struct, frozen=True):
    """How a fault wants its server."""

    lease_seconds: float = 4.0
    workers: int = 2
    flags: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    drain_limit_seconds: float = 5.0  # beyond a lease: an answer that was lost takes its lease along


class Stage:
    """What a fault is played on."""

    def __init__(self, scratch: Path, seed: int, timing: Timing, needs: Needs) -> None:
        self.scratch = scratch
        self.home = scratch / "data"
        self.timing = timing
        self.needs = needs
        self.seed = seed
        self.draw = random.Random(seed)
        self.proxy: Proxy | None = None  # before PostgreSQL, for faults that want one
        self.port = free_port()
        self.load = Load(self.port, seed, needs.lease_seconds)
        self.figures: list[Figure] = []
        self.wrongs: list[str] = []
        self.notes: list[str] = []
        self.began = self.healed = 0.0  # of the fault
        self.python_path: tuple[Path, ...] = ()
        self._servers: list[Server] = []
        self._logs_before = 0

    # what it tells

    def figure(
        self, name: str, values: float | Iterable[float], *, limit: float | None = None, at_least: bool = False
    ) -> None:
        many = [float(values)] if isinstance(values, int | float) else list(values)
        self.figures.append(Figure(name, many, limit, at_least))

    def wrong(self, sentence: str) -> None:
        self.wrongs.append(sentence)

    def expect(self, truth: object, sentence: str) -> None:
        if not truth:
            self.wrong(sentence)

    # the server

    @property
    def server(self) -> Server:
        return self._servers[-1]

    @property
    def pid(self) -> int:
        return self.server.process.pid

    async def start(self, *flags: str, environment: dict[str, str] | None = None) -> float:
        """Start a server on our port and data, until it answers. Returns the seconds that took."""
        began = trio.current_time()
        self.spawn(*flags, environment=environment)
        with trio.move_on_after(START_SECONDS):
            while not await self.answers():
                code = self.server.process.poll()
                if code is not None:
                    raise RuntimeError(f"the server ended with {code}:\n{self.server.log[-3000:]}")
                await trio.sleep(LOOK_SECONDS)
            seconds = trio.current_time() - began
            await self.until(lambda: "listening on" in self.server.output, START_SECONDS)
            return seconds
        raise RuntimeError(f"the server does not answer:\n{self.server.log[-3000:]}")

    def spawn(self, *flags: str, environment: dict[str, str] | None = None) -> Server:
        """Start a server and do not wait for it."""
        server = Server(
            self.home,
            *(*self.needs.flags, *flags),
            logs=self.scratch,
            workers=self.needs.workers,
            port=self.port,
            environment={"QUEEN_SPARE": "true"} | self.needs.environment | (environment or {}),
            python_path=self.python_path,
        )
        server.port = self.port
        self._servers.append(server)
        return server

    async def answers(self, path: str = "/health") -> bool:
        wire = Wire(self.port, answer_seconds=5.0)
        try:
            status, _ = await wire.exchange("GET", path)
        except Unanswered:
            return False
        finally:
            wire.close()
        return status == 200

    @property
    def log(self) -> str:
        """What all servers of this run have logged."""
        return "".join(server.log for server in self._servers)

    def mark_log(self) -> None:
        self._logs_before = len(self.log)

    @property
    def new_log(self) -> str:
        """What was logged since ``mark_log``."""
        return self.log[self._logs_before :]

    def workers(self) -> list[int]:
        """Process ids of the workers that listen."""
        return processes.serving_pids(self.pid, self.port)

    def spare(self) -> int | None:
        """Process id of a booted worker that waits to take a place."""
        ready = {int(pid) for pid in re.findall(r'"spare worker ready", "pid": (\d+)', self.server.log)}
        serving = self.workers()
        return next((pid for pid in processes.worker_pids(self.pid) if pid in ready and pid not in serving), None)

    async def whole(self, seconds: float = 20.0) -> bool:
        """Until every slot has a worker that serves and says so."""

        def serving() -> bool:
            return len(self.workers()) == self.needs.workers

        if not await self.until(serving, seconds):
            return False
        with trio.move_on_after(seconds):
            while (status := await self.status()) is not None and status["workers_active"] < self.needs.workers:  # noqa: ASYNC110  # other processes raise no event
                await trio.sleep(0.05)
            return True
        return False

    async def until(self, look: Callable[[], object], seconds: float) -> bool:
        """Whether that became true in time."""
        with trio.move_on_after(seconds):
            while not look():  # noqa: ASYNC110  # other processes raise no event
                await trio.sleep(LOOK_SECONDS)
            return True
        return False

    async def gone(self, pids: Sequence[int], seconds: float) -> float | None:
        """Seconds until none of them is alive; None: they still are."""
        began = trio.current_time()
        if await self.until(lambda: not any(map(is_alive, pids)), seconds):
            return trio.current_time() - began
        return None

    async def status(self) -> dict[str, Any] | None:
        """What the supervisor says of itself; None when it does not answer."""
        answer = b""
        with trio.move_on_after(2.0):
            try:
                async with await trio.open_unix_socket(str(self.home / "control.sock")) as stream:
                    await stream.send_all(b'{"do":"status"}\n')
                    while not answer.endswith(b"\n"):
                        if not (chunk := await stream.receive_some()):
                            return None
                        answer += chunk
            except (OSError, trio.BrokenResourceError):
                return None
            reply = json.loads(answer)
            result: dict[str, Any] | None = reply.get("result")
            return result
        return None

    async def capacity_back(self, seconds: float = 15.0) -> float:
        """From now until connections to every slot are answered: of so many, some fall to each."""
        began = trio.current_time()

        async def probe() -> None:
            while not await self.answers("/livez"):  # noqa: ASYNC110  # another process raises no event
                await trio.sleep(LOOK_SECONDS)

        with trio.move_on_after(seconds):
            async with trio.open_nursery() as probes:
                for _ in range(16 * self.needs.workers):
                    probes.start_soon(probe)
        return trio.current_time() - began

    # the load

    def seen(
        self, since: float, until: float = math.inf, *, kind: str = "", settled_before: float = math.inf
    ) -> list[Any]:
        """Requests that were sent then; over connections that were open before ``settled_before``."""
        return [
            one
            for one in self.load.exchanged
            if since <= one.sent_at < until and (not kind or one.kind == kind) and one.opened_at <= settled_before
        ]

    def p99_ms(self, since: float, until: float = math.inf, *, settled_before: float = math.inf) -> float:
        """Of pushes that were answered with success."""
        times = sorted(
            one.ended_at - one.sent_at
            for one in self.seen(since, until, kind="push", settled_before=settled_before)
            if not one.told
        )
        return times[min(len(times) - 1, int(len(times) * 0.99))] * 1000 if times else math.nan

    def failures(self, since: float, until: float = math.inf) -> list[str]:
        return [f"{one.kind}: {one.told}" for one in self.seen(since, until) if one.told]

    # the play

    async def play(self, fault: Callable[[Stage], Awaitable[None]]) -> None:
        """Load, the fault in the middle of it, and everything looked at afterwards."""
        history = self.load.history
        await self.start()
        await self.load.configure()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.load.run)
            await trio.sleep(self.timing.before)
            await self.whole()
            await self.until(self.spare, SPARE_SECONDS)
            history.ending.before = self._resources()
            self.began = trio.current_time()
            async with trio.open_nursery() as watch:
                watch.start_soon(self._watch_status)
                await fault(self)
                watch.cancel_scope.cancel()
            self.healed = trio.current_time()
            await trio.sleep(self.timing.after)
            self.load.stop_pushing()
            limit = self.needs.lease_seconds + self.needs.drain_limit_seconds
            history.ending.drain_limit_seconds = limit
            history.ending.drain_seconds = await self.load.drain(limit)
            await self._settle_down()
            await self._compare_status()
            await self.load.take_stock()
            nursery.cancel_scope.cancel()
        await self.stop()
        if history.ending.drain_seconds is not None:
            self.figure("drained, s", history.ending.drain_seconds)
        self.figure("pushes", len(history.pushes))
        self.figure("deliveries", len(history.deliveries))
        self.wrongs += judge(history)

    def _resources(self) -> Resources:
        return processes.resources_of(self.pid, self.server.postgres_pid)

    async def _settle_down(self) -> None:
        """Give what was replaced the time to boot and to close what it no longer wants."""
        ending = self.load.history.ending
        with trio.move_on_after(SETTLE_SECONDS):
            while True:
                ending.after = self._resources()
                if not list(check_resources(self.load.history)):
                    return
                await trio.sleep(0.25)

    async def _watch_status(self) -> None:
        """Whether a worker that is gone is said to serve, twice in a row."""
        before: set[int] = set()
        while True:
            status = await self.status()
            said = {slot["pid"] for slot in status["slots"] if slot["state"] == "serving"} if status else set()
            gone = {pid for pid in said if pid is None or not is_alive(pid)}
            for pid in gone & before:
                self.load.history.ending.status_lies.append(f"{pid} is said to serve and does not run")
            before = gone
            await trio.sleep(0.5)

    async def _compare_status(self) -> None:
        """That the supervisor knows its workers, when nothing happens any more."""
        lies = self.load.history.ending.status_lies
        status: dict[str, Any] | None = None
        with trio.move_on_after(SETTLE_SECONDS):
            while (status := await self.status()) is None or status["state"] != "serving":  # noqa: ASYNC110  # other processes raise no event
                await trio.sleep(0.1)
        if status is None:
            lies.append("the supervisor does not say how it is")
            return
        if status["state"] != "serving":
            lies.append(f"the state is said to be {status['state']} when all is over")
        said = {slot["pid"] for slot in status["slots"]}
        if said != (seen := set(self.workers())):
            lies.append(f"workers are said to be {sorted(said, key=str)} and are {sorted(seen)}")
        if status["workers_active"] != len(seen):
            lies.append(f"{status['workers_active']} workers are said to be active, {len(seen)} are")

    async def stop(self) -> None:
        """Stop the server as an operator would; everything of it must go."""
        family = processes.family_of(self.pid)
        began = trio.current_time()
        kill(self.pid, signal.SIGTERM)
        await self.until(lambda: self.server.process.poll() is not None, STOP_SECONDS)
        self.figure("stopped, s", trio.current_time() - began)
        self.expect(self.server.process.returncode == 0, f"the server ended with {self.server.process.returncode}")
        left = [pid for pid in family if is_alive(pid)]
        self.expect(not left, f"processes left after a stop: {left}")

    def end(self) -> None:
        """Leave nothing behind, whatever the run came to."""
        for server in reversed(self._servers):
            for pid in processes.worker_pids(server.process.pid):
                kill(pid, signal.SIGCONT)
            kill(server.process.pid, signal.SIGCONT)
            server.end()

    def count_in_log(self, pattern: str) -> int:
        return len(re.findall(pattern, self.new_log))
