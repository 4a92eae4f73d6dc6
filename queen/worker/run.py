"""The composition root of a worker: settings in, logs up, the app built and served, all closed in reverse.

What the app decides about messages is not here, nor how the process is started and watched (supervisor.py).

    imported ──Start──▶ open the app (lifespan) ──Serve──▶ serve ──Drain or end of channel──▶ finish ──▶ exit 0
                            │            └── Prepared       └── Ready
                            └── Failed, exit 3
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
import structlog
import trio

from queen.balance import Balance
from queen.beat import next_beat
from queen.config.settings import Settings
from queen.config.sources import decode_settings
from queen.control import (
    MAX_LINE_BYTES,
    AskSnapshot,
    ControlChannel,
    Describe,
    Description,
    Drain,
    Failed,
    Heartbeat,
    Message,
    Prepared,
    Ready,
    ReloadCertificate,
    Serve,
    Start,
    TellSnapshot,
    encode,
)
from queen.errors import StartupError
from queen.model.snapshot import Snapshot
from queen.model.tree import Branch
from queen.observability import logs
from queen.service import Service as OurService
from queen.serving.describe import describe
from queen.serving.lifespan import LifespanFailed
from queen.serving.serve import HowToDrain, HowToServe, Load, serve
from queen.serving.tls import Certificate, open_certificate
from queen.worker.dump import start_dumper

if TYPE_CHECKING:
    from hypercorn.typing import ASGIFramework, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope

log = structlog.get_logger(__name__)

CRASHED: Final = 1
NEVER_SERVED: Final = 3  # the supervisor does not take this for a crash

HEARTBEAT_SECONDS: Final = 0.5
LAG_SECONDS: Final = 0.05
"""Between two looks at how late the loop is, where there are requests: what blocks it for longer is seen."""

QUIET_LAG_SECONDS: Final = 0.25
"""The same where there are none. A look of an idle process costs 0.3 ms: nothing is in the caches any more. 20 a second
were half of what an idle worker used."""

CLOSING_SECONDS: Final = 1.5
CLOSING_SHARE: Final = 0.3
"""What of the grace is for closing when requests have been cut: leases to give back, the pool, and PostgreSQL after it.
With 100 streams cut at 5 s sharp the server was gone after 6.7 s (F7 of tests/faults)."""

HARD_EXIT_MARGIN_SECONDS: Final = 1.0  # past the grace, and before the supervisor's own margin runs out
ALONE: Final = Drain()

LINGER_SECONDS: Final = 5.0
"""How long a connection may be idle in a worker that drains while others go on, before it is ended. A client that sends
meanwhile is told with the answer that it is the last one here."""

SUPERVISOR_SECONDS: Final = 0.5
"""How long the supervisor may take to say how the server is: a scrape goes on without it."""

ORPHAN_GRACE_SECONDS: Final = 0.3  # the guard in __main__.py ends the process soon after


class Statistics(Protocol):
    """What a worker reports of its app: counters that grow from its start."""

    @property
    def requests(self) -> int: ...
    @property
    def pushed(self) -> int: ...
    @property
    def popped(self) -> int: ...
    @property
    def acked(self) -> int: ...
    @property
    def requests_in_flight(self) -> int: ...


class Service(Protocol):
    """What a worker asks of its app beside ASGI, if it has it: ``app.extensions["queen"]``."""

    def begin_drain(self, *, replaced: bool = False) -> None: ...
    def rename(self, worker_id: str) -> None: ...
    def statistics(self) -> Statistics: ...

    ask_supervisor: Callable[[], Awaitable[Snapshot | None]]


class Watched:
    """The app as the server sees it. In between, how its lifespan ends is noticed.

    The server goes on serving when an app's lifespan ends in an error; ours has closed its storage by then.
    """

    def __init__(self, app: ASGIFramework, stop: Callable[[], None]) -> None:
        self.startup_failure: str | None = None
        self.crash: BaseException | None = None
        self._app = app
        self._stop = stop

    @property
    def failed(self) -> bool:
        return self.startup_failure is not None or self.crash is not None

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def note_failure(message: ASGISendEvent) -> None:
            if message["type"] == "lifespan.startup.failed":
                self.startup_failure = message.get("message") or "the application gave no reason"
            await send(message)

        try:
            await self._app(scope, receive, note_failure)
        except (LifespanFailed, trio.Cancelled):
            raise
        except BaseException as error:
            if self.startup_failure is None:
                self.crash = error
            self._stop()
            raise


class Worker:
    """A worker that has been told to start: it opens the app, waits for its slot, and serves until it is to drain."""

    def __init__(
        self,
        app: Any,
        settings: Settings,
        channel: ControlChannel,
        tags: dict[str, object],
        certificate: Certificate | None = None,
    ) -> None:
        self._service: Service | None = getattr(app, "extensions", {}).get("queen")
        self._settings = settings
        self._channel = channel
        self._tags = tags
        self._certificate = certificate
        self._listener: socket.socket | None = None
        self._has_slot = trio.Event()  # or is not to have one any more
        self._drain_told = trio.Event()
        self._how_to_drain = HowToDrain()
        self._load = Load()
        self._lags: list[float] = []
        self._watched = Watched(app, self._end)
        self._asked = 0  # how often we asked how the server is
        self._told = TellSnapshot(0, snapshot=None)
        self._news = trio.Event()  # set, and another made, when we are told
        if self._service is not None:
            self._service.ask_supervisor = self._ask_supervisor

    async def run(self) -> int:
        """Serve. Returns the exit code."""
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._watch_signals)
                nursery.start_soon(self._hear_supervisor, nursery)
                nursery.start_soon(self._measure_lag)
                nursery.start_soon(self._beat)
                nursery.start_soon(self._serve, nursery)
        except* LifespanFailed:
            pass  # said below
        if self._watched.startup_failure is not None:
            await self._tell(Failed(error=self._watched.startup_failure))
            return NEVER_SERVED
        if self._watched.crash is not None:
            log.error("the application ended in an error", exc_info=self._watched.crash)
            return CRASHED
        return 0

    async def _serve(self, nursery: trio.Nursery) -> None:
        await serve(
            self._watched,
            self._service,
            HowToServe(shutdown_seconds=self._settings.grace_seconds),
            self._wait_listener,
            wait_drain=self._wait_drain,
            certificate=self._certificate,
            load=self._load,
        )
        nursery.cancel_scope.cancel()

    async def _wait_listener(self) -> socket.socket | None:
        # The server comes here also when the lifespan has just failed: its error is still on the way.
        if not self._watched.failed:
            gc.collect()
            gc.freeze()  # what is here now stays: going through it took the loop 12 ms and more at each full collection
            await self._tell(Prepared())
        await self._has_slot.wait()
        if self._listener is not None:
            await self._tell(Ready())
        return self._listener

    async def _wait_drain(self) -> HowToDrain:
        await self._drain_told.wait()
        return self._how_to_drain

    async def _measure_lag(self) -> None:
        due = trio.current_time()
        before = 0
        while True:
            requests = 0 if self._service is None else self._service.statistics().requests
            due = due + LAG_SECONDS if requests != before else next_beat(QUIET_LAG_SECONDS)
            before = requests
            await trio.sleep_until(due)
            lag_seconds = trio.current_time() - due
            self._lags.append(lag_seconds)
            due += lag_seconds  # a stall is reported once, not made up for by looks in a row

    async def _beat(self) -> None:
        while True:
            await self._tell(self._heartbeat())
            await trio.sleep_until(next_beat(HEARTBEAT_SECONDS))

    async def _tell(self, message: Message) -> None:
        # When the supervisor is gone, who hears its end drains; what is in flight is not cut short for want of an ear.
        with contextlib.suppress(trio.BrokenResourceError):
            await self._channel.send(message)

    def _heartbeat(self) -> Heartbeat:
        lags, self._lags = sorted(self._lags) or [0.0], []
        p50_ms, p99_ms, max_ms = (round(lags[int(part * (len(lags) - 1))] * 1000, 1) for part in (0.5, 0.99, 1.0))
        beat = Heartbeat(
            loop_lag_p50_ms=p50_ms,
            loop_lag_p99_ms=p99_ms,
            loop_lag_max_ms=max_ms,
            rss_bytes=rss_bytes(),
            connections=self._load.connections,
        )
        if self._service is None:
            return beat
        done = self._service.statistics()
        return msgspec.structs.replace(
            beat,
            requests_in_flight=done.requests_in_flight,
            requests=done.requests,
            pushed=done.pushed,
            popped=done.popped,
            acked=done.acked,
        )

    async def _ask_supervisor(self) -> Snapshot | None:
        """How the server is; None when the supervisor does not say in time."""
        self._asked += 1
        number = self._asked
        with trio.move_on_after(SUPERVISOR_SECONDS):
            await self._tell(AskSnapshot(number))
            while self._told.number < number:
                await self._news.wait()
            return self._told.snapshot
        return None

    async def _describe(self, number: int) -> None:
        ours = self._service if isinstance(self._service, OurService) else None
        branches = () if ours is None else await describe(ours, self._load.doing())
        tasks = trio.lowlevel.current_statistics().tasks_living
        branches = (*branches, Branch(kind="more", name=f"{tasks} tasks in all"))
        said = Description(number, branches)
        while len(encode(said)) > MAX_LINE_BYTES:  # unusually long names: better half of it than nothing
            said = Description(number, said.branches[: len(said.branches) // 2])
        await self._tell(said)

    async def _hear_supervisor(self, answers: trio.Nursery) -> None:
        while (message := await self._channel.receive()) is not None:
            match message:
                case Serve():
                    self._take_slot(message, socket.socket(fileno=self._channel.take_descriptor()))
                case Drain():
                    self._drain(self._settings.grace_seconds, "asked to", message)
                case Describe(number):
                    answers.start_soon(self._describe, number)
                case TellSnapshot():
                    self._told = message
                    self._news.set()
                    self._news = trio.Event()
                case ReloadCertificate() if self._certificate is not None:
                    await self._certificate.reload()
        self._drain(ORPHAN_GRACE_SECONDS, "the supervisor is gone")

    def _take_slot(self, told: Serve, listener: socket.socket) -> None:
        self._tags.update(slot=told.slot, generation=told.generation)
        if self._service is not None:
            self._service.rename(worker_name(self._settings, told.slot))
        self._listener = listener
        if told.balanced:
            self._load.balance = Balance(told.slot, *(self._channel.take_descriptor() for _ in range(3)))
        self._has_slot.set()

    async def _watch_signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                self._drain(self._settings.grace_seconds, signal.Signals(number).name)

    def _drain(self, grace_seconds: float, why: str, told: Drain = ALONE) -> None:
        """Take nothing new, let what is begun finish, and be gone by a deadline that no stuck client can move."""
        log.info("draining", why=why, grace_seconds=grace_seconds)
        exit_by(grace_seconds + HARD_EXIT_MARGIN_SECONDS)
        linger_seconds = min(LINGER_SECONDS, grace_seconds / 2) if told.others else 0.0
        closing_seconds = min(CLOSING_SECONDS, grace_seconds * CLOSING_SHARE)
        self._how_to_drain = HowToDrain(grace_seconds - closing_seconds, linger_seconds, keep_backlog=told.replaced)
        if self._service is not None:
            self._service.begin_drain(replaced=told.others)  # parked polls end now, with nothing
        self._end()

    def _end(self) -> None:
        self._drain_told.set()
        self._has_slot.set()


def rss_bytes() -> int:
    """Memory this process holds now; without a descriptor left to ask with, the most it ever held.

    /proc answers from memory, so it does not block.
    """
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def exit_by(seconds: float) -> None:
    """End the process then, whatever its loop is doing: a send to a client that does not read is shielded for ever."""
    timer = threading.Timer(seconds, os._exit, (CRASHED,))
    timer.daemon = True
    timer.start()


def worker_name(settings: Settings, slot: int | None) -> str:
    """What the worker is called in figures and traces; at its end is the number of its slot."""
    return f"{settings.worker_id or socket.gethostname()}-{'spare' if slot is None else slot}"


def allow_descriptors() -> None:
    """As many as this process may have. The usual limit of 1,024 is for programs that use select(); a worker holds one
    for each connection."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def give_signs_of_life(channel: ControlChannel) -> None:
    """Heartbeats that say nothing but that this process has come so far; until cancelled."""
    with contextlib.suppress(trio.BrokenResourceError):  # whoever receives hears of it
        while True:
            await channel.send(Heartbeat(rss_bytes=rss_bytes()))
            await trio.sleep(HEARTBEAT_SECONDS)


async def run_worker(control: socket.socket, factory: Callable[[Settings], Any]) -> int:
    """Wait to be told to start, then serve. Returns the exit code."""
    allow_descriptors()
    start_dumper()
    async with ControlChannel(control) as channel:
        async with trio.open_nursery() as waiting:
            waiting.start_soon(give_signs_of_life, channel)
            start = await channel.receive()
            waiting.cancel_scope.cancel()
        if not isinstance(start, Start):
            return 0  # drained, or orphaned, before there was anything to do
        settings = decode_settings(start.settings)
        tags = logs.configure(
            settings.log_level, settings.log_format, timestamp=settings.log_timestamp, slot=None, pid=os.getpid()
        )
        try:
            app = factory(msgspec.structs.replace(settings, worker_id=worker_name(settings, None)))
            certificate = open_certificate(settings)
        except StartupError as error:
            await channel.send(Failed(error=error.detail))
            return NEVER_SERVED
        return await Worker(app, settings, channel, tags, certificate).run()
