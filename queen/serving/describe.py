"""What a worker is doing, as a tree: its connections, their requests, the writes and the SQL that those wait for.

Made from what the parts record, when somebody asks; PostgreSQL is asked about the connections in use, on one of its
own and not for long. Nothing is changed or waited out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import trio

from queen.errors import QueenError
from queen.model.tree import Branch
from queen.observability.doing import Backend, BatchWrite, ConnectionRecord, DatabaseJob
from queen.service import Service

MAX_SHOWN: Final = 200
"""Connections of a worker that are shown, those that are at it for longest first: a screen is not for more."""

MAX_SQL: Final = 8
"""Database work that is shown of one request or write, and backends that block it."""

LOOK_SECONDS: Final = 1.5
"""How long PostgreSQL may take to say what its connections do; without its word the rest is still worth having."""

IDLE: Final = "idle"

Task = trio.lowlevel.Task


async def describe(service: Service, connections: Sequence[ConnectionRecord]) -> tuple[Branch, ...]:
    """The branches of a worker."""
    context = service.context
    if context is None:
        return (Branch(kind="more", name="its storage is not open"),)
    jobs = context.engine.store.doing()
    picture = Picture(connections, context.engine.doing(), jobs)
    backends: dict[int, Backend] = {}
    pids = {job.pid for job in jobs if job.pid is not None}
    if pids:
        with trio.move_on_after(LOOK_SECONDS):
            try:
                backends = {backend.pid: backend for backend in await context.engine.store.backends(pids)}
            except QueenError:  # it cannot be reached: jobs are shown without its word
                backends = {}
    return tuple(picture.branches(service.requests_in_flight, backends))


class Picture:
    """What was recorded at one moment, put together by who waits for whom. Made without a checkpoint in between."""

    def __init__(
        self,
        connections: Sequence[ConnectionRecord],
        writes: Sequence[BatchWrite],
        jobs: Sequence[DatabaseJob],
    ) -> None:
        self._busy = sorted(
            (each for each in connections if each.waits != IDLE), key=lambda each: each.seconds, reverse=True
        )
        self._idle = len(connections) - len(self._busy)
        self._backends: Mapping[int, Backend] = {}
        self._writes, self._jobs = writes, jobs
        self._write_of = {task: write for write in writes for member in write.tasks for task in ancestry(member)}
        self._jobs_of: dict[Task, list[DatabaseJob]] = {}
        for job in jobs:
            for task in ancestry(job.task):
                self._jobs_of.setdefault(task, []).append(job)
        shown = (connection.task for connection in self._busy[:MAX_SHOWN])
        self._checkpoints = {task: checkpoint_of(task) for task in shown if task is not None}

    def branches(self, requests_in_flight: int, backends: Mapping[int, Backend]) -> Iterator[Branch]:
        """The branches of the worker; ``backends``: by pid, what PostgreSQL has said since."""
        self._backends = backends
        for connection in self._busy[:MAX_SHOWN]:
            yield self._connection(connection)
        if len(self._busy) > MAX_SHOWN:
            yield Branch(kind="more", name=f"{len(self._busy) - MAX_SHOWN} more connections that are not idle")
        if self._idle:
            yield Branch(kind="more", name=f"{self._idle} idle connection{'s' if self._idle != 1 else ''}")
        elsewhere = requests_in_flight - sum(bool(connection.request) for connection in self._busy)
        if elsewhere > 0:
            yield Branch(kind="more", name=f"{elsewhere} request{'s' if elsewhere != 1 else ''} through hypercorn")
        background = list(self._background())
        yield from background[:MAX_SHOWN]
        if len(background) > MAX_SHOWN:
            yield Branch(kind="more", name=f"{len(background) - MAX_SHOWN} more that no connection waits for")

    def _connection(self, connection: ConnectionRecord) -> Branch:
        below = (self._request(connection),) if connection.request else ()
        waits = f"waits {connection.waits}" if connection.waits else "answers"
        return Branch(
            kind="connection", name=connection.client(), at=waits, seconds=rounded(connection.seconds), branches=below
        )

    def _request(self, connection: ConnectionRecord) -> Branch:
        task = connection.task
        below: tuple[Branch, ...] = ()
        if connection.waits or task is None:
            at, seconds = f"waits {connection.waits}", connection.seconds
        elif (write := self._write_of.get(task)) is not None:
            at = "waits for a write" if write.writer else "waits for the write before its own"
            seconds, below = write.seconds, (self._write(write),)
        elif jobs := self._jobs_of.get(task):
            at, seconds = "waits for PostgreSQL", max(job.seconds for job in jobs)
            below = tuple(self._sql(job) for job in jobs[:MAX_SQL])
        else:
            at, seconds = self._checkpoints[task], connection.request_seconds
        return Branch(kind="request", name=connection.request, at=at, seconds=rounded(seconds), branches=below)

    def _write(self, write: BatchWrite) -> Branch:
        jobs = self._jobs_of.get(write.writer, ()) if write.writer is not None else ()
        together = f" of {len(write.tasks)} requests" if len(write.tasks) > 1 else ""
        return Branch(
            kind="write",
            name=f"{write.name}{together}",
            at="in flight" if write.writer is not None else "has not begun",
            seconds=rounded(write.seconds),
            branches=tuple(self._sql(job) for job in jobs[:MAX_SQL]),
        )

    def _sql(self, job: DatabaseJob) -> Branch:
        if job.pid is None:
            return Branch(kind="sql", name=job.name, at="waits for a connection", seconds=rounded(job.seconds))
        backend = self._backends.get(job.pid)
        if backend is None:
            return Branch(kind="sql", name=job.name, pid=job.pid, at="on a connection", seconds=rounded(job.seconds))
        return Branch(
            kind="sql",
            name=f"{job.name} «{backend.statement}»",
            pid=job.pid,
            at=f"{backend.state}, {backend.waits_for}" if backend.waits_for else backend.state,
            seconds=rounded(backend.seconds),
            blocked_by=backend.blocked_by[:MAX_SQL],
        )

    def _background(self) -> Iterator[Branch]:
        """What no connection waits for: housekeeping, and writes whose clients have gone."""
        shown = {connection.task for connection in self._busy if connection.task is not None}
        for write in self._writes:
            if shown.isdisjoint(lineage(write.tasks)):
                yield self._write(write)
        writers = {write.writer for write in self._writes}
        for job in self._jobs:
            if shown.isdisjoint(ancestry(job.task)) and writers.isdisjoint(ancestry(job.task)):
                yield self._sql(job)


def ancestry(task: Task) -> Iterator[Task]:
    """The task, and those that wait for it because they opened the nursery it runs in."""
    at: Task | None = task
    while at is not None:
        yield at
        at = at.parent_nursery.parent_task if at.parent_nursery is not None else None


def lineage(tasks: Iterable[Task]) -> set[Task]:
    return {ancestor for task in tasks for ancestor in ancestry(task)}


def checkpoint_of(task: Task) -> str:
    """Where in our code a task stands: of those that it waits for in a nursery, the first."""
    for nursery in reversed(task.child_nurseries):
        for child in nursery.child_tasks:
            return checkpoint_of(child)
    place = ""
    for frame, _line in task.iter_await_frames():
        module = frame.f_globals.get("__name__", "")
        if module.startswith("queen."):
            place = f"{module.removeprefix('queen.')} {frame.f_code.co_qualname}"
    return f"waits in {place}" if place else "runs"


def rounded(seconds: float) -> float:
    return round(seconds, 3)
