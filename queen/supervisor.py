"""The parent process: binds the sockets, runs PostgreSQL and the workers as children, hears signals, stops it all.

No HTTP, no SQL, no message and none of the app is here: what is small is hard to crash.

    run ── signals, status line
      └── PostgreSQL            last to stop: workers need it to finish what they have begun
            └── Slot 0 … N-1    each holds one listening socket for good and runs one worker process after another
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec
import structlog
import trio

from queen._version import __version__
from queen.config.settings import Secret, Settings
from queen.config.sources import encode_settings
from queen.control import ControlChannel, Drain, Failed, Heartbeat, Message, Ready, Start
from queen.errors import StartupError
from queen.observability import logs
from queen.storage import embedded

log = structlog.get_logger(__name__)

NEVER_SERVED: Final = 3
"""Exit code of a process that could not start, with the reason said: starting it again changes nothing."""

LISTEN_BACKLOG: Final = 4096  # also what waits while a slot has no worker; the kernel caps it at somaxconn
KILL_MARGIN_SECONDS: Final = 2.0  # past the grace: a send to a stuck client may outlast any polite deadline
LAST_WORDS_SECONDS: Final = 1.0  # for reading what a dead child left in its pipe
MAX_OUTPUT_LINE_BYTES: Final = 64 * 1024
STATUS_SECONDS: Final = 60.0
PORT_SECONDS: Final = 2.0  # for a port held by workers of a killed supervisor, who leave within one
BOOT_CRASHES: Final = 3  # crashes of one slot before ready, none of any slot ever being ready, until it is hopeless
DEFAULT_APP: Final = "queen.app:create_app"


class Backoff:
    """How long to wait before a child that died is started again.

    At once after a first death, then from one second doubling to ten, with jitter so that slots do not march in step.
    A child that served for a while had a mishap, not a fault: the count starts anew.
    """

    FIRST_SECONDS: Final = 1.0
    MAX_SECONDS: Final = 10.0
    SERVED_SECONDS: Final = 2.0

    def __init__(self, draw: Callable[[], float] = random.random) -> None:
        self._draw = draw
        self._deaths = 0

    def after_death(self, served_seconds: float) -> float:
        """Seconds to wait, given how long the child that just died had served."""
        self._deaths = 1 if served_seconds >= self.SERVED_SECONDS else self._deaths + 1
        if self._deaths == 1:
            return 0.0
        wait: float = self.FIRST_SECONDS * 2 ** min(self._deaths - 2, 10)
        return min(self.MAX_SECONDS, wait * (1.0 + self._draw() / 4))


def run_supervisor(settings: Settings, *, app: str = DEFAULT_APP, announce: Callable[[str], None]) -> int:
    """Run the server until it is told to stop. Returns the exit code.

    Args:
        app: ``module:factory`` of the ASGI application that workers serve.
        announce: told once, in one line, where the server listens, when all workers are ready.

    Raises:
        StartupError: it never served; the sentence says why.
    """
    listeners = listen(settings.host, settings.port, settings.workers, patience_seconds=PORT_SECONDS)
    never_served: StartupError | None = None
    exit_code = NEVER_SERVED
    try:
        exit_code = trio.run(Supervisor(settings, listeners, app=app, announce=announce).run)
    except* StartupError as group:
        never_served = first_error(group)
    finally:
        for listener in listeners:
            listener.close()
    if never_served is not None:
        raise never_served
    return exit_code


def first_error(group: BaseExceptionGroup[Any]) -> StartupError:
    """The first error in the group. Others, of children that failed for the same reason, say the same."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, StartupError)
    return error


def listen(host: str, port: int, count: int, *, patience_seconds: float = 0.0) -> list[socket.socket]:
    """``count`` listening sockets on one address, among which the kernel spreads connections. May block.

    Raises:
        StartupError: the address is not ours, or the port is taken and stays so for ``patience_seconds``.
    """
    give_up_at = time.monotonic() + patience_seconds
    while True:
        try:
            return bind(host, port, count)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > give_up_at:
                reason = os.strerror(error.errno or 0)
                raise StartupError(f"cannot listen on {host} port {port}: {reason}") from error
        time.sleep(0.05)


def bind(host: str, port: int, count: int) -> list[socket.socket]:
    """One attempt at ``listen``.

    Raises:
        OSError: the address is not ours, or the port is taken.
        StartupError: there is no such host.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartupError(f"the host {host!r} cannot be resolved: {error.strerror}") from error
    # A name such as localhost has addresses of both families; what clients try first on old systems is IPv4.
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    listeners: list[socket.socket] = []
    try:
        for _ in range(count):
            listener = socket.socket(family, socket.SOCK_STREAM)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            if len(listeners) > 1:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
            if len(listeners) == 1:
                # The first binds without SO_REUSEPORT, so that a port held by another server, ours too, is refused,
                # and takes it on afterwards, so that no gap opens between the test and the use.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                address = listener.getsockname()  # of port 0: the one that was picked
        for listener in listeners:
            listener.listen(LISTEN_BACKLOG)
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


class Supervisor:
    """The parent process: its state and its one task tree."""

    def __init__(
        self, settings: Settings, listeners: Sequence[socket.socket], *, app: str, announce: Callable[[str], None]
    ) -> None:
        self.settings = msgspec.structs.replace(settings, log_format=logs.resolve_format(settings.log_format))
        self.app = app
        self.stopping = trio.Event()  # drain and exit
        self.hurry = trio.Event()  # exit now
        self.database = choose_database(settings, self.hurry)
        self.slots = [Slot(self, index, listener) for index, listener in enumerate(listeners)]
        self._url = http_url(listeners[0].getsockname())
        self._announce = announce
        self._announced = False
        self._everything = trio.CancelScope()
        self._exit_code = 0

    async def run(self) -> int:
        """Until a signal has stopped it all. Returns the exit code.

        Raises:
            ExceptionGroup: of StartupError, if it never served.
        """
        async with trio.open_nursery() as watch:
            await watch.start(self._watch_signals)
            watch.start_soon(self.report_status)
            with self._everything:
                async with trio.open_nursery() as database:
                    database.start_soon(self.database.run)
                    async with trio.open_nursery() as workers:
                        for slot in self.slots:
                            workers.start_soon(slot.run)
                        await self.stopping.wait()
                        for slot in self.slots:
                            slot.listener.close()  # or the kernel would go on taking connections for nobody
                    database.cancel_scope.cancel()
            watch.cancel_scope.cancel()
        log.info("stopped", exit_code=self._exit_code)
        return self._exit_code

    async def _watch_signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup has it ignored
            numbers.append(signal.SIGHUP)
        with trio.open_signal_receiver(*numbers) as signals:
            task_status.started()
            async for number in signals:
                name = signal.Signals(number).name
                if not self.stopping.is_set():
                    log.info("stopping", signal=name, grace_seconds=self.settings.grace_seconds)
                    self.stopping.set()
                else:
                    log.warning("exiting now", signal=name)
                    self._exit_code = 128 + number
                    self.hurry.set()
                    self._everything.cancel()

    async def report_status(self) -> None:
        """A line every minute: who works, how often one was replaced, what was done."""
        started_at = reported_at = trio.current_time()
        before = [slot.counters for slot in self.slots]
        while True:
            await trio.sleep(STATUS_SECONDS)
            now, counters = trio.current_time(), [slot.counters for slot in self.slots]
            grown = Counters.sum(counters).minus(Counters.sum(before))
            seconds = now - reported_at
            log.info(
                "status",
                active_workers=sum(slot.ready for slot in self.slots),
                wanted_workers=len(self.slots),
                restarts=sum(slot.restarts for slot in self.slots),
                uptime_seconds=round(now - started_at),
                requests_per_second=round(grown.requests / seconds, 1),
                pushed_per_second=round(grown.pushed / seconds, 1),
                popped_per_second=round(grown.popped / seconds, 1),
                acked_per_second=round(grown.acked / seconds, 1),
            )
            reported_at, before = now, counters

    def note_ready(self) -> None:
        """A worker became ready: with the last of them, tell where the server listens."""
        if not self._announced and all(slot.ready for slot in self.slots):
            self._announced = True
            workers = f"{len(self.slots)} worker{'s' if len(self.slots) > 1 else ''}"
            details = f"{workers}, {self.database.where}, pid {os.getpid()}"
            self._announce(f"queen-trio {__version__} listening on {self._url} ({details})")

    def note_hopeless(self) -> None:
        """A slot cannot bring a worker up. If none can and no worker ever served, it is no use going on.

        Raises:
            StartupError: with what a worker said.
        """
        if all(slot.hopeless and not slot.ever_ready for slot in self.slots):
            raise StartupError(self.slots[0].hopeless)


class Counters(msgspec.Struct, frozen=True):
    """What the workers of one slot have done, over restarts."""

    requests: int = 0
    pushed: int = 0
    popped: int = 0
    acked: int = 0

    def plus(self, beat: Heartbeat, before: Heartbeat) -> Counters:
        """With what one worker did between two of its heartbeats."""
        return Counters(
            self.requests + beat.requests - before.requests,
            self.pushed + beat.pushed - before.pushed,
            self.popped + beat.popped - before.popped,
            self.acked + beat.acked - before.acked,
        )

    def minus(self, other: Counters) -> Counters:
        return Counters(
            self.requests - other.requests,
            self.pushed - other.pushed,
            self.popped - other.popped,
            self.acked - other.acked,
        )

    @staticmethod
    def sum(several: Sequence[Counters]) -> Counters:
        return Counters(
            sum(each.requests for each in several),
            sum(each.pushed for each in several),
            sum(each.popped for each in several),
            sum(each.acked for each in several),
        )


class Slot:
    """A place for one worker: a listening socket for good, and one process after another.

    booting ──ready──▶ serving ──drain──▶ gone
       ▲  │                │
       │  └───────┬────────┘ died
       └─backoff──┘
    """

    def __init__(self, supervisor: Supervisor, index: int, listener: socket.socket) -> None:
        self.listener = listener
        self.ready = False
        self.ever_ready = False
        self.hopeless = ""  # why no worker comes up here
        self.restarts = 0
        self.counters = Counters()
        self.heartbeat = NO_HEARTBEAT
        self._index = index
        self._supervisor = supervisor
        self._backoff = Backoff()
        self._ready_at = 0.0
        self._failure = ""  # what the present worker said of why it cannot start
        self._boot_crashes = 0

    async def run(self) -> None:
        """Keep a worker running until the server stops.

        Raises:
            StartupError: no slot can bring up a worker and none ever did.
        """
        stopping = self._supervisor.stopping
        while not stopping.is_set():
            how = await self._run_worker()
            if stopping.is_set():
                return
            served_seconds = trio.current_time() - self._ready_at if self._ready_at else 0.0
            wait_seconds = self._backoff.after_death(served_seconds)
            log.error("worker died", slot=self._index, how=how, served_seconds=round(served_seconds, 1))
            if self.hopeless:
                self._supervisor.note_hopeless()
            self.restarts += 1
            with trio.move_on_after(wait_seconds):
                await stopping.wait()

    async def _run_worker(self) -> str:
        """One worker, from its start to its end. Returns how it ended."""
        self._ready_at, self._failure, self.heartbeat = 0.0, "", NO_HEARTBEAT
        ours, theirs = socket.socketpair()
        async with ControlChannel(ours) as channel, trio.open_nursery() as child:
            with theirs:
                try:
                    process: trio.Process = await child.start(self._spawn(theirs.fileno()))
                except OSError as error:
                    return f"could not be started: {error}"
            child.start_soon(self._relay_output, process)
            async with trio.open_nursery() as talk:
                talk.start_soon(self._start_when_database_is_up, channel)
                talk.start_soon(self._drain_when_stopping, channel, child.cancel_scope)
                while (message := await channel.receive()) is not None:
                    self.hear(message)
                talk.cancel_scope.cancel()
            # Its end of the channel is closed, and that is the last thing a worker does.
            self.ready = False
            with trio.move_on_after(KILL_MARGIN_SECONDS):
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
            child.cancel_scope.deadline = trio.current_time() + LAST_WORDS_SECONDS
        self.ready = False
        return self._judge(process.returncode)

    def _spawn(self, control_fd: int) -> Callable[..., Awaitable[object]]:
        listen_fd = self.listener.fileno()
        # The worker runs the code that we run: our module path, and not the working directory before it, where
        # another package named queen may lie.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        return partial(
            trio.run_process,
            [
                *(sys.executable, "-P", "-m", "queen.worker"),
                *("--control-fd", str(control_fd), "--listen-fd", str(listen_fd), "--app", self._supervisor.app),
            ],
            pass_fds=(control_fd, listen_fd),
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            deliver_cancel=kill,
            start_new_session=True,  # Ctrl-C in a terminal is for us to hear
        )

    async def _start_when_database_is_up(self, channel: ControlChannel) -> None:
        database = self._supervisor.database
        await database.ready.wait()
        settings = msgspec.structs.replace(self._supervisor.settings, database_url=Secret(database.url))
        with contextlib.suppress(trio.BrokenResourceError):  # it died: whoever reads the channel sees its end
            await channel.send(Start(slot=self._index, settings=msgspec.Raw(encode_settings(settings))))

    async def _drain_when_stopping(self, channel: ControlChannel, child: trio.CancelScope) -> None:
        await self._supervisor.stopping.wait()
        child.deadline = trio.current_time() + self._supervisor.settings.grace_seconds + KILL_MARGIN_SECONDS
        with contextlib.suppress(trio.BrokenResourceError):
            await channel.send(Drain())

    async def _relay_output(self, process: trio.Process) -> None:
        assert process.stdout is not None
        async for line in lines(process.stdout):
            logs.relay(line, self._supervisor.settings.log_format, child=f"worker {self._index}", pid=process.pid)

    def hear(self, message: Message) -> None:
        """What the present worker says."""
        match message:
            case Ready():
                self.ready = self.ever_ready = True
                self.hopeless, self._boot_crashes = "", 0
                self._ready_at = trio.current_time()
                log.info("worker ready", slot=self._index)
                self._supervisor.note_ready()
            case Heartbeat():
                self.counters = self.counters.plus(message, self.heartbeat)
                self.heartbeat = message
            case Failed(error=error):
                self._failure = error
            case Start() | Drain():
                raise AssertionError("a worker does not command its supervisor")

    def _judge(self, returncode: int | None) -> str:
        how = describe_exit(returncode)
        if not self._ready_at:
            self._boot_crashes += 1
            if returncode == NEVER_SERVED and self._failure:
                self.hopeless = how = self._failure
            elif self._boot_crashes >= BOOT_CRASHES:
                self.hopeless = f"workers die before they are ready: the last {how}; what it wrote is in the log above"
        return how


def choose_database(settings: Settings, hurry: trio.Event) -> Embedded | Foreign:
    """The PostgreSQL that the settings name, or the one that comes along. Run it; it is up when ``ready`` is set."""
    if settings.database_url is not None:
        return Foreign(settings.database_url.reveal())
    return Embedded(settings.data_dir, hurry)


class Foreign:
    """A PostgreSQL of the user's own: nothing to run. Whether it can be reached, the workers find out."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.ready = trio.Event()
        parts = urlsplit(url)
        host = parts.hostname or parse_qs(parts.query).get("host", ["localhost"])[0]
        self.where = f"database {unquote(parts.path.lstrip('/')) or 'postgres'} on {unquote(host)}"

    async def run(self) -> None:
        self.ready.set()


class Embedded:
    """The PostgreSQL that comes along, as a child: restarted when it dies, while the workers stay."""

    def __init__(self, home: Path | None, hurry: trio.Event) -> None:
        self.url = ""
        self.ready = trio.Event()  # once up, even if it goes down later
        self._home = (home or embedded.default_home()).absolute()
        self.where = f"data in {self._home}"
        self._hurry = hurry
        self._up_at = 0.0
        self._last_error = ""
        self._last_words: deque[str] = deque(maxlen=3)

    async def run(self) -> None:
        """Keep it running until cancelled, which stops it; fast if ``hurry`` is set.

        Raises:
            StartupError: it cannot be started.
        """
        backoff = Backoff()
        failed_starts = 0
        async with embedded.open_cluster(self._home) as cluster:
            self.url = cluster.url
            while True:
                how = await self._run_server(cluster)
                if not self.ready.is_set():
                    # Once is no proof: backends of a server killed a moment ago may hold its memory for another.
                    failed_starts += 1
                    if failed_starts == BOOT_CRASHES:
                        why = self._last_error or " ".join(self._last_words) or how
                        raise StartupError(f"PostgreSQL cannot be started in {cluster.data}: {why}")
                served_seconds = trio.current_time() - self._up_at if self._up_at else 0.0
                wait_seconds = backoff.after_death(served_seconds)
                log.error("PostgreSQL died", how=how, served_seconds=round(served_seconds, 1))
                await trio.sleep(wait_seconds)

    async def _run_server(self, cluster: embedded.Cluster) -> str:
        self._up_at, self._last_error = 0.0, ""
        self._last_words.clear()
        async with trio.open_nursery() as child:
            try:
                process: trio.Process = await child.start(
                    partial(
                        trio.run_process,
                        cluster.command(),
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        check=False,
                        deliver_cancel=partial(embedded.stop_server, hurry=self._hurry),
                        **cluster.popen_options(),
                    )
                )
            except OSError as error:
                return f"could not be started: {error}"
            child.start_soon(self._read_log, process)
            await process.wait()
            child.cancel_scope.deadline = trio.current_time() + LAST_WORDS_SECONDS
        return describe_exit(process.returncode)

    async def _read_log(self, process: trio.Process) -> None:
        assert process.stdout is not None
        async for line in lines(process.stdout):
            text = line.decode(errors="replace")
            level = embedded.severity(line)
            self._last_words.append(text)
            if level == "error":
                self._last_error = text
            elif embedded.READY_LINE in line:
                self._up_at = trio.current_time()
                self.ready.set()
            getattr(log, level)("postgres", pid=process.pid, line=text)


async def kill(process: trio.Process) -> None:
    """For ``deliver_cancel``: a worker whose time is up gets no more of it."""
    process.kill()


async def lines(stream: trio.abc.ReceiveStream) -> AsyncIterator[bytes]:
    """The lines of a child's output, without their ends, until it closes. A line without end is cut."""
    buffer = bytearray()
    async for chunk in stream:
        buffer += chunk
        *whole, rest = bytes(buffer).split(b"\n")
        buffer = bytearray(rest)
        for line in whole:
            yield line
        if len(buffer) > MAX_OUTPUT_LINE_BYTES:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)


def describe_exit(returncode: int | None) -> str:
    """How a process ended, for people."""
    if returncode is None:
        return "has not ended"
    if returncode >= 0:
        return f"exited with code {returncode}"
    name = signal.Signals(-returncode).name
    return f"was killed by {name}{' (perhaps for lack of memory)' if name == 'SIGKILL' else ''}"


def http_url(address: tuple[Any, ...]) -> str:
    """The URL of a listening socket's address."""
    host, port = address[0], address[1]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


NO_HEARTBEAT: Final = Heartbeat(loop_lag_ms=0.0, rss_bytes=0)
