"""What servers count and measure: the vectors and their order, as workers write them and pages read them. No I/O."""

from __future__ import annotations

from datetime import datetime
from typing import Final
from uuid import UUID

import msgspec


class Tally(msgspec.Struct, kw_only=True):
    """What was done, on a queue or on all. The order of the fields is that of queen.queue_series."""

    push_requests: int = 0
    push_messages: int = 0  # stored, without duplicates
    pop_requests: int = 0
    pop_messages: int = 0
    pop_empty: int = 0
    ack_requests: int = 0
    ack_success: int = 0
    ack_failed: int = 0
    transactions: int = 0
    dead_letters: int = 0
    lag_ms: int = 0  # sum over lag_count delivered messages: from their push to their delivery
    lag_count: int = 0
    retention_messages: int = 0
    completed_messages: int = 0
    eviction_messages: int = 0
    expiries: int = 0
    partitions_created: int = 0
    partitions_deleted: int = 0
    lag_max_ms: int = 0  # not a sum

    def add(self, other: Tally) -> None:
        for name in TALLIES:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.lag_max_ms = max(self.lag_max_ms, other.lag_max_ms)

    @property
    def average_lag_ms(self) -> float:
        return self.lag_ms / self.lag_count if self.lag_count else 0.0


TALLIES: Final = tuple(field for field in Tally.__struct_fields__ if field != "lag_max_ms")
"""The fields of a Tally that are sums."""

WORK: Final = (
    *TALLIES,
    "requests",
    "failed_requests",
    "jobs",
    "db_errors",
    "cpu_user_us",
    "cpu_system_us",
    *(f"{verb}_{what}" for verb in ("push", "pop", "ack") for what in ("writes", "written", "write_us")),
)
"""What a worker counts: the Tally of all queues, and work that belongs to none. All are sums. ``push_writes`` are
writes of batches, ``push_written`` the requests in them, ``push_write_us`` the time they took."""

GAUGES: Final = (
    "loop_lag_ms",
    "rss_bytes",
    "virtual_bytes",
    "pool_size",
    "pool_idle",
    "pool_active",
    "pool_waiting",
    "waiting_pushes",
    "waiting_pops",
    "waiting_acks",
    "parked",
    "cpu_user_us",  # in the second before
    "cpu_system_us",
)
"""What a worker measures, every second."""


def _zeros() -> list[float]:
    return [0.0] * len(GAUGES)


class Samples(msgspec.Struct, kw_only=True):
    """Measurements of all gauges, in the order of GAUGES."""

    count: int = 0
    sums: list[float] = msgspec.field(default_factory=_zeros)
    leasts: list[float] = msgspec.field(default_factory=_zeros)
    greatests: list[float] = msgspec.field(default_factory=_zeros)
    lasts: list[float] = msgspec.field(default_factory=_zeros)

    def add(self, values: list[float]) -> None:
        """One more measurement."""
        self.merge(Samples(count=1, sums=values, leasts=values, greatests=values, lasts=values))

    def merge(self, later: Samples) -> None:
        if later.count == 0:
            return
        if self.count == 0 or len(self.sums) != len(later.sums):
            self.count = 0
            self.sums, self.leasts, self.greatests = list(later.sums), list(later.leasts), list(later.greatests)
        else:
            self.sums = [a + b for a, b in zip(self.sums, later.sums, strict=True)]
            self.leasts = [min(a, b) for a, b in zip(self.leasts, later.leasts, strict=True)]
            self.greatests = [max(a, b) for a, b in zip(self.greatests, later.greatests, strict=True)]
        self.lasts = list(later.lasts)
        self.count += later.count

    def last_values(self) -> dict[str, float]:
        return dict(zip(GAUGES, self.lasts, strict=False))

    def average(self, gauge: str) -> float:
        return self.sums[GAUGES.index(gauge)] / self.count if self.count else 0.0

    def least(self, gauge: str) -> float:
        return self.leasts[GAUGES.index(gauge)]

    def greatest(self, gauge: str) -> float:
        return self.greatests[GAUGES.index(gauge)]

    def last(self, gauge: str) -> float:
        return self.lasts[GAUGES.index(gauge)]


class Waiting(msgspec.Struct, frozen=True):
    """Pops of a group that wait on a queue."""

    queue: str
    group: str
    pops: int


class ProcessState(msgspec.Struct, kw_only=True):
    """What a worker says of itself, beside its vectors."""

    gauges: dict[str, float] = {}
    waiting: list[Waiting] = []
    popped: list[tuple[str, str]] = []  # queue and group of pops since the last time


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """A worker process, as last seen."""

    process_id: UUID
    hostname: str
    worker_id: str
    pid: int
    started_at: datetime
    seen_at: datetime
    state: ProcessState


class WorkerPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A worker in one span of time."""

    at: datetime
    hostname: str
    worker_id: str
    pid: int
    work: dict[str, int]
    lag_max_ms: int
    samples: Samples


class QueuePoint(msgspec.Struct, frozen=True, kw_only=True):
    """A queue in one span of time; ``queue`` empty-handed (None): all queues."""

    at: datetime
    queue: str | None
    tally: Tally


class ParkedPoint(msgspec.Struct, frozen=True, kw_only=True):
    """Pops that waited on a queue at a worker, at most, in one span of time."""

    at: datetime
    queue: str
    hostname: str
    worker_id: str
    parked: int


class Window(msgspec.Struct, frozen=True):
    """From when to when a page looks, and how many minutes a point of it covers."""

    start: datetime
    end: datetime
    minutes: int


class Leases(msgspec.Struct, frozen=True, kw_only=True):
    """Live leases, from at most some thousands: leases, the partitions they hold, messages in them, messages acked."""

    leases: int
    partitions: int
    messages: int
    acked: int


class DeadLetterSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Dead letters: how many there are; in how many partitions, and of which errors, the newest of them are."""

    total: int
    partitions: int
    errors: tuple[tuple[str, int], ...]
