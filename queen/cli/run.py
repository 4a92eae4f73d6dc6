"""``queen-trio run``: the server, in the foreground."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from queen.config.settings import MiB, Secret, Settings
from queen.config.sources import LOG_LEVELS, NO_KEY, SERIOUS, load_settings
from queen.observability import logs
from queen.supervisor import DEFAULT_APP, run_supervisor

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = "argparse._SubParsersAction"  # cannot be subscripted when it runs

log = structlog.get_logger(__name__)


def add_parser(commands: Commands) -> None:
    """Add this command and its flags."""
    parser = commands.add_parser(
        "run",
        help="start the server",
        description="Start the server: PostgreSQL, unless one is named, and workers. Flags win over the environment.",
    )
    parser.set_defaults(command=run)
    parser.add_argument(
        "--host", help="address to listen on (HOST; all with authentication or --insecure, else this machine only)"
    )
    parser.add_argument("--port", type=int, help="port to listen on (PORT; 6632; 0 for any free one)")
    parser.add_argument("--workers", type=int, help="worker processes (QUEEN_WORKERS; one per core)")
    parser.add_argument(
        "--insecure",
        action="store_true",
        default=None,
        help="listen on all addresses without authentication, and do not warn of it",
    )
    parser.add_argument("--pidfile", type=Path, help="file to hold the process id (QUEEN_PIDFILE)")
    add_control_argument(parser)
    parser.add_argument(
        "--hang-seconds",
        type=float,
        help="replace a worker whose loop gives no sign of life for so long (QUEEN_HANG_SECONDS; 10)",
    )
    parser.add_argument(
        "--spare",
        action=argparse.BooleanOptionalAction,
        help="keep one more worker booted, to take over from one that dies (QUEEN_SPARE; beside two workers or more)",
    )
    parser.add_argument(
        "--max-worker-rss",
        dest="max_worker_rss_bytes",
        type=lambda text: int(text) * MiB,
        metavar="MIB",
        help="replace a worker that holds more memory (QUEEN_MAX_WORKER_RSS_MB; no limit)",
    )
    parser.add_argument(
        "--max-worker-age",
        dest="max_worker_age_seconds",
        type=float,
        metavar="SECONDS",
        help="replace a worker that has served for longer (QUEEN_MAX_WORKER_AGE_SECONDS; no limit)",
    )
    parser.add_argument("--log-level", choices=LOG_LEVELS, help="(LOG_LEVEL; info)")
    parser.add_argument("--log-format", choices=("json", "console"), help="(LOG_FORMAT; json unless on a terminal)")
    parser.add_argument("--app", default=DEFAULT_APP, help=argparse.SUPPRESS)  # module:factory of another application
    add_database_arguments(parser)
    add_spool_arguments(parser)


def add_control_argument(parser: argparse.ArgumentParser) -> None:
    """The flag of every command that meets at the control socket."""
    parser.add_argument(
        "--control-socket",
        type=Path,
        help="unix socket for status, reload and so on (QUEEN_CONTROL_SOCKET; in the data or the runtime directory)",
    )


def add_database_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that needs the database."""
    database = parser.add_mutually_exclusive_group()
    database.add_argument("--data-dir", type=Path, help="directory of the embedded PostgreSQL (QUEEN_DATA_DIR)")
    database.add_argument(
        "--database-url",
        help="a PostgreSQL of your own instead, postgresql://… (QUEEN_DATABASE_URL, or PG_HOST and so on)",
    )


def flags_of(arguments: argparse.Namespace) -> dict[str, object]:
    """The flags among the arguments of a command that are settings."""
    names = set(Settings.__struct_fields__)
    flags = {name: value for name, value in vars(arguments).items() if name in names}
    if flags.get("database_url") is not None:
        flags["database_url"] = Secret(flags["database_url"])
    return flags


def add_spool_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags about pushes while PostgreSQL is away."""
    parser.add_argument("--spool-dir", type=Path, help="directory of the spool, on a local disk (FILE_BUFFER_DIR)")
    parser.add_argument("--spool-max-bytes", type=int, help="bytes that may wait in it (QUEEN_SPOOL_MAX_BYTES; 1 GiB)")


def settings_from(arguments: argparse.Namespace) -> Settings:
    """The settings that flags and environment give; logs are set up, and what cannot be honoured is said."""
    settings, notes = load_settings(flags=flags_of(arguments))
    logs.configure(settings.log_level, logs.resolve_format(settings.log_format), timestamp=settings.log_timestamp)
    for note in notes:
        (log.error if note in SERIOUS else log.warning)(note)
    return settings


def run(arguments: argparse.Namespace) -> int:
    """Serve until stopped. Returns the exit code."""
    settings = settings_from(arguments)
    if settings.encryption_key is None:
        log.warning(NO_KEY)
    say_who_may_enter(settings)
    return run_supervisor(settings, app=arguments.app, announce=announce)


def announce(line: str) -> None:
    """Answer on standard output. That nobody reads it, or its disk is full, does not keep the server from serving."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def say_who_may_enter(settings: Settings) -> None:
    """One line about who can reach the port and what keeps them out."""
    if settings.jwt.enabled:
        log.info("authentication is on", host=settings.host, algorithm=settings.jwt.algorithm)
    elif is_loopback(settings.host):
        log.info(
            "only this machine can reach the port: no authentication is set up",
            host=settings.host,
            open_with="JWT_ENABLED and a key, or --host, or --insecure",
        )
    elif not settings.insecure:
        log.warning(
            "anyone who can reach this port can read and write every queue: no authentication is set up",
            host=settings.host,
            silence="--insecure",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
