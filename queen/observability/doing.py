"""What tasks of this process are at, as the parts that make them wait record it. Read only when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import trio


class ConnectionRecord(NamedTuple):
    """A connection. ``waits``: for what of its client's, ``idle`` between requests; empty: the server is at work.
    ``client`` asks the kernel: of ten thousand connections only some are shown."""

    client: Callable[[], str]
    task: trio.lowlevel.Task | None
    request: str  # method and path; empty: none
    request_seconds: float
    waits: str
    seconds: float


class DatabaseJob(NamedTuple):
    """Database work that a task waits for. ``pid``: of the backend that does it; None: it waits for a connection."""

    name: str
    seconds: float
    task: trio.lowlevel.Task
    pid: int | None


class BatchWrite(NamedTuple):
    """A write that many tasks wait for. ``writer``: the task that does it; None: it has not begun."""

    name: str
    seconds: float
    tasks: Sequence[trio.lowlevel.Task]
    writer: trio.lowlevel.Task | None


class Backend(NamedTuple):
    """What PostgreSQL says of a connection."""

    pid: int
    state: str  # as in pg_stat_activity
    waits_for: str  # wait event, empty while it computes
    statement: str  # parameters are not part of it
    seconds: float  # since the statement began, or since it ended
    blocked_by: tuple[int, ...]
