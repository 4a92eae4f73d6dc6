"""Logs: one line an event, to standard error; the standard library's logging takes the same way.

JSON when standard error is no terminal, else lines for people. Nothing here decides what is worth saying.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Final

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}


def resolve_format(wanted: str) -> str:
    """``json`` or ``console``; an empty ``wanted`` asks the terminal."""
    return wanted or ("console" if sys.stderr.isatty() else "json")


def configure(level: str, line_format: str, *, timestamp: bool = True, **bound: object) -> dict[str, object]:
    """Set up this process's logs, once. Returns ``bound``, for the caller to change what every line carries.

    Args:
        level: ``debug``, ``info``, ``warn`` or ``error``.
        line_format: ``json`` or ``console``.
        timestamp: whether lines begin with the time.
        bound: what every line of this process carries, such as its slot.
    """

    def bind(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {**bound, **event}

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        bind,
        structlog.stdlib.add_log_level,
        *([structlog.processors.TimeStamper(fmt="iso", utc=True)] if timestamp else []),
        structlog.processors.StackInfoRenderer(),
    ]
    last: list[Processor]
    if line_format == "json":
        last = [structlog.processors.format_exc_info, head_first, structlog.processors.JSONRenderer(default=str)]
    else:
        # Plain: where rich is installed, the default shows the variables of every frame, payloads among them.
        plain = structlog.dev.plain_traceback
        last = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(LEVELS[level])
    # One warning and above is news about our server; its information lines repeat what the supervisor says.
    logging.getLogger("hypercorn.error").setLevel(logging.WARNING)
    logging.captureWarnings(True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        cache_logger_on_first_use=True,
    )
    return bound


def head_first(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Time, level and event before the rest, where the eye looks for them in a JSON line."""
    head = {name: event[name] for name in ("timestamp", "level", "event") if name in event}
    return {**head, **event}


def relay(line: bytes, line_format: str, *, child: str, pid: int, **tags: object) -> None:
    """Pass on a line that a child process wrote, so that it says whose it is.

    A JSON line of ours carries its tags already. What an interpreter or a library wrote past the logs is wrapped.
    """
    text = line.decode(errors="replace")
    if line_format == "json" and line.startswith(b'{"'):
        write(text)
    elif line_format == "json":
        structlog.get_logger("queen.supervisor").info("output", child=child, pid=pid, **tags, line=text)
    else:
        write(f"[{child} {pid}] {text}")


def write(line: str) -> None:
    """Write one line to standard error. That nobody reads it any more, or its disk is full, is no reason to stop."""
    with contextlib.suppress(OSError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
