"""How this worker is and what it does, told to the others: sampling, reporting, folding of counts. Decides nothing.

Every second the gauges are read; every few seconds what was counted is written, so that each worker of each server can
answer for all. A report that cannot be written is kept and goes with the next.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

import structlog
import trio

from queen.config.settings import Settings
from queen.errors import QueenError
from queen.model.metrics import GAUGES, TALLIES, WORK, Process, ProcessState, Samples, Tally, Waiting
from queen.observability.activity import Activity
from queen.storage.metrics import Report
from queen.storage.store import Store

MANY_QUEUES: Final = 500
"""Active queues from which on their series are written by the longer interval: each is some rows a time."""

MAX_WAITING: Final = 10_000
"""Pairs of queue and group of which a report says how many pops wait."""

_LAST_WORDS_SECONDS: Final = 1.0
"""How long the report of a worker that ends may take."""

_PAGE_BYTES: Final = resource.getpagesize()
_STATM: Final = Path("/proc/self/statm")

log = structlog.get_logger("queen.engine")


class Monitor:
    """See the module. ``gauges`` reads those of GAUGES that belong to the engine, ``waiting`` who is parked, ``writes``
    what of WORK the batchers count."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        activity: Activity,
        gauges: Callable[[], Mapping[str, int]],
        waiting: Callable[[], list[Waiting]],
        writes: Callable[[], Mapping[str, int]],
    ) -> None:
        self._store = store
        self._settings = settings
        self._activity = activity
        self._gauges = gauges
        self._waiting = waiting
        self._writes = writes
        self.worker_id = settings.worker_id  # may change
        self._process_id = uuid4()
        self._hostname = socket.gethostname()
        self.started_at = datetime.now(UTC)
        self.requests: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """Requests answered since the start, and how many of them with a failure of ours; whoever serves sets it."""
        self._told: dict[str, int] = {}  # of what is counted since the start: how much was reported
        self._unsaid = Tally()
        self._unsaid_work: dict[str, int] = {}
        self._unsaid_queues: dict[str, Tally] = {}
        self._samples = Samples()
        self._last_queues = trio.current_time()
        self._writing = trio.Lock()
        self.processes: list[Process] = []
        """The live workers, as of the last report."""
        self.cluster: dict[str, int] = {}
        """What all have done, as of the last report."""
        self.recent: dict[str, float] = {}
        """The same a second, between the last two reports."""
        self._reported_at: float | None = None

    async def run(self) -> None:
        """Sample and report until cancelled; a worker that ends says its last words."""
        try:
            async with trio.open_nursery() as loops:
                loops.start_soon(self._sample)
                loops.start_soon(self._report)
        finally:
            with trio.move_on_after(_LAST_WORDS_SECONDS, shield=True):
                try:
                    await self.report()
                    await self._store.metrics.leave(self._process_id)
                except QueenError as error:
                    log.debug("the last report of this worker is lost", error=error.detail)

    async def _sample(self) -> None:
        interval_seconds = self._settings.metrics_sample_seconds
        due = trio.current_time()
        before = os.times()
        while True:
            due += interval_seconds
            await trio.sleep_until(due)
            now = trio.current_time()
            lag_seconds, due = now - due, now  # a stall is measured once
            times = os.times()
            measured = {
                **self._measure(),
                "loop_lag_ms": lag_seconds * 1000,
                "cpu_user_us": (times.user - before.user) * 1e6 / interval_seconds,
                "cpu_system_us": (times.system - before.system) * 1e6 / interval_seconds,
            }
            before = times
            self._samples.add([measured[name] for name in GAUGES])

    def _measure(self) -> dict[str, float]:
        """The gauges that say how things are now; the others, which say how they went, are 0."""
        return {**dict.fromkeys(GAUGES, 0.0), **self._gauges(), **memory_bytes()}

    async def _report(self) -> None:
        while True:
            try:
                await self.fold()
                await self.report()
                await self._look_around()
            except QueenError as error:
                log.warning("metrics not written, they go with the next report", error=error.detail)
            await trio.sleep(self._settings.stats_interval_seconds)

    async def _look_around(self) -> None:
        """Remember what all workers say, for those who may not wait for storage."""
        cluster = await self._store.metrics.cluster()
        self.processes = await self.live_processes()
        now = trio.current_time()
        if self._reported_at is not None and now > self._reported_at:
            seconds = now - self._reported_at
            self.recent = {name: (value - self.cluster.get(name, 0)) / seconds for name, value in cluster.items()}
        self.cluster, self._reported_at = cluster, now

    def consumers(self, processes: Sequence[Process]) -> dict[tuple[str, str], int]:
        """Pops that wait, by queue and group, at all workers; 1 where somebody came lately and waits no more.

        What another worker says is as old as its last report.
        """
        found: dict[tuple[str, str], int] = {}
        for process in processes:
            for queue, group in process.state.popped:
                found.setdefault((queue, group), 0)
        others = [process.state.waiting for process in processes if process.process_id != self._process_id]
        for waiting in (self._waiting(), *others):
            for pops in waiting:
                found[pops.queue, pops.group] = found.get((pops.queue, pops.group), 0) + pops.pops
        return {pair: pops or 1 for pair, pops in found.items()}

    @property
    def process_id(self) -> UUID:
        """Of this worker, as long as it lives."""
        return self._process_id

    async def live_processes(self) -> list[Process]:
        """The live workers of all servers, this one too, as they are known now."""
        return await self._store.metrics.processes(self.live_seconds)

    @property
    def live_seconds(self) -> float:
        """A worker that has said nothing for so long is taken for gone."""
        return 3.5 * self._settings.stats_interval_seconds

    async def refresh(self) -> int:
        """Write and fold now. Returns how many changes were folded."""
        folded = await self.fold()
        await self.report()
        await self._look_around()
        return folded

    async def fold(self) -> int:
        """Fold what was counted in storage. Returns how many changes."""
        folded, births = await self._store.counts.fold()
        for queue, created, deleted in births:
            self._activity.count(queue, partitions_created=created, partitions_deleted=deleted)
        return folded

    async def report(self) -> None:
        """Write what was done and measured since the last time; on an error keep it for the next."""
        async with self._writing:
            report = self._take()
            try:
                await self._store.metrics.record(report)
            except BaseException:  # also when cancelled: there is one more report to come
                self._unsaid, self._unsaid_work = report.everything, report.work
                self._unsaid_queues = report.queues
                report.samples.merge(self._samples)
                self._samples = report.samples
                raise

    def _take(self) -> Report:
        everything, popped = self._activity.take()
        everything.add(self._unsaid)
        queues, self._unsaid_queues = self._unsaid_queues, {}
        waited_seconds = trio.current_time() - self._last_queues
        if self._activity.active_queues <= MANY_QUEUES or waited_seconds >= self._settings.metrics_aggregate_seconds:
            self._last_queues = trio.current_time()
            for name, tally in self._activity.take_queues().items():
                queues.setdefault(name, Tally()).add(tally)
        work = {name: getattr(everything, name) for name in TALLIES}
        for name, value in self._since_start().items():
            work[name] = self._unsaid_work.get(name, 0) + value - self._told.get(name, 0)
            self._told[name] = value
        self._unsaid, self._unsaid_work = Tally(), {}
        samples, self._samples = self._samples, Samples()
        return Report(
            process_id=self._process_id,
            hostname=self._hostname,
            worker_id=self.worker_id,
            pid=os.getpid(),
            started_at=self.started_at,
            state=ProcessState(
                gauges={**self._measure(), **(samples.last_values() if samples.count else {})},
                waiting=self._waiting()[:MAX_WAITING],
                popped=popped,
            ),
            work={name: work[name] for name in WORK},
            lag_max_ms=everything.lag_max_ms,
            samples=samples,
            everything=everything,
            queues=queues,
        )

    def _since_start(self) -> dict[str, int]:
        """What is counted since the start of the process, of WORK."""
        times = os.times()
        requests, failed_requests = self.requests()
        storage = self._store.statistics()
        return {
            **self._writes(),
            "requests": requests,
            "failed_requests": failed_requests,
            "jobs": storage["done"],
            "db_errors": storage["errors"],
            "cpu_user_us": round(times.user * 1e6),
            "cpu_system_us": round(times.system * 1e6),
        }


def memory_bytes() -> dict[str, int]:
    """Memory of this process; without a descriptor left to ask with, the most it ever held, twice.

    /proc answers from memory, so it does not block.
    """
    try:
        virtual, resident = _STATM.read_bytes().split()[:2]
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"virtual_bytes": peak, "rss_bytes": peak}
    return {"virtual_bytes": int(virtual) * _PAGE_BYTES, "rss_bytes": int(resident) * _PAGE_BYTES}
