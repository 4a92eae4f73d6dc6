"""Series for dashboards: workers, queues, lag, retention, and what PostgreSQL says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, TypedDict

import msgspec

from queen.model.metrics import ParkedPoint, Process, QueuePoint, Samples, Tally, Window, WorkerPoint
from queen.routes.wire.body import (
    TimeText,
    format_time,
)
from queen.routes.wire.status import Moment, by_worker, moments_of, whole
from queen.routes.wire.window import TimeRange, time_range


def _head(window: Window, points: int) -> SeriesHead:
    return {"timeRange": time_range(window), "bucketMinutes": window.minutes, "pointCount": points}


class SeriesHead(TypedDict):
    """The window of a series and the length of its steps."""

    timeRange: TimeRange
    bucketMinutes: int
    pointCount: int


class WorkPoint(TypedDict):
    """What all workers did and were in one step of time."""

    timestamp: TimeText
    pushMessages: int
    popMessages: int
    ackMessages: int
    pushRequests: int
    popRequests: int
    ackRequests: int
    jobsDone: int
    pushPerSecond: float
    popPerSecond: float
    ackPerSecond: float
    avgEventLoopLagMs: float
    maxEventLoopLagMs: float
    avgFreeSlots: float
    minFreeSlots: int
    dbConnections: int
    avgJobQueueSize: float
    maxJobQueueSize: int
    backoffSize: int
    avgLagMs: float
    maxLagMs: int
    lagCount: int
    dbErrors: int
    ackSuccess: int
    ackFailed: int
    dlqCount: int


class WorkerEntry(TypedDict):
    """A worker over the whole window."""

    hostname: str
    workerId: str
    pid: int
    lastSeen: TimeText
    live: bool
    avgEventLoopLagMs: float
    maxEventLoopLagMs: float
    freeSlots: int
    dbConnections: int
    jobQueueSize: int
    jobsDone: int
    pushMessages: int
    popMessages: int
    ackMessages: int


class QueueLagEntry(TypedDict):
    """How long messages of a queue lay before they were delivered."""

    queueName: str
    popCount: int
    avgLagMs: float
    maxLagMs: int


class WorkSummary(TypedDict):
    """Everything in the window."""

    totalPushMessages: int
    totalPopMessages: int
    totalAckMessages: int
    totalAckFailed: int
    totalDlqMessages: int
    pendingMessages: int


class WorkerMetrics(SeriesHead):
    """What workers did; steps of time newest first."""

    timeSeries: list[WorkPoint]
    workers: list[WorkerEntry]
    queues: list[QueueLagEntry]
    summary: WorkSummary


class Statistic(TypedDict):
    """A measurement in one step of time."""

    avg: float
    min: float
    max: float
    last: float


class CpuGauges(TypedDict):
    """CPU, microseconds a second."""

    user_us: Statistic
    system_us: Statistic


class MemoryGauges(TypedDict):
    """Memory."""

    rss_bytes: Statistic
    virtual_bytes: Statistic


class DatabaseGauges(TypedDict):
    """Connections to PostgreSQL."""

    pool_size: Statistic
    pool_idle: Statistic
    pool_active: Statistic


class PoolGauges(TypedDict):
    """Tasks, and what waits for one."""

    pool_size: Statistic
    queue_size: Statistic


class ThreadpoolGauges(TypedDict):
    """Tasks by kind."""

    db: PoolGauges
    system: PoolGauges


class RegistryGauges(TypedDict):
    """Pops that wait for a message."""

    response: Statistic


class SharedNothing(TypedDict):
    """Servers share nothing beside the database."""

    enabled: bool


class SystemGauges(TypedDict):
    """What a worker measured."""

    cpu: CpuGauges
    memory: MemoryGauges
    database: DatabaseGauges
    threadpool: ThreadpoolGauges
    registries: RegistryGauges
    shared_state: SharedNothing


class SystemPoint(TypedDict):
    """A worker in one step of time."""

    timestamp: TimeText
    sampleCount: int
    metrics: SystemGauges


class Replica(TypedDict):
    """A worker and its measurements."""

    hostname: str
    port: int
    workerId: str
    timeSeries: list[SystemPoint]


class SystemMetrics(SeriesHead):
    """What workers measured."""

    replicaCount: int
    replicas: list[Replica]


class QueueLagPoint(QueueLagEntry):
    """The same in one step of time."""

    bucketTime: TimeText


class QueueOpsPoint(TypedDict):
    """What was done on a queue in one step of time."""

    bucket: TimeText
    queueName: str
    pushRequests: int
    pushMessages: int
    popMessages: int
    popEmpty: int
    ackRequests: int
    ackSuccess: int
    ackFailed: int
    transactions: int
    partitionsCreated: int
    partitionsDeleted: int
    partitionCount: int
    avgLagMs: float
    maxLagMs: int
    pushPerSecond: float
    popPerSecond: float
    ackPerSecond: float
    emptyPerSecond: float
    parkedCount: int


class QueueOps(TypedDict):
    """What was done on queues."""

    timeRange: TimeRange
    bucketMinutes: int
    series: list[QueueOpsPoint]
    queues: list[str]


class ParkedEntry(TypedDict):
    """Pops that waited on a queue at a worker in one step of time."""

    bucket: TimeText
    queueName: str
    hostname: str
    workerId: str
    parkedCount: int


class ReplicaName(TypedDict):
    """A worker."""

    hostname: str
    workerId: str


class Parked(TypedDict):
    """Pops that waited."""

    timeRange: TimeRange
    bucketMinutes: int
    series: list[ParkedEntry]
    replicas: list[ReplicaName]


class RemovedCounts(TypedDict):
    """Messages that retention and eviction removed."""

    retentionMsgs: int
    completedRetentionMsgs: int
    evictionMsgs: int
    totalMsgs: int
    eventCount: int


class RemovedPoint(RemovedCounts):
    """The same in one step of time."""

    bucket: TimeText


class PostgresAnswer(TypedDict):
    """What PostgreSQL says of itself, by subject: beside these, rows with the names of their columns."""

    timestamp: TimeText
    bufferUsage: list[dict[str, Any]]


class Retention(TypedDict):
    """What retention and eviction removed."""

    timeRange: TimeRange
    bucketMinutes: int
    series: list[RemovedPoint]
    totals: RemovedCounts


def _moment(moment: Moment, window: Window) -> WorkPoint:
    tally, samples, seconds = moment.tally, moment.samples, window.minutes * 60
    return {
        "timestamp": format_time(moment.at),
        "pushMessages": tally.push_messages,
        "popMessages": tally.pop_messages,
        "ackMessages": tally.ack_success,
        "pushRequests": tally.push_requests,
        "popRequests": tally.pop_requests,
        "ackRequests": tally.ack_requests,
        "jobsDone": moment.work.get("jobs", 0),
        "pushPerSecond": round(tally.push_messages / seconds, 3),
        "popPerSecond": round(tally.pop_messages / seconds, 3),
        "ackPerSecond": round(tally.ack_success / seconds, 3),
        "avgEventLoopLagMs": round(samples.average("loop_lag_ms"), 2),
        "maxEventLoopLagMs": round(samples.greatest("loop_lag_ms"), 2),
        "avgFreeSlots": round(samples.average("pool_idle"), 1),
        "minFreeSlots": int(samples.least("pool_idle")),
        "dbConnections": int(sum(size for _, _, size in moment.pool.values())),
        "avgJobQueueSize": round(samples.average("pool_waiting"), 1),
        "maxJobQueueSize": int(samples.greatest("pool_waiting")),
        "backoffSize": 0,
        "avgLagMs": round(tally.average_lag_ms, 1),
        "maxLagMs": tally.lag_max_ms,
        "lagCount": tally.lag_count,
        "dbErrors": moment.work.get("db_errors", 0),
        "ackSuccess": tally.ack_success,
        "ackFailed": tally.ack_failed,
        "dlqCount": tally.dead_letters,
    }


def write_worker_metrics(
    window: Window,
    everything: Sequence[QueuePoint],
    queues: Sequence[QueuePoint],
    workers: Sequence[WorkerPoint],
    processes: Sequence[Process],
    pending: int,
) -> bytes:
    moments = moments_of(everything, workers)
    done = Tally()
    for point in everything:
        done.add(point.tally)
    seen = {(process.hostname, process.worker_id): process for process in processes}
    return msgspec.json.encode(
        WorkerMetrics(
            {
                **_head(window, len(moments)),
                "timeSeries": [_moment(moment, window) for moment in moments],
                "workers": [
                    {
                        "hostname": hostname,
                        "workerId": worker_id,
                        "pid": points[-1].pid,
                        "lastSeen": format_time(
                            seen[hostname, worker_id].seen_at if (hostname, worker_id) in seen else points[-1].at
                        ),
                        "live": (hostname, worker_id) in seen,
                        "avgEventLoopLagMs": round(whole(points).average("loop_lag_ms"), 2),
                        "maxEventLoopLagMs": round(whole(points).greatest("loop_lag_ms"), 2),
                        "freeSlots": int(points[-1].samples.last("pool_idle")),
                        "dbConnections": int(points[-1].samples.last("pool_size")),
                        "jobQueueSize": int(points[-1].samples.last("pool_waiting")),
                        "jobsDone": sum(point.work.get("jobs", 0) for point in points),
                        "pushMessages": sum(point.work.get("push_messages", 0) for point in points),
                        "popMessages": sum(point.work.get("pop_messages", 0) for point in points),
                        "ackMessages": sum(point.work.get("ack_success", 0) for point in points),
                    }
                    for (hostname, worker_id), points in by_worker(workers).items()
                ],
                "queues": [
                    {
                        "queueName": queue,
                        "popCount": tally.pop_messages,
                        "avgLagMs": round(tally.average_lag_ms, 1),
                        "maxLagMs": tally.lag_max_ms,
                    }
                    for queue, tally in _by_queue(queues).items()
                ],
                "summary": {
                    "totalPushMessages": done.push_messages,
                    "totalPopMessages": done.pop_messages,
                    "totalAckMessages": done.ack_success,
                    "totalAckFailed": done.ack_failed,
                    "totalDlqMessages": done.dead_letters,
                    "pendingMessages": pending,
                },
            }
        )
    )


def _by_queue(points: Sequence[QueuePoint]) -> dict[str, Tally]:
    queues: dict[str, Tally] = {}
    for point in points:
        queues.setdefault(point.queue or "", Tally()).add(point.tally)
    return dict(sorted(queues.items()))


_NONE: Final[Statistic] = {"avg": 0, "min": 0, "max": 0, "last": 0}


def _spread(samples: Samples, gauge: str) -> Statistic:
    return {
        "avg": round(samples.average(gauge), 3),
        "min": round(samples.least(gauge), 3),
        "max": round(samples.greatest(gauge), 3),
        "last": round(samples.last(gauge), 3),
    }


def write_system_metrics(window: Window, workers: Sequence[WorkerPoint], port: int) -> bytes:
    replicas = by_worker(workers)
    return msgspec.json.encode(
        SystemMetrics(
            {
                **_head(window, len({point.at for point in workers})),
                "replicaCount": len(replicas),
                "replicas": [
                    {
                        "hostname": hostname,
                        "port": port,
                        "workerId": worker_id,
                        "timeSeries": [_system_point(point) for point in points],
                    }
                    for (hostname, worker_id), points in replicas.items()
                ],
            }
        )
    )


def _system_point(point: WorkerPoint) -> SystemPoint:
    samples = point.samples
    return {
        "timestamp": format_time(point.at),
        "sampleCount": samples.count,
        "metrics": {
            "cpu": {"user_us": _spread(samples, "cpu_user_us"), "system_us": _spread(samples, "cpu_system_us")},
            "memory": {
                "rss_bytes": _spread(samples, "rss_bytes"),
                "virtual_bytes": _spread(samples, "virtual_bytes"),
            },
            "database": {
                "pool_size": _spread(samples, "pool_size"),
                "pool_idle": _spread(samples, "pool_idle"),
                "pool_active": _spread(samples, "pool_active"),
            },
            "threadpool": {
                "db": {"pool_size": _spread(samples, "pool_size"), "queue_size": _spread(samples, "pool_waiting")},
                "system": {"pool_size": _NONE, "queue_size": _NONE},
            },
            "registries": {"response": _spread(samples, "parked")},
            "shared_state": {"enabled": False},
        },
    }


def write_queue_lag(points: Sequence[QueuePoint]) -> bytes:
    return msgspec.json.encode(
        list[QueueLagPoint](
            [
                {
                    "queueName": point.queue or "",
                    "popCount": point.tally.pop_messages,
                    "avgLagMs": round(point.tally.average_lag_ms, 1),
                    "maxLagMs": point.tally.lag_max_ms,
                    "bucketTime": format_time(point.at),
                }
                for point in points
                if point.tally.lag_count
            ]
        )
    )


def write_queue_ops(
    window: Window, points: Sequence[QueuePoint], parked: Sequence[ParkedPoint], partitions: Mapping[str, int]
) -> bytes:
    seconds = window.minutes * 60
    waiting: dict[tuple[datetime, str], int] = {}
    for pops in parked:
        waiting[pops.at, pops.queue] = waiting.get((pops.at, pops.queue), 0) + pops.parked
    tallies = {(point.at, point.queue or ""): point.tally for point in points}
    keys = sorted({*tallies, *waiting}, key=lambda key: (-key[0].timestamp(), key[1]))
    series: list[QueueOpsPoint] = []
    for at, queue in keys:
        tally = tallies.get((at, queue)) or Tally()
        series.append(
            {
                "bucket": format_time(at),
                "queueName": queue,
                "pushRequests": tally.push_requests,
                "pushMessages": tally.push_messages,
                "popMessages": tally.pop_messages,
                "popEmpty": tally.pop_empty,
                "ackRequests": tally.ack_requests,
                "ackSuccess": tally.ack_success,
                "ackFailed": tally.ack_failed,
                "transactions": tally.transactions,
                "partitionsCreated": tally.partitions_created,
                "partitionsDeleted": tally.partitions_deleted,
                "partitionCount": partitions.get(queue, 0),
                "avgLagMs": round(tally.average_lag_ms, 1),
                "maxLagMs": tally.lag_max_ms,
                "pushPerSecond": round(tally.push_messages / seconds, 3),
                "popPerSecond": round(tally.pop_messages / seconds, 3),
                "ackPerSecond": round(tally.ack_success / seconds, 3),
                "emptyPerSecond": round(tally.pop_empty / seconds, 3),
                "parkedCount": waiting.get((at, queue), 0),
            }
        )
    return msgspec.json.encode(
        QueueOps(
            {
                "timeRange": time_range(window),
                "bucketMinutes": window.minutes,
                "series": series,
                "queues": sorted({queue for _, queue in keys}),
            }
        )
    )


def write_parked(window: Window, parked: Sequence[ParkedPoint]) -> bytes:
    replicas = sorted({(pops.hostname, pops.worker_id) for pops in parked})
    return msgspec.json.encode(
        Parked(
            {
                "timeRange": time_range(window),
                "bucketMinutes": window.minutes,
                "series": [
                    {
                        "bucket": format_time(pops.at),
                        "queueName": pops.queue,
                        "hostname": pops.hostname,
                        "workerId": pops.worker_id,
                        "parkedCount": pops.parked,
                    }
                    for pops in parked
                ],
                "replicas": [{"hostname": hostname, "workerId": worker_id} for hostname, worker_id in replicas],
            }
        )
    )


def write_retention(window: Window, points: Sequence[QueuePoint]) -> bytes:
    total = Tally()
    for point in points:
        total.add(point.tally)
    return msgspec.json.encode(
        Retention(
            {
                "timeRange": time_range(window),
                "bucketMinutes": window.minutes,
                "series": [{"bucket": format_time(point.at), **_removed(point.tally)} for point in points],
                "totals": _removed(total),
            }
        )
    )


def _removed(tally: Tally) -> RemovedCounts:
    return {
        "retentionMsgs": tally.retention_messages,
        "completedRetentionMsgs": tally.completed_messages,
        "evictionMsgs": tally.eviction_messages,
        "totalMsgs": tally.retention_messages + tally.completed_messages + tally.eviction_messages,
        "eventCount": tally.expiries,
    }


_ONE_ROW: Final = ("database", "databaseCache", "cacheSummary")


def write_postgres(now: datetime, subjects: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    answer: dict[str, object] = {"timestamp": format_time(now), "bufferUsage": []}
    for subject, rows in subjects.items():
        shown = [{name: _value(value) for name, value in row.items()} for row in rows]
        answer[subject] = (shown[0] if shown else {}) if subject in _ONE_ROW else shown
    return msgspec.json.encode(answer)


def _value(value: object) -> object:
    if isinstance(value, datetime):
        return format_time(value)
    return float(value) if isinstance(value, Decimal) else value
