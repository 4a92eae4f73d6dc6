"""A server that goes on under new code: what the supervisor leaves to itself when it executes its program anew.

The process stays the same, and with it its id, its children, and whatever files are left open. So nobody who talks to
the server notices: sockets go on listening, workers serving, PostgreSQL running. What has to be said is which is which.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Final, NoReturn, Protocol

import msgspec
import trio

from queen.control import Heartbeat
from queen.errors import StartupError

VARIABLE: Final = "QUEEN_HANDOVER"  # the descriptor of a file that holds a Handover, or TRIAL
TRIAL: Final = "trial"  # the Handover is on standard input: read it, and serve nothing
FORM: Final = 1  # of what is left; another form is refused, before anything has happened

HELD_SIGNALS: Final = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
    *(signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR2),
)
"""They wait while there is nobody to hear them: their default would be to end the process."""


class LeftWorker(msgspec.Struct, frozen=True):
    """A worker that serves."""

    pid: int
    control: int  # descriptors
    output: int
    received: bytes  # what has come over the control channel and was not yet a whole message
    generation: int
    serving_seconds: float
    heartbeat: Heartbeat


class LeftSlot(msgspec.Struct, frozen=True):
    """A slot. One without a worker gets a new one."""

    listener: int | None
    worker: LeftWorker | None
    restarts: int
    last_exit: str
    done: dict[str, int]


class LeftServer(msgspec.Struct, frozen=True):
    """PostgreSQL, if it is ours."""

    pid: int
    output: int
    lock: int  # that holds the data directory
    socket_directory: str
    generation: int


class Handover(msgspec.Struct, frozen=True):
    """The whole server."""

    form: int
    port: int  # the descriptor that holds it
    passed: bool  # it was passed by the service manager, and listens itself
    pool: tuple[int, int, int]  # of connections: the descriptors of its board and queue
    slots: tuple[LeftSlot, ...]
    server: LeftServer | None
    generation: int
    uptime_seconds: float

    def descriptors(self) -> list[int]:
        """All that are left open."""
        found = [self.port, *self.pool]
        for slot in self.slots:
            found += [slot.listener] if slot.listener is not None else []
            found += [slot.worker.control, slot.worker.output] if slot.worker is not None else []
        return found + ([self.server.output, self.server.lock] if self.server is not None else [])


def take_handover(environ: MutableMapping[str, str]) -> Handover | None:
    """What this process has left to itself; None: it has only just been started.

    Raises:
        StartupError: it cannot be read.
    """
    said = environ.pop(VARIABLE, "")
    if not said or said == TRIAL:
        return None
    with open(int(said), "rb") as file:
        left = decode(file.read())
    for descriptor in left.descriptors():
        os.set_inheritable(descriptor, False)
    return left


def is_trial(environ: MutableMapping[str, str]) -> bool:
    """Whether this process is only to show that it can read what would be left to it.

    Raises:
        StartupError: it cannot.
    """
    if environ.get(VARIABLE) != TRIAL:
        return False
    decode(sys.stdin.buffer.read())
    return True


def encode(left: Handover) -> bytes:
    return msgspec.json.encode(left)


def decode(text: bytes) -> Handover:
    """Raises StartupError when it is of another form."""
    try:
        left = msgspec.json.decode(text, type=Handover)
    except msgspec.MsgspecError as error:
        raise StartupError(f"what the server before has left cannot be read: {error}") from error
    if left.form != FORM:
        raise StartupError(f"what the server before has left is of form {left.form} and this version reads {FORM}")
    return left


def program() -> list[str]:
    """The command that started this process."""
    return [sys.executable, *sys.orig_argv[1:]]


async def try_program(left: Handover, environment: dict[str, str]) -> str:
    """Whether the program that is there now would come up and take over. Returns what it said if not."""
    try:
        tried = await trio.run_process(
            program(),
            env=environment | {VARIABLE: TRIAL},
            stdin=encode(left),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    except (OSError, RuntimeError) as error:  # no descriptor, no process, or no thread to start one from
        return f"could not be started: {error}"
    if tried.returncode == 0:
        return ""
    said = (tried.stderr or b"").decode(errors="replace").strip().splitlines()
    return said[-1] if said else f"exited with code {tried.returncode}"


def execute_anew(left: Handover, environment: dict[str, str]) -> NoReturn:
    """Execute the program that is there now, in place of the one that runs.

    Raises:
        OSError: it cannot be executed; nothing has changed.
    """
    file = os.memfd_create("handover", 0)
    os.write(file, encode(left))
    os.lseek(file, 0, os.SEEK_SET)
    kept = [*left.descriptors(), file]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
    try:
        for descriptor in kept:
            os.set_inheritable(descriptor, True)
        os.execve(sys.executable, program(), environment | {VARIABLE: str(file)})
    finally:
        for descriptor in kept:
            os.set_inheritable(descriptor, False)
        os.close(file)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def hear_signals_again() -> None:
    """Let those come that waited for somebody to hear them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)


class ChildProcess(Protocol):
    """What trio.Process and LeftProcess have in common, as far as it is used."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    @property
    def stdout(self) -> trio.abc.ReceiveStream | None: ...
    async def wait(self) -> int: ...
    def send_signal(self, number: signal.Signals | int, /) -> None: ...
    def kill(self) -> None: ...


class LeftProcess:
    """A child of this process that was started by the code before."""

    def __init__(self, pid: int, output: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdout: trio.abc.ReceiveStream | None = trio.lowlevel.FdStream(output)
        self._handle = os.pidfd_open(pid)  # also of one that has ended: nobody else waits for it
        self._waiting = trio.Lock()

    async def wait(self) -> int:
        """Its exit code as in subprocess, once it has ended."""
        async with self._waiting:
            if self.returncode is None:
                await trio.lowlevel.wait_readable(self._handle)
                ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG)  # noqa: ASYNC222  it has ended
                assert ended is not None
                self.returncode = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
                os.close(self._handle)
        return self.returncode

    def send_signal(self, number: signal.Signals | int, /) -> None:
        if self.returncode is None:
            signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    async def run(self, deliver_cancel: Callable[[ChildProcess], Awaitable[object]]) -> None:
        """What trio.run_process does once a process runs: wait for it, and when cancelled have it ended."""
        try:
            await self.wait()
        except trio.Cancelled:
            with trio.CancelScope(shield=True):  # as long as deliver_cancel makes it
                async with trio.open_nursery() as ending:
                    ending.start_soon(deliver_cancel, self)
                    await self.wait()
                    ending.cancel_scope.cancel()
            raise
