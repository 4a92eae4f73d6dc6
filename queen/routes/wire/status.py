"""The status pages: the whole server, queues, one queue, analytics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final, TypedDict

import msgspec

from queen.model.metrics import (
    DeadLetterSummary,
    Leases,
    QueuePoint,
    Samples,
    Tally,
    Window,
    WorkerPoint,
)
from queen.model.spool import SpoolFigures
from queen.model.status import Overview, PartitionStatus, QueueStatus
from queen.routes.wire.body import (
    TimeText,
    UuidText,
    format_time,
)
from queen.routes.wire.dead_letters import Page
from queen.routes.wire.query import time_or_null
from queen.routes.wire.resources import QueueEntry, QueueQuery, SixNumbers, queue_entry, six
from queen.routes.wire.window import IntervalName, TimeRange, time_range

_MIB: Final = 1024 * 1024


class Moment:
    """What all workers did and were in one point of time."""

    def __init__(self, at: datetime) -> None:
        self.at = at
        self.tally = Tally()
        self.samples = Samples()
        self.work: dict[str, int] = {}
        self.rss_bytes: dict[tuple[str, str], float] = {}
        self.pool: dict[tuple[str, str], tuple[float, float, float]] = {}

    def add(self, point: WorkerPoint) -> None:
        worker = (point.hostname, point.worker_id)
        self.samples.merge(point.samples)
        for name, value in point.work.items():
            self.work[name] = self.work.get(name, 0) + value
        self.rss_bytes[worker] = point.samples.last("rss_bytes")
        self.pool[worker] = (
            point.samples.last("pool_active"),
            point.samples.last("pool_idle"),
            point.samples.last("pool_size"),
        )


def moments_of(everything: Sequence[QueuePoint], workers: Sequence[WorkerPoint]) -> list[Moment]:
    """Both series by their points of time, newest first."""
    moments: dict[datetime, Moment] = {}
    for point in everything:
        moments.setdefault(point.at, Moment(point.at)).tally = point.tally
    for worker in workers:
        moments.setdefault(worker.at, Moment(worker.at)).add(worker)
    return [moments[at] for at in sorted(moments, reverse=True)]


class ThroughputPoint(TypedDict):
    """What all workers did and were in one step of time."""

    timestamp: TimeText
    ingested: int
    processed: int
    popMessages: int
    ingestedPerSecond: float
    processedPerSecond: float
    popPerSecond: float
    avgLagMs: float
    maxLagMs: int
    avgEventLoopLagMs: float
    maxEventLoopLagMs: float
    minFreeSlots: int
    dbErrors: int
    ackFailed: int
    dlqCount: int
    queenCpuUserPct: float
    queenCpuSysPct: float
    queenRssMb: float
    dbPoolActive: int
    dbPoolIdle: int
    dbPoolSize: int


class StatusQueueEntry(TypedDict):
    """A queue on the status page."""

    id: UuidText
    name: str
    namespace: str
    task: str
    partitions: int
    totalConsumed: int


class Requests(TypedDict):
    """Requests by verb."""

    push: int
    pop: int
    ack: int


class Efficiency(TypedDict):
    """Messages a request, by verb."""

    push: float
    pop: float
    ack: float


class StatusMessages(SixNumbers):
    """Messages, and how they come and go."""

    requests: Requests
    batchEfficiency: Efficiency


class StatusLeases(TypedDict):
    """Live leases."""

    active: int
    partitionsWithLeases: int
    totalBatchSize: int
    totalAcked: int


class ErrorCount(TypedDict):
    """A reason of dead letters."""

    error: str
    count: int


class StatusDeadLetters(TypedDict):
    """Dead letters."""

    totalMessages: int
    affectedPartitions: int
    topErrors: list[ErrorCount]


class StatusWorker(TypedDict):
    """A worker."""

    hostname: str
    workerId: str
    pid: int
    avgEventLoopLagMs: float
    maxEventLoopLagMs: float
    freeSlots: int
    dbConnections: int
    jobQueueSize: int
    messagesProcessed: int


class StatusErrors(TypedDict):
    """What went wrong."""

    dbErrors: int
    ackFailed: int
    dlqMessages: int


class StatusAnswer(TypedDict):
    """What has happened lately; steps of time newest first."""

    timeRange: TimeRange
    bucketMinutes: int
    pointCount: int
    throughput: list[ThroughputPoint]
    queues: list[StatusQueueEntry]
    messages: StatusMessages
    leases: StatusLeases
    deadLetterQueue: StatusDeadLetters
    workers: list[StatusWorker]
    errors: StatusErrors
    statsAge: float


class CountedPage(Page):
    """Which part of a list this is, and of how much."""

    total: int


class StatusQueueList(TypedDict):
    """Queues, newest first."""

    queues: list[QueueEntry]
    pagination: CountedPage


class StatusQueueConfig(TypedDict):
    """Options of a queue."""

    leaseTime: int
    retryLimit: int
    retryDelay: int
    ttl: int
    maxQueueSize: int
    deadLetterQueue: bool


class StatusQueueHead(TypedDict):
    """A queue."""

    id: UuidText
    name: str
    namespace: str
    task: str
    priority: int
    createdAt: TimeText
    config: StatusQueueConfig


class ConsumedCount(TypedDict):
    """How much of a partition was consumed."""

    totalConsumed: int
    batchesConsumed: int


class StatusPartition(TypedDict):
    """A partition of a queue."""

    id: UuidText
    name: str
    createdAt: TimeText
    messages: SixNumbers
    stats: SixNumbers
    cursor: ConsumedCount
    lastActivity: TimeText | None
    oldestMessage: TimeText | None
    newestMessage: TimeText | None


class StatusTotals(SixNumbers):
    """Messages of a queue, twice."""

    messages: SixNumbers


class StatusQueueAnswer(TypedDict):
    """A queue with its partitions."""

    queue: StatusQueueHead
    partitions: list[StatusPartition]
    totals: StatusTotals


class DataPoint(TypedDict):
    """Messages of one step of time."""

    timestamp: TimeText
    messages: int


StatusAnalytics = TypedDict(
    "StatusAnalytics",
    {"dataPoints": list[DataPoint], "interval": IntervalName, "from": TimeText, "to": TimeText},
)


class Buffers(TypedDict):
    """Pushes that wait in the spool."""

    pending: int
    failed: int
    dbHealthy: bool
    worker: int


class Refreshed(TypedDict):
    """What was brought up to date."""

    partition: dict[str, int]
    queue: dict[str, int]
    namespace: dict[str, int]
    task: dict[str, int]
    system: dict[str, int]
    cleanup: dict[str, int]


def _throughput(moment: Moment, window: Window) -> ThroughputPoint:
    tally, samples, seconds = moment.tally, moment.samples, window.minutes * 60
    pools = moment.pool.values()
    return {
        "timestamp": format_time(moment.at),
        "ingested": tally.push_messages,
        "processed": tally.ack_success,
        "popMessages": tally.pop_messages,
        "ingestedPerSecond": round(tally.push_messages / seconds, 3),
        "processedPerSecond": round(tally.ack_success / seconds, 3),
        "popPerSecond": round(tally.pop_messages / seconds, 3),
        "avgLagMs": round(tally.average_lag_ms, 1),
        "maxLagMs": tally.lag_max_ms,
        "avgEventLoopLagMs": round(samples.average("loop_lag_ms"), 2),
        "maxEventLoopLagMs": round(samples.greatest("loop_lag_ms"), 2),
        "minFreeSlots": int(samples.least("pool_idle")),
        "dbErrors": moment.work.get("db_errors", 0),
        "ackFailed": tally.ack_failed,
        "dlqCount": tally.dead_letters,
        "queenCpuUserPct": round(moment.work.get("cpu_user_us", 0) / seconds / 1e4, 2),
        "queenCpuSysPct": round(moment.work.get("cpu_system_us", 0) / seconds / 1e4, 2),
        "queenRssMb": round(sum(moment.rss_bytes.values()) / _MIB, 1),
        "dbPoolActive": int(sum(active for active, _, _ in pools)),
        "dbPoolIdle": int(sum(idle for _, idle, _ in pools)),
        "dbPoolSize": int(sum(size for _, _, size in pools)),
    }


def _per_request(messages: int, requests: int) -> float:
    return round(messages / requests, 2) if requests else 0.0


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """All that the status page is made of."""

    window: Window
    everything: Sequence[QueuePoint]
    workers: Sequence[WorkerPoint]
    queues: Sequence[QueueStatus]
    overview: Overview
    leases: Leases
    dead_letters: DeadLetterSummary


def write_status(status: Status) -> bytes:
    window = status.window
    moments = moments_of(status.everything, status.workers)
    done = Tally()
    for point in status.everything:
        done.add(point.tally)
    return msgspec.json.encode(
        StatusAnswer(
            {
                "timeRange": time_range(window),
                "bucketMinutes": window.minutes,
                "pointCount": len(moments),
                "throughput": [_throughput(moment, window) for moment in moments],
                "queues": [
                    {
                        "id": str(queue.queue.queue_id),
                        "name": queue.queue.name,
                        "namespace": queue.queue.namespace,
                        "task": queue.queue.task,
                        "partitions": queue.count.partitions,
                        "totalConsumed": _consumed(queue),
                    }
                    for queue in status.queues
                ],
                "messages": {
                    **six(status.overview.six),
                    "requests": {"push": done.push_requests, "pop": done.pop_requests, "ack": done.ack_requests},
                    "batchEfficiency": {
                        "push": _per_request(done.push_messages, done.push_requests),
                        "pop": _per_request(done.pop_messages, done.pop_requests - done.pop_empty),
                        "ack": _per_request(done.ack_success + done.ack_failed, done.ack_requests),
                    },
                },
                "leases": {
                    "active": status.leases.leases,
                    "partitionsWithLeases": status.leases.partitions,
                    "totalBatchSize": status.leases.messages,
                    "totalAcked": status.leases.acked,
                },
                "deadLetterQueue": {
                    "totalMessages": status.dead_letters.total,
                    "affectedPartitions": status.dead_letters.partitions,
                    "topErrors": [{"error": error, "count": count} for error, count in status.dead_letters.errors],
                },
                "workers": [_worker(points) for points in by_worker(status.workers).values()],
                "errors": {
                    "dbErrors": sum(point.work.get("db_errors", 0) for point in status.workers),
                    "ackFailed": done.ack_failed,
                    "dlqMessages": done.dead_letters,
                },
                "statsAge": 0.0,
            }
        )
    )


def _consumed(queue: QueueStatus) -> int:
    """Messages that the group which is furthest has behind it."""
    return max((queue.count.groups[name].consumed for name in queue.groups if name in queue.count.groups), default=0)


def by_worker(points: Sequence[WorkerPoint]) -> dict[tuple[str, str], list[WorkerPoint]]:
    """The points of each worker, oldest first."""
    workers: dict[tuple[str, str], list[WorkerPoint]] = {}
    for point in points:
        workers.setdefault((point.hostname, point.worker_id), []).append(point)
    return dict(sorted(workers.items()))


def whole(points: Sequence[WorkerPoint]) -> Samples:
    """The measurements of several points as one."""
    samples = Samples()
    for point in points:
        samples.merge(point.samples)
    return samples


def _worker(points: Sequence[WorkerPoint]) -> StatusWorker:
    last, samples = points[-1], whole(points)
    return {
        "hostname": last.hostname,
        "workerId": last.worker_id,
        "pid": last.pid,
        "avgEventLoopLagMs": round(samples.average("loop_lag_ms"), 2),
        "maxEventLoopLagMs": round(samples.greatest("loop_lag_ms"), 2),
        "freeSlots": int(samples.last("pool_idle")),
        "dbConnections": int(samples.last("pool_size")),
        "jobQueueSize": int(samples.last("pool_waiting")),
        "messagesProcessed": sum(point.work.get("ack_success", 0) for point in points),
    }


def write_status_queues(asked: QueueQuery, queues: Sequence[QueueStatus], total: int) -> bytes:
    return msgspec.json.encode(
        StatusQueueList(
            {
                "queues": [queue_entry(queue) for queue in queues],
                "pagination": {"limit": asked.limit, "offset": asked.offset, "total": total},
            }
        )
    )


def write_status_queue(queue: QueueStatus, partitions: Sequence[PartitionStatus]) -> bytes:
    options = queue.queue.options
    totals = six(queue.six)
    return msgspec.json.encode(
        StatusQueueAnswer(
            {
                "queue": {
                    "id": str(queue.queue.queue_id),
                    "name": queue.queue.name,
                    "namespace": queue.queue.namespace,
                    "task": queue.queue.task,
                    "priority": options.priority,
                    "createdAt": format_time(queue.created_at),
                    "config": {
                        "leaseTime": options.lease_seconds,
                        "retryLimit": options.retry_limit,
                        "retryDelay": options.retry_delay_ms,
                        "ttl": options.ttl_seconds,
                        "maxQueueSize": options.max_size,
                        "deadLetterQueue": options.dead_letter_queue,
                    },
                },
                "partitions": [
                    {
                        "id": str(partition.partition_id),
                        "name": partition.name,
                        "createdAt": format_time(partition.created_at),
                        "messages": six(partition.six),
                        "stats": six(partition.six),
                        "cursor": {"totalConsumed": partition.consumed, "batchesConsumed": 0},
                        "lastActivity": time_or_null(partition.active_at),
                        "oldestMessage": time_or_null(partition.oldest_at),
                        "newestMessage": time_or_null(partition.newest_at),
                    }
                    for partition in partitions
                ],
                "totals": {"messages": totals, **totals},
            }
        )
    )


def write_status_analytics(interval: IntervalName, window: Window, points: Sequence[QueuePoint]) -> bytes:
    return msgspec.json.encode(
        StatusAnalytics(
            {
                "dataPoints": [
                    {"timestamp": format_time(point.at), "messages": point.tally.push_messages}
                    for point in reversed(points)
                ],
                "interval": interval,
                **time_range(window),
            }
        )
    )


def write_buffers(worker: int, spool: SpoolFigures, *, healthy: bool) -> bytes:
    buffers = Buffers(
        {
            "pending": spool.pending_messages,
            "failed": spool.quarantined_messages,
            "dbHealthy": healthy,
            "worker": worker,
        }
    )
    return msgspec.json.encode(buffers)


def write_refreshed(folded: int, overview: Mapping[str, int]) -> bytes:
    """Everything the contract names; the numbers are of what was brought up to date."""
    return msgspec.json.encode(
        Refreshed(
            {
                "partition": {"updated": 0},
                "queue": {"folded": folded},
                "namespace": {},
                "task": {},
                "system": dict(overview),
                "cleanup": {},
            }
        )
    )
