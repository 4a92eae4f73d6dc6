"""The control socket: what an operator on this machine asks a running server and tells it to do.

A unix socket that its owner alone may open; one JSON object a line, a command in and a reply out. What a command does
is the supervisor's; how it is shown is queen/cli's. Every size and every wait has a bound: a client that says nothing,
or reads nothing, costs a descriptor for a minute.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

import msgspec
import platformdirs
import structlog
import trio

from queen.config.settings import Settings
from queen.errors import StartupError
from queen.model.snapshot import Snapshot
from queen.model.tree import Branch
from queen.storage import embedded

log = structlog.get_logger(__name__)

NAME: Final = "control.sock"
MAX_CLIENTS: Final = 16  # people and probes of one machine
MAX_COMMAND_BYTES: Final = 4096
MAX_REPLY_BYTES: Final = 16 * 1024 * 1024  # a tree of 1024 workers
IDLE_SECONDS: Final = 60.0
ANSWER_SECONDS: Final = 10.0
_PROBE_SECONDS: Final = 1.0


class Status(msgspec.Struct, frozen=True, tag="status", tag_field="do"):
    """How is the server? Answered with a Snapshot."""


class Tree(msgspec.Struct, frozen=True, tag="tree", tag_field="do"):
    """What is it doing? Answered with a Branch."""


class SetWorkers(msgspec.Struct, frozen=True, tag="workers", tag_field="do", forbid_unknown_fields=True):
    """Run that many workers from now on. Answered with a Snapshot, as soon as it is begun."""

    count: int


class Reload(msgspec.Struct, frozen=True, tag="reload", tag_field="do"):
    """Replace the workers one by one. Answered with a Snapshot, as soon as it is begun."""


class Upgrade(msgspec.Struct, frozen=True, tag="upgrade", tag_field="do"):
    """Go on under the program that is there now. Answered with a Snapshot, as soon as it is begun; the connection ends
    when the program is executed."""


class Stop(msgspec.Struct, frozen=True, tag="stop", tag_field="do"):
    """Drain and exit. Answered with a Snapshot, as soon as it is begun; the end of the connection says it is done."""


Command = Status | Tree | SetWorkers | Reload | Upgrade | Stop


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """``error``: a sentence, and nothing was done."""

    result: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""


_decode_command = msgspec.json.Decoder(Command).decode


class Refused(Exception):
    """The command cannot be obeyed; the text says why."""


class ControlSocketTaken(StartupError):
    """Another server answers where ours was to be: it may be the same one, started twice."""


class Controlled(Protocol):
    """The server as its control socket sees it. What takes long is begun and goes on by itself."""

    def snapshot(self) -> Snapshot: ...

    async def tree(self) -> Branch: ...

    def set_workers(self, count: int) -> None:
        """Raises Refused when there is no such number of workers."""

    def reload(self) -> None:
        """Raises Refused when it cannot be begun."""

    def upgrade(self) -> None:
        """Does nothing where it cannot be begun; the log says why."""

    def stop(self) -> None: ...


class ControlSocket:
    """A bound and listening control socket, until ``close``."""

    def __init__(self, path: Path, *, replace: bool = False) -> None:
        """Take the path. A socket that nobody answers on any more is replaced; one that another server answers on is
        not, unless ``replace`` says that this process succeeds it. May block for a moment.

        Raises:
            ControlSocketTaken: another server answers there.
            StartupError: the path cannot be used.
        """
        self.path = path
        try:
            with reach(path) as address:
                if path.exists() and not path.is_socket():
                    raise StartupError(f"{path} is no socket: give another path with --control-socket")
                if not replace and _answers(address):
                    raise ControlSocketTaken(
                        f"another server answers on the control socket {path}: stop it, or give another path with "
                        "--control-socket"
                    )
                self._socket = _bind(path, address)
            self._file = _identity(path)
        except OSError as error:
            raise StartupError(f"the control socket {path} cannot be made: {error.strerror or error}") from error

    async def run(self, server: Controlled, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer until cancelled."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._socket))
        async with trio.open_nursery() as clients, listener:
            task_status.started()

            async def serve(stream: trio.SocketStream) -> None:
                async with stream:
                    if len(clients.child_tasks) <= MAX_CLIENTS:
                        await _Client(stream, server).run()

            await trio.serve_listeners(serve, [listener], handler_nursery=clients)

    def close(self) -> None:
        """Let go, and remove the file unless a successor has put its own there. Safe to repeat."""
        self._socket.close()
        with contextlib.suppress(OSError):
            if _identity(self.path) == self._file:
                self.path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Client:
    """One connection to the control socket."""

    def __init__(self, stream: trio.SocketStream, server: Controlled) -> None:
        self._stream = stream
        self._server = server
        self._received = bytearray()

    async def run(self) -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # it hung up
            while True:
                with trio.move_on_after(IDLE_SECONDS) as idle:
                    line = await self._receive()
                if idle.cancelled_caught or line is None:
                    return
                with trio.move_on_after(ANSWER_SECONDS) as answering:
                    await self._stream.send_all(msgspec.json.encode(await self._obey(line)) + b"\n")
                if answering.cancelled_caught:
                    log.warning("control client cut off", seconds=ANSWER_SECONDS)
                    return

    async def _receive(self) -> bytes | None:
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > MAX_COMMAND_BYTES:
                return None
            received = await self._stream.receive_some(MAX_COMMAND_BYTES)
            if not received:
                return None
            self._received += received
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    async def _obey(self, line: bytes) -> Reply:
        try:
            command = _decode_command(line)
        except msgspec.DecodeError as error:
            return Reply(error=f"not a command: {error}")
        server = self._server
        if not isinstance(command, Status | Tree):
            log.info("told over the control socket", **msgspec.to_builtins(command))
        try:
            match command:
                case Tree():
                    return Reply(msgspec.Raw(msgspec.json.encode(await server.tree())))
                case SetWorkers(count):
                    server.set_workers(count)
                case Reload():
                    server.reload()
                case Upgrade():
                    server.upgrade()
                case Stop():
                    server.stop()
        except Refused as refused:
            return Reply(error=str(refused))
        return Reply(msgspec.Raw(msgspec.json.encode(server.snapshot())))


def control_path(settings: Settings, port: int | None = None) -> Path:
    """Where the control socket of such a server lies: where it was said to, else in the data directory of the embedded
    PostgreSQL, else in the runtime directory, named for the port.

    Args:
        port: that is listened on, where the settings left it open.
    """
    if settings.control_socket is not None:
        return settings.control_socket.absolute()
    if settings.database_url is None:
        return (settings.data_dir or embedded.default_home()).absolute() / NAME
    return runtime_directory() / f"control-{port or settings.port}.sock"


def runtime_directory() -> Path:
    """Where sockets of this user's servers lie: what the service manager says, else /run as root, else the user's."""
    if said := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(said.partition(":")[0])
    if os.geteuid() == 0:
        return Path("/run/queen-trio")
    return Path(platformdirs.user_runtime_dir("queen-trio", appauthor=False))


def make_runtime_directory(directory: Path) -> None:
    """Make it if it is missing, for nobody else to enter.

    Raises:
        StartupError: it cannot be made, or it is somebody else's.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except OSError as error:
        raise StartupError(
            f"the directory {directory} of the control socket cannot be made ({error.strerror}): give a path with "
            "--control-socket"
        ) from error
    if found.st_uid not in (os.geteuid(), 0) or (found.st_mode & stat.S_IWOTH):
        raise StartupError(
            f"others may write in the directory {directory} of the control socket: give a path with --control-socket"
        )


@contextlib.contextmanager
def reach(path: Path) -> Iterator[str]:
    """An address by which that socket can be bound or connected to for the length of this block, however long its path.

    What sun_path holds is 107 bytes; the descriptor of the directory stands for the directory.

    Raises:
        OSError: there is no such directory.
    """
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _answers(address: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except (TimeoutError, BlockingIOError):  # its backlog is full: somebody is there
            return True
        return True


def _bind(path: Path, address: str) -> socket.socket:
    """Bind under another name, close it to others, and put it into its place: it is never there half made."""
    bound = socket.socket(socket.AF_UNIX)
    half = f"{address}.{os.getpid()}.new"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(half)
        bound.bind(half)
        os.chmod(half, 0o600)
        bound.listen(MAX_CLIENTS)
        os.rename(half, address)
    except BaseException:
        bound.close()
        with contextlib.suppress(OSError):
            os.unlink(half)
        raise
    return bound


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino
