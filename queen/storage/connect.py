"""Opening connections to PostgreSQL: settings, timeouts, and the epoch that fences leases. asyncio flavor."""

from __future__ import annotations

import asyncio
import os
import select
import socket
from datetime import datetime
from typing import Final, NamedTuple

import asyncpg

from queen.config.database_url import locate_database
from queen.config.settings import Settings
from queen.errors import StartupError

# the timeline changes when a standby is promoted or a backup restored: leases of before are void
_EPOCH: Final = (
    "SELECT ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::integer, a.pid, a.backend_start"
    " FROM pg_stat_activity a WHERE a.pid = pg_backend_pid()"
)

_STATEMENT_MARGIN_SECONDS: Final = 5
"""How much longer than PostgreSQL's own statement timeout we wait: after that the connection is taken for dead."""

_LOOK_SECONDS: Final = 5.0
"""For the first statement, which looks something up in memory."""

_SILENCE_SECONDS: Final = 5
"""After which the kernel asks whether the other end of a connection is there, or gives up what it has sent to it.
Whether PostgreSQL is away is known before (pulse.py); this is for connections that nobody waits on."""


class Backend(NamedTuple):
    """A process of PostgreSQL that serves, or served, a connection. Process ids come again, with another start."""

    pid: int
    started_at: datetime


class Connection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg ships no types
    """A connection that knows the epoch (PostgreSQL timeline) it was opened in, and the backend at its other end."""

    __slots__ = ("backend", "direct", "epoch")
    epoch: int
    backend: Backend | None  # None: behind a pooler it changes
    direct: bool  # whoever we are connected to is that backend, and no pooler


async def dial(settings: Settings, *, application: str, watched: bool = False) -> Connection:
    """asyncio flavor. Connect with our settings, to whatever answers; raises what asyncpg raises.

    ``watched``: somebody sees to it that no statement hangs on it (pulse.py), so that none needs a timer of its own.
    trio-asyncio wakes for each of those when it would have been due, cancelled or not: half a minute after a load,
    once for every statement of it.
    """
    if settings.database_url is None:
        raise StartupError(
            "no database is configured: set QUEEN_DATABASE_URL or PG_HOST, or start the server with queen-trio run"
        )
    connected: Connection = await asyncpg.connect(
        settings.database_url.reveal(),
        timeout=settings.db_connect_timeout_seconds,
        command_timeout=None if watched else statement_patience(settings),
        statement_cache_size=256 if settings.db_statement_cache else 0,
        connection_class=Connection,
        server_settings={
            "application_name": application,
            "statement_timeout": str(int(settings.db_statement_timeout_seconds * 1000)),
            "lock_timeout": str(int(settings.db_lock_timeout_seconds * 1000)),
            "idle_in_transaction_session_timeout": str(int(settings.db_statement_timeout_seconds * 2000)),
            "timezone": "UTC",
            "synchronous_commit": "on",
            # a statement that waited for a lock has to see what the holder did
            "default_transaction_isolation": "read committed",
        },
    )
    return connected


def statement_patience(settings: Settings) -> float:
    """How many seconds a statement may take. PostgreSQL ends it before that, unless it has stopped or is cut off."""
    return settings.db_statement_timeout_seconds + _STATEMENT_MARGIN_SECONDS


async def open_connection(settings: Settings, *, application: str = "queen-trio", watched: bool = False) -> Connection:
    """asyncio flavor. Connect to a primary, and learn who is there; raises what asyncpg raises."""
    connection = await dial(settings, application=application, watched=watched)
    raw = connection._transport.get_extra_info("socket")
    if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENCE_SECONDS)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_SECONDS * 1000)
    try:
        row = await connection.fetchrow(_EPOCH, timeout=_LOOK_SECONDS)
        connection.epoch = row[0]
        connection.backend = Backend(row[1], row[2]) if settings.db_statement_cache else None
        connection.direct = connection.backend is not None and row[1] == connection.get_server_pid()
    except BaseException:  # whoever waits for this is gone, or it broke at once: nobody else knows the connection
        await hang_up(connection)
        raise
    if watched and not connection.direct:  # what PostgreSQL says of its backends says nothing of this one
        await hang_up(connection)
        return await open_connection(settings, application=application)
    return connection


def explain_unreachable(settings: Settings, error: BaseException) -> StartupError:
    """The sentence for an operator whose PostgreSQL was not reached at start. Without the password."""
    if isinstance(error, TimeoutError):
        reason = "it does not answer"
    elif isinstance(error, OSError) and error.errno is not None:
        reason = os.strerror(error.errno) if error.errno > 0 else str(error.strerror)  # below 0: of getaddrinfo
        reason += f" ({error.filename})" if error.filename else ""  # a certificate, or the like
    else:
        reason = str(error)
    where = ""
    if settings.database_url is not None and not isinstance(error, asyncpg.InterfaceError):  # that is a bad URL
        host, port, _ = locate_database(settings.database_url.reveal())
        where = f" at {host} port {port}"
    return StartupError(f"PostgreSQL cannot be reached{where}: {reason}")


def has_news(connection: Connection) -> bool:
    """Whether something lies unread on a connection that is idle. Nobody is asked to speak there, so it is its end."""
    raw = connection._transport.get_extra_info("socket")
    poll = select.poll()
    poll.register(raw.fileno(), select.POLLIN)
    return bool(poll.poll(0))


async def hang_up(connection: Connection) -> None:
    """asyncio flavor. Drop a connection without a goodbye, and let the loop close its socket before we go on."""
    connection.terminate()
    await asyncio.sleep(0)
