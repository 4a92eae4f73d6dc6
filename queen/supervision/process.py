"""One worker process, from its start to its end: how it is spawned, told what to do, heard, and put down.

Which slot it serves and what follows from its death is slot.py's.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Final, Protocol

import msgspec
import structlog
import trio

from queen.balance import Pool
from queen.config.settings import Secret, Settings
from queen.config.sources import encode_settings
from queen.control import (
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
)
from queen.model.snapshot import Snapshot
from queen.model.tree import Branch
from queen.observability import logs
from queen.supervision.children import LAST_WORDS_SECONDS, NEVER_SERVED, kill, lines, start_process
from queen.supervision.database import Embedded, Foreign
from queen.supervision.exits import count_oom_kills, explain_exit
from queen.supervision.handover import ChildProcess, LeftProcess, LeftWorker
from queen.supervision.nursery import Life

log = structlog.get_logger(__name__)

KILL_MARGIN_SECONDS: Final = 2.0  # past the grace: a send to a stuck client may outlast any polite deadline
DUMP_SECONDS: Final = 1.0  # for a worker that hangs to write what it is doing
DUMP_STACKS: Final = signal.SIGUSR1  # heard without the interpreter: also while C code does not come back
DUMP_TASKS: Final = signal.SIGUSR2  # heard by a thread of its own
NO_HEARTBEAT: Final = Heartbeat()


class Surroundings(Protocol):
    """What workers and slots know of the supervisor around them."""

    settings: Settings
    app: str
    database: Embedded | Foreign
    pool: Pool | None  # None: before it runs

    def next_generation(self) -> int: ...
    def note_ready(self) -> None: ...
    def snapshot(self) -> Snapshot: ...
    def note_boot_failure(self) -> None: ...


class WorkerProcess(Life):
    """A worker: a child process with a control channel to it.

    It boots without a socket, ``gently`` if nobody waits for it, and is ready for a slot when its application is open;
    a slot gives it the socket, and then it is ready when it serves.
    """

    def __init__(self, around: Surroundings, left: LeftWorker | None = None, *, gently: bool = False) -> None:
        super().__init__()
        self.generation = around.next_generation() if left is None else left.generation
        self.lot = random.random()  # see Limits
        self.slot: int | None = None
        self.process: ChildProcess | None = None
        self.others = False  # go on when it drains: no hurry
        self.replaced = False  # and one of them serves its socket
        self.heartbeat = NO_HEARTBEAT
        self.heard_heartbeat: Callable[[Heartbeat, Heartbeat], None] = lambda _before, _now: None
        self.serves: Callable[[], None] = lambda: None  # called when it is ready
        self.returncode: int | None = None
        self.failure = ""  # what it said of why it cannot start
        self._around = around
        self._gently = gently
        self._left = left
        self._channel: ControlChannel | None = None
        self._listen: Callable[[], socket.socket] | None = None
        self._has_slot = trio.Event()
        self._prepared = trio.Event()
        self._asked = 0  # how often it was asked what it is doing
        self._described = trio.Event()  # set, and another made, when it has said so
        self._description = Description(number=0)

    @property
    def pid(self) -> int | None:
        return None if self.process is None else self.process.pid

    def assign(self, slot: int, listen: Callable[[], socket.socket]) -> None:
        """Give it a slot. ``listen`` is its listening socket, of which the worker gets a descriptor of its own."""
        self.slot, self._listen = slot, listen
        self.ready, self.ready_at = trio.Event(), None
        self._has_slot.set()

    def take_over(self, slot: int) -> None:
        """It serves that slot already: it was left by the supervisor before."""
        assert self._left is not None
        self.slot = slot
        self.heartbeat = self._left.heartbeat
        self._has_slot.set()
        self.note_ready()
        now = trio.current_time()
        self.begun_at = self.ready_at = now - self._left.serving_seconds

    def leave(self) -> LeftWorker | None:
        """What a successor of this supervisor has to know of it; None: it does not serve."""
        process, channel = self.process, self._channel
        if not self.ready.is_set() or self.draining.is_set() or process is None or channel is None:
            return None
        assert isinstance(process.stdout, trio.lowlevel.FdStream)
        return LeftWorker(
            pid=process.pid,
            control=channel.fileno(),
            output=process.stdout.fileno(),
            received=channel.received,
            generation=self.generation,
            serving_seconds=self.served_seconds(),
            heartbeat=self.heartbeat,
        )

    async def live(self) -> str:
        oom_kills = count_oom_kills()
        async with trio.open_nursery() as child:
            try:
                channel, process = await (self._start(child) if self._left is None else self._resume(child, self._left))
            except OSError as error:
                return f"could not be started: {error}"
            self._channel, self.process = channel, process
            child.start_soon(self._relay_output, process)
            async with channel, trio.open_nursery() as talk:
                if self._left is None:
                    talk.start_soon(self._give_orders, channel)
                talk.start_soon(self._drain_when_told, channel)
                while (message := await channel.receive()) is not None:
                    if isinstance(message, AskSnapshot):
                        talk.start_soon(self._tell_snapshot, channel, message.number)
                    self._hear(message)
                talk.cancel_scope.cancel()
            # Its end of the channel is closed, and that is the last thing a worker does.
            self._channel = None
            with trio.move_on_after(KILL_MARGIN_SECONDS):
                await process.wait()
            late = process.returncode is None
            if late:
                process.kill()
                await process.wait()
            self.returncode = process.returncode
            child.cancel_scope.deadline = trio.current_time() + LAST_WORDS_SECONDS
        if self.returncode == NEVER_SERVED and self.failure:
            return self.failure
        return explain_exit(
            self.returncode,
            rss_bytes=self.heartbeat.rss_bytes,
            killed_by_us=late,
            oom_kills=count_oom_kills() - oom_kills,
        )

    async def _start(self, child: trio.Nursery) -> tuple[ControlChannel, ChildProcess]:
        """A new process. Raises OSError when there is none to be had."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await start_process(child, self._command(theirs.fileno()), **self._options(theirs.fileno()))
            except BaseException:
                ours.close()
                raise
        return ControlChannel(ours), process

    async def _resume(self, child: trio.Nursery, left: LeftWorker) -> tuple[ControlChannel, ChildProcess]:
        """The process that was left to us."""
        process = LeftProcess(left.pid, left.output)
        child.start_soon(process.run, kill)
        return ControlChannel(socket.socket(fileno=left.control), left.received), process

    def _command(self, control_fd: int) -> list[str]:
        return [
            *(sys.executable, "-P", "-m", "queen.worker"),
            *("--control-fd", str(control_fd), "--app", self._around.app),
            *(("--gently",) if self._gently else ()),
        ]

    def _options(self, control_fd: int) -> dict[str, object]:
        # The worker runs the code that we run: our module path, and not the working directory before it, where
        # another package named queen may lie.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        return {
            "pass_fds": (control_fd,),
            "env": os.environ | {"PYTHONPATH": path},
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "check": False,
            "deliver_cancel": kill,
            "start_new_session": True,  # Ctrl-C in a terminal is for us to hear
        }

    async def _give_orders(self, channel: ControlChannel) -> None:
        database = self._around.database
        await database.ready.wait()
        settings = msgspec.structs.replace(
            self._around.settings,
            database_url=Secret(database.url),
            spool_dir=self._around.settings.spool_dir or database.spool_dir,
        )
        with contextlib.suppress(trio.BrokenResourceError):  # it died: whoever reads the channel sees its end
            await channel.send(Start(settings=msgspec.Raw(encode_settings(settings))))
            await self._has_slot.wait()
            await self._prepared.wait()  # a socket that nobody accepts from keeps connections waiting
            assert self.slot is not None
            assert self._listen is not None
            try:
                descriptor = self._listen().fileno()
            except OSError as error:
                self.condemn(f"could not be given a socket: {error}")
                return
            pool = self._around.pool
            await channel.send(
                Serve(slot=self.slot, generation=self.generation, balanced=pool is not None),
                *(descriptor, *(() if pool is None else pool.descriptors)),
            )

    async def _drain_when_told(self, channel: ControlChannel) -> None:
        await self.draining.wait()
        with contextlib.suppress(trio.BrokenResourceError):
            await channel.send(Drain(others=self.others, replaced=self.replaced))

    async def reload_certificate(self) -> None:
        """Have the worker read it again. One that starts, or starts anew, reads it anyway."""
        if self.ready.is_set() and self._channel is not None:
            with contextlib.suppress(trio.BrokenResourceError):
                await self._channel.send(ReloadCertificate())

    async def describe(self) -> tuple[Branch, ...] | None:
        """What it is doing, by its own word; None when it is not there to say. One that hangs takes for ever."""
        channel = self._channel
        if channel is None:
            return None
        self._asked += 1
        number = self._asked
        try:
            await channel.send(Describe(number))
        except trio.BrokenResourceError:
            return None
        while self._description.number < number and not self.ended.is_set():
            await self._described.wait()
        return self._description.branches

    async def _tell_snapshot(self, channel: ControlChannel, number: int) -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # it died: whoever reads the channel sees its end
            await channel.send(TellSnapshot(number, self._around.snapshot()))

    async def put_down(self, why: str) -> None:
        """End a worker whose loop does not turn, after it has written what it is doing."""
        self.condemned = why
        if self.process is None or self.process.returncode is not None:
            return
        self.process.send_signal(DUMP_STACKS)
        self.process.send_signal(DUMP_TASKS)
        with trio.move_on_after(DUMP_SECONDS):
            await self.ended.wait()
        if self.process.returncode is None:
            self.process.kill()

    async def _relay_output(self, process: ChildProcess) -> None:
        assert process.stdout is not None
        async for line in lines(process.stdout):
            child = "spare worker" if self.slot is None else f"worker {self.slot}"
            logs.relay(
                line,
                self._around.settings.log_format,
                child=child,
                pid=process.pid,
                slot=self.slot,
                generation=self.generation,
            )
        await process.stdout.aclose()  # nothing else closes it before the collector of garbage does

    def _hear(self, message: Message) -> None:
        self.note_sign_of_life()
        match message:
            case Prepared():
                self._prepared.set()
                if self.slot is None:
                    self.note_ready()
                    self.serves()
            case Ready():
                self.note_ready()
                self.serves()
            case Heartbeat():
                before, self.heartbeat = self.heartbeat, message
                self.heard_heartbeat(before, message)
            case Failed(error=error):
                self.failure = error
            case Description():
                self._description = message
                self._described.set()
                self._described = trio.Event()
            case AskSnapshot():
                pass  # answered by a task
            case Start() | Serve() | Drain() | ReloadCertificate() | Describe() | TellSnapshot():
                raise AssertionError("a worker does not command its supervisor")
