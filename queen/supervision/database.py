"""PostgreSQL as the supervisor sees it: a child to keep running, or a server of the user's own to name."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
from collections import deque
from functools import partial
from pathlib import Path
from typing import Final

import platformdirs
import structlog
import trio

from queen.config.database_url import locate_database
from queen.config.settings import Settings
from queen.errors import StartupError
from queen.storage import embedded
from queen.supervision.children import BOOT_CRASHES, LAST_WORDS_SECONDS, lines, start_process
from queen.supervision.exits import count_oom_kills, explain_exit
from queen.supervision.handover import ChildProcess, LeftProcess, LeftServer
from queen.supervision.nursery import RestartPolicy, Restarts

log = structlog.get_logger(__name__)

RESTARTS: Final = RestartPolicy(max_restarts=math.inf)
"""Never parked: without PostgreSQL nothing else is worth having, and ten seconds between two tries burden nobody."""


def choose_database(settings: Settings, hurry: trio.Event) -> Embedded | Foreign:
    """The PostgreSQL that the settings name, or the one that comes along. Run it; it is up when ``ready`` is set."""
    if settings.database_url is not None:
        return Foreign(settings.database_url.reveal())
    return Embedded(settings.data_dir, hurry)


def _state_dir() -> Path:
    """Where the spools of other people's databases lie unless said otherwise.

    Raises:
        RuntimeError: the user has neither a HOME nor an entry in passwd.
    """
    if os.geteuid() == 0:
        return Path("/var/lib/queen-trio")
    return Path(platformdirs.user_state_dir("queen-trio", appauthor=False))


def _choose_spool(name: str) -> Path | None:
    """The directory of a spool, if it can be made and written; else None, and a word about it."""
    try:
        directory = _state_dir() / name
    except RuntimeError:
        reason = f"user id {os.geteuid()} has no home directory"
    else:
        existing = directory
        while not os.path.exists(existing):  # Path.exists raises where we may not even look
            existing = existing.parent
        if os.access(existing, os.W_OK | os.X_OK):
            return directory
        reason = f"for {directory}, {existing} cannot be written"
    log.warning(
        "no spool: pushes will be refused while PostgreSQL is away", reason=reason, name_another_with="FILE_BUFFER_DIR"
    )
    return None


def _digest(text: str) -> str:
    """A short name for a database: what is spooled for one must not be drained into another."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Foreign:
    """A PostgreSQL of the user's own: nothing to run. Whether it can be reached, the workers find out."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.prepared = trio.Event()
        self.ready = trio.Event()
        host, port, name = locate_database(url)
        self.where = f"database {name} on {host}"
        self.spool_dir = _choose_spool(f"spool-{_digest(f'{host}:{port}/{name}')}")

    async def run(self) -> None:
        self.prepared.set()
        self.ready.set()


class Embedded:
    """The PostgreSQL that comes along, as a child: restarted when it dies, while the workers stay."""

    def __init__(self, home: Path | None, hurry: trio.Event) -> None:
        self.url = ""
        self.prepared = trio.Event()  # its directory is there, and ours alone
        self.ready = trio.Event()  # once up, even if it goes down later
        self._home = (home or embedded.default_home()).absolute()
        self.where = f"data in {self._home}"
        self.spool_dir: Path | None = self._home / "spool"
        self._hurry = hurry
        self._up_at = 0.0
        self._generation = 0  # counts the servers, from 1
        self._last_error = ""
        self._last_words: deque[str] = deque(maxlen=3)
        self._left: LeftServer | None = None  # by the supervisor before, until it is looked after here
        self._cluster: embedded.Cluster | None = None
        self._process: ChildProcess | None = None

    def take_over(self, left: LeftServer) -> None:
        """It runs already."""
        self._left, self._generation = left, left.generation - 1

    def leave(self) -> LeftServer | None:
        """What a successor of this supervisor has to know of it; None: it does not run."""
        process, cluster = self._process, self._cluster
        if process is None or cluster is None or process.returncode is not None or not self._up_at:
            return None
        assert isinstance(process.stdout, trio.lowlevel.FdStream)
        return LeftServer(
            pid=process.pid,
            output=process.stdout.fileno(),
            lock=cluster.lock,
            socket_directory=str(cluster.socket_directory),
            generation=self._generation,
        )

    async def run(self) -> None:
        """Keep it running until cancelled, which stops it; fast if ``hurry`` is set.

        Raises:
            StartupError: it cannot be started.
        """
        restarts = Restarts(RESTARTS)
        failed_starts = 0
        left = self._left
        running = None if left is None else embedded.Running(left.lock, Path(left.socket_directory))
        async with embedded.open_cluster(self._home, running) as cluster:
            self.url, self._cluster = cluster.url, cluster
            self.prepared.set()
            while True:
                how = await self._run_server(cluster)
                if not self.ready.is_set():
                    # Once is no proof: backends of a server killed a moment ago may hold its memory for another.
                    failed_starts += 1
                    if failed_starts == BOOT_CRASHES:
                        why = self._last_error or " ".join(self._last_words) or how
                        raise StartupError(f"PostgreSQL cannot be started in {cluster.data}: {why}")
                served_seconds = trio.current_time() - self._up_at if self._up_at else 0.0
                wait_seconds = restarts.after_death(trio.current_time(), served_seconds)
                log.error("PostgreSQL died", how=how, served_seconds=round(served_seconds, 1))
                await trio.sleep(wait_seconds)

    async def _run_server(self, cluster: embedded.Cluster) -> str:
        self._up_at, self._last_error = 0.0, ""
        self._last_words.clear()
        self._generation += 1
        oom_kills = count_oom_kills()
        async with trio.open_nursery() as child:
            try:
                self._process = process = await self._start(cluster, child)
            except OSError as error:
                return f"could not be started: {error}"
            child.start_soon(self._read_log, process)
            await process.wait()
            child.cancel_scope.deadline = trio.current_time() + LAST_WORDS_SECONDS
        return explain_exit(process.returncode, oom_kills=count_oom_kills() - oom_kills)

    async def _start(self, cluster: embedded.Cluster, child: trio.Nursery) -> ChildProcess:
        """A server in that nursery: the one that was left to us, once, or another. Raises OSError."""
        stop = partial(embedded.stop_server, hurry=self._hurry)
        left, self._left = self._left, None
        if left is not None:
            process = LeftProcess(left.pid, left.output)
            child.start_soon(process.run, stop)
            self._up_at = trio.current_time()
            self.ready.set()
            return process
        cluster.clear_locks()
        return await start_process(
            child,
            cluster.command(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            deliver_cancel=stop,
            **cluster.popen_options(),
        )

    async def _read_log(self, process: ChildProcess) -> None:
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
            getattr(log, level)("postgres", pid=process.pid, generation=self._generation, line=text)
        await process.stdout.aclose()  # nothing else closes it before the collector of garbage does
