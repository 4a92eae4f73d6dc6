"""Queues, partitions, labels and the overview, as pages show them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Annotated, TypedDict

import msgspec
from msgspec import Meta

from queen.model.queue import Queue
from queen.model.status import Depth, LabelStatus, Overview, PartitionStatus, QueueStatus, Six
from queen.routes.wire.body import (
    INT32_MAX,
    TimeText,
    UuidText,
    format_time,
)
from queen.routes.wire.query import time_or_null as _time

MAX_QUEUES_PAGE = 10_000
MAX_PAGE = 1000


Offset = Annotated[int, Meta(ge=0, le=INT32_MAX)]
PageLimit = Annotated[int, Meta(ge=1, le=MAX_PAGE)]


class QueueQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which queues; what is not named does not matter."""

    name: str | None = msgspec.field(name="queue", default=None)
    namespace: str | None = None
    ns: Annotated[str | None, Meta(description="The same as namespace.")] = None
    task: str | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_QUEUES_PAGE)] = 1000
    offset: Offset = 0

    @property
    def wanted_namespace(self) -> str | None:
        return self.ns if self.namespace is None else self.namespace


class QueueStatusQuery(QueueQuery, frozen=True, kw_only=True):
    """The same for a page that shows fewer of them."""

    limit: Annotated[int, Meta(ge=1, le=MAX_QUEUES_PAGE)] = 100


class DepthQuery(msgspec.Struct, frozen=True, kw_only=True):
    """For whom something is pending; nobody named: for the slowest group."""

    group: str | None = None


class PartitionQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which partitions."""

    queue: str | None = None
    min_depth: Annotated[int, Meta(ge=0, le=INT32_MAX, description="With at least so many pending.")] = msgspec.field(
        name="minDepth", default=0
    )
    limit: PageLimit = 100


class ClearQuery(msgspec.Struct, frozen=True, kw_only=True):
    """What to empty; nothing named: all of the queue."""

    partition: str | None = None


class SixNumbers(TypedDict):
    """Messages. ``completed`` is what the slowest group has consumed; total = pending + processing + completed."""

    total: int
    pending: int
    processing: int
    completed: int
    failed: int
    deadLetter: int


class ThreeNumbers(TypedDict):
    """Messages of a queue."""

    total: int
    pending: int
    processing: int


class TwoNumbers(TypedDict):
    """Messages of several queues."""

    total: int
    pending: int


class QueueEntry(TypedDict):
    """A queue in a list."""

    id: UuidText
    name: str
    namespace: str
    task: str
    createdAt: TimeText
    partitions: int
    messages: ThreeNumbers


class QueueList(TypedDict):
    """Queues, newest first."""

    queues: list[QueueEntry]


class PartitionOfQueue(TypedDict):
    """A partition of a queue."""

    id: UuidText
    name: str
    createdAt: TimeText
    stats: SixNumbers
    oldestMessage: TimeText | None
    newestMessage: TimeText | None


class QueueDetail(TypedDict):
    """A queue with its partitions."""

    id: UuidText
    name: str
    namespace: str
    task: str
    createdAt: TimeText
    partitions: list[PartitionOfQueue]
    totals: SixNumbers


class PartitionDepth(TypedDict):
    """What is pending in a partition."""

    partition: str
    pending: int


class QueueDepth(TypedDict):
    """What is pending on a queue, for a group or for the slowest one."""

    queue: str
    group: str | None
    pending: int
    partitionsPending: int
    conflation: bool
    effectivePending: int
    partitions: list[PartitionDepth]


class PartitionEntry(TypedDict):
    """A partition in a list."""

    id: UuidText
    name: str
    queue: str
    namespace: str
    task: str
    queuePriority: int
    createdAt: TimeText
    depth: int
    processing: int
    total: int


class PartitionList(TypedDict):
    """Partitions."""

    partitions: list[PartitionEntry]


class NamespaceEntry(TypedDict):
    """The queues of a namespace."""

    namespace: str
    queues: int
    partitions: int
    messages: TwoNumbers


class NamespaceList(TypedDict):
    """Namespaces."""

    namespaces: list[NamespaceEntry]


class TaskEntry(TypedDict):
    """The queues of a task."""

    task: str
    queues: int
    partitions: int
    messages: TwoNumbers


class TaskList(TypedDict):
    """Tasks."""

    tasks: list[TaskEntry]


class Spread(TypedDict):
    """Of several numbers."""

    avg: float
    median: float
    min: float
    max: float


class Lag(TypedDict):
    """How far groups are behind, in seconds and in messages."""

    time: Spread
    offset: Spread


class Throughput(TypedDict):
    """Messages a second, lately."""

    ingestedPerSecond: float
    processedPerSecond: float


class OverviewAnswer(TypedDict):
    """The whole server in numbers."""

    queues: int
    partitions: int
    namespaces: int
    tasks: int
    messages: SixNumbers
    lag: Lag
    throughput: Throughput
    timestamp: TimeText
    statsAge: float


class Cleared(TypedDict):
    """What was removed of a queue."""

    cleared: bool
    count: int
    queue: str
    partition: str


class DeletedPartition(TypedDict):
    """A partition that is not there any more. ``count``: the messages that went with it."""

    deleted: bool
    queue: str
    partition: str
    existed: bool
    count: int


def six(numbers: Six) -> SixNumbers:
    return {
        "total": numbers.total,
        "pending": numbers.pending,
        "processing": numbers.processing,
        "completed": numbers.completed,
        "failed": numbers.failed,
        "deadLetter": numbers.dead_letter,
    }


def queue_entry(status: QueueStatus) -> QueueEntry:
    return {
        "id": str(status.queue.queue_id),
        "name": status.queue.name,
        "namespace": status.queue.namespace,
        "task": status.queue.task,
        "createdAt": format_time(status.created_at),
        "partitions": status.count.partitions,
        "messages": {
            "total": status.six.total,
            "pending": status.six.pending,
            "processing": status.six.processing,
        },
    }


def write_queues(queues: Sequence[QueueStatus]) -> bytes:
    return msgspec.json.encode(QueueList({"queues": [queue_entry(queue) for queue in queues]}))


def write_queue(queue: QueueStatus, partitions: Sequence[PartitionStatus]) -> bytes:
    return msgspec.json.encode(
        QueueDetail(
            {
                "id": str(queue.queue.queue_id),
                "name": queue.queue.name,
                "namespace": queue.queue.namespace,
                "task": queue.queue.task,
                "createdAt": format_time(queue.created_at),
                "partitions": [
                    {
                        "id": str(partition.partition_id),
                        "name": partition.name,
                        "createdAt": format_time(partition.created_at),
                        "stats": six(partition.six),
                        "oldestMessage": _time(partition.oldest_at),
                        "newestMessage": _time(partition.newest_at),
                    }
                    for partition in partitions
                ],
                "totals": six(queue.six),
            }
        )
    )


def write_depth(queue: str, group: str | None, depth: Depth) -> bytes:
    return msgspec.json.encode(
        QueueDepth(
            {
                "queue": queue,
                "group": group,
                "pending": depth.pending,
                "partitionsPending": depth.partitions_pending,
                "conflation": False,
                "effectivePending": depth.pending,
                "partitions": [{"partition": name, "pending": messages} for name, messages in depth.partitions],
            }
        )
    )


def write_partitions(found: Sequence[tuple[Queue, PartitionStatus]]) -> bytes:
    return msgspec.json.encode(
        PartitionList(
            {
                "partitions": [
                    {
                        "id": str(partition.partition_id),
                        "name": partition.name,
                        "queue": queue.name,
                        "namespace": queue.namespace,
                        "task": queue.task,
                        "queuePriority": queue.options.priority,
                        "createdAt": format_time(partition.created_at),
                        "depth": partition.six.pending,
                        "processing": partition.six.processing,
                        "total": partition.six.total,
                    }
                    for queue, partition in found
                ]
            }
        )
    )


def write_namespaces(labels: Sequence[LabelStatus]) -> bytes:
    found = _grouped(labels, lambda label: label.namespace)
    return msgspec.json.encode(NamespaceList(namespaces=[{"namespace": name, **numbers} for name, numbers in found]))


def write_tasks(labels: Sequence[LabelStatus]) -> bytes:
    found = _grouped(labels, lambda label: label.task)
    return msgspec.json.encode(TaskList(tasks=[{"task": name, **numbers} for name, numbers in found]))


class _Numbers(TypedDict):
    queues: int
    partitions: int
    messages: TwoNumbers


def _grouped(labels: Sequence[LabelStatus], name_of: Callable[[LabelStatus], str]) -> list[tuple[str, _Numbers]]:
    names: dict[str, list[LabelStatus]] = {}
    for label in labels:
        names.setdefault(name_of(label), []).append(label)
    return [
        (
            name,
            {
                "queues": sum(label.queues for label in names[name]),
                "partitions": sum(label.partitions for label in names[name]),
                "messages": {
                    "total": sum(label.six.total for label in names[name]),
                    "pending": sum(label.six.pending for label in names[name]),
                },
            },
        )
        for name in sorted(names)
    ]


def write_overview(
    overview: Overview, ingested_per_second: float, processed_per_second: float, stats_age_seconds: float
) -> bytes:
    labels = overview.labels
    return msgspec.json.encode(
        OverviewAnswer(
            {
                "queues": sum(label.queues for label in labels),
                "partitions": sum(label.partitions for label in labels),
                "namespaces": len({label.namespace for label in labels if label.namespace}),
                "tasks": len({label.task for label in labels if label.task}),
                "messages": six(overview.six),
                "lag": {"time": _spread(overview.lag_seconds), "offset": _spread(overview.lag_messages)},
                "throughput": {
                    "ingestedPerSecond": ingested_per_second,
                    "processedPerSecond": processed_per_second,
                },
                "timestamp": format_time(overview.now),
                "statsAge": stats_age_seconds,
            }
        )
    )


def _spread(values: Sequence[float]) -> Spread:
    if not values:
        return {"avg": 0, "median": 0, "min": 0, "max": 0}
    return {
        "avg": round(statistics.fmean(values), 3),
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def write_deleted_partition(queue: str, partition: str, count: int | None) -> bytes:
    return msgspec.json.encode(
        DeletedPartition(
            {
                "deleted": True,
                "queue": queue,
                "partition": partition,
                "existed": count is not None,
                "count": count or 0,
            }
        )
    )


def write_cleared(queue: str, partition: str | None, count: int) -> bytes:
    return msgspec.json.encode(
        Cleared(
            {"cleared": True, "count": count, "queue": queue, "partition": "all" if partition is None else partition}
        )
    )
