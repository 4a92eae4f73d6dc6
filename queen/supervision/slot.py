"""One place for a worker: its socket, its process, and what to do when that ends."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, Protocol

import msgspec
import structlog
import trio

from queen.config.settings import Secret, Settings
from queen.config.sources import encode_settings
from queen.control import ControlChannel, Drain, Failed, Heartbeat, Message, Ready, ReloadCertificate, Start
from queen.observability import logs
from queen.supervision.children import (
    BOOT_CRASHES,
    LAST_WORDS_SECONDS,
    NEVER_SERVED,
    Backoff,
    describe_exit,
    kill,
    lines,
)
from queen.supervision.database import Embedded, Foreign
from queen.supervision.listeners import Port

log = structlog.get_logger(__name__)

KILL_MARGIN_SECONDS: Final = 2.0  # past the grace: a send to a stuck client may outlast any polite deadline
TALLIES: Final = ("requests", "pushed", "popped", "acked")
NO_HEARTBEAT: Final = Heartbeat(loop_lag_ms=0.0, rss_bytes=0)


class Surroundings(Protocol):
    """What a slot knows of the supervisor around it."""

    settings: Settings
    app: str
    stopping: trio.Event
    database: Embedded | Foreign

    def note_ready(self) -> None: ...
    def note_hopeless(self) -> None: ...


class Slot:
    """A place for one worker: a listening socket, and one process after another.

        booting ──ready──▶ serving ──drain──▶ gone
           ▲  │                │
           │  └───────┬────────┘ died
           └─backoff──┘

    The socket outlives a worker that is replaced at once: connections wait in its backlog for the successor instead
    of being refused. Before a wait it is closed, so that the kernel gives connections to the other slots only.
    """

    def __init__(self, supervisor: Surroundings, index: int, port: Port) -> None:
        self.ready = False
        self.ever_ready = False
        self.hopeless = ""  # why no worker comes up here
        self.restarts = 0
        self.done: Counter[str] = Counter()  # what the workers here have done, one after another
        self.heartbeat = NO_HEARTBEAT
        self._supervisor = supervisor
        self._index = index
        self._port = port
        self._listener = port.listen()
        self._channel: ControlChannel | None = None  # to the present worker
        self._backoff = Backoff()
        self._ready_at = 0.0
        self._failure = ""  # what the present worker said of why it cannot start
        self._boot_crashes = 0

    def close_listener(self) -> None:
        """Leave accepting to the worker alone, or to nobody. Safe to repeat."""
        self._listener.close()

    async def run(self) -> None:
        """Keep a worker running until the server stops.

        Raises:
            StartupError: no slot can bring up a worker and none ever did.
        """
        stopping = self._supervisor.stopping
        while not stopping.is_set():
            try:
                how = await self._run_worker()
            except OSError as error:
                how = f"could not be started: {error}"
            if stopping.is_set():
                return
            served_seconds = trio.current_time() - self._ready_at if self._ready_at else 0.0
            wait_seconds = self._backoff.after_death(served_seconds)
            if wait_seconds:
                self.close_listener()
            log.error("worker died", slot=self._index, how=how, served_seconds=round(served_seconds, 1))
            if self.hopeless:
                self._supervisor.note_hopeless()
            self.restarts += 1
            with trio.move_on_after(wait_seconds):
                await stopping.wait()

    async def _run_worker(self) -> str:
        """One worker, from its start to its end. Returns how it ended.

        Raises:
            OSError: it could not be started.
        """
        self._ready_at, self._failure, self.heartbeat = 0.0, "", NO_HEARTBEAT
        if self._listener.fileno() < 0:
            self._listener = self._port.listen()
        ours, theirs = socket.socketpair()
        process: trio.Process | None = None
        async with ControlChannel(ours) as channel, trio.open_nursery() as child:
            with theirs:
                try:
                    process = await child.start(self._spawn(theirs.fileno()))
                except OSError as error:
                    return f"could not be started: {error}"
            child.start_soon(self._relay_output, process)
            self._channel = channel
            async with trio.open_nursery() as talk:
                talk.start_soon(self._start_when_database_is_up, channel)
                talk.start_soon(self._drain_when_stopping, channel, child.cancel_scope)
                while (message := await channel.receive()) is not None:
                    self.hear(message)
                talk.cancel_scope.cancel()
            # Its end of the channel is closed, and that is the last thing a worker does.
            self.ready, self._channel = False, None
            with trio.move_on_after(KILL_MARGIN_SECONDS):
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
            child.cancel_scope.deadline = trio.current_time() + LAST_WORDS_SECONDS
        self.ready = False
        return self._judge(process.returncode)

    def _spawn(self, control_fd: int) -> Callable[..., Awaitable[object]]:
        listen_fd = self._listener.fileno()
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

    async def reload_certificate(self) -> None:
        """Have the worker read it again. One that starts, or starts anew, reads it anyway."""
        if self.ready and self._channel is not None:
            with contextlib.suppress(trio.BrokenResourceError):
                await self._channel.send(ReloadCertificate())

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
                for name in TALLIES:
                    self.done[name] += getattr(message, name) - getattr(self.heartbeat, name)
                self.heartbeat = message
            case Failed(error=error):
                self._failure = error
            case Start() | Drain() | ReloadCertificate():
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
