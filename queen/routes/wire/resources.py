"""Queues, partitions, labels and the overview, as pages show them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from queen.model.queue import Queue
from queen.model.status import Depth, LabelStatus, Overview, PartitionStatus, QueueStatus, Six
from queen.routes.wire.body import INT32_MAX, format_time
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


def six(numbers: Six) -> dict[str, int]:
    return {
        "total": numbers.total,
        "pending": numbers.pending,
        "processing": numbers.processing,
        "completed": numbers.completed,
        "failed": numbers.failed,
        "deadLetter": numbers.dead_letter,
    }


def queue_entry(status: QueueStatus) -> dict[str, object]:
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
    return msgspec.json.encode({"queues": [queue_entry(queue) for queue in queues]})


def write_queue(queue: QueueStatus, partitions: Sequence[PartitionStatus]) -> bytes:
    return msgspec.json.encode(
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


def write_depth(queue: str, group: str | None, depth: Depth) -> bytes:
    return msgspec.json.encode(
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


def write_partitions(found: Sequence[tuple[Queue, PartitionStatus]]) -> bytes:
    return msgspec.json.encode(
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


def write_namespaces(labels: Sequence[LabelStatus]) -> bytes:
    return msgspec.json.encode({"namespaces": _grouped(labels, "namespace", lambda label: label.namespace)})


def write_tasks(labels: Sequence[LabelStatus]) -> bytes:
    return msgspec.json.encode({"tasks": _grouped(labels, "task", lambda label: label.task)})


def _grouped(labels: Sequence[LabelStatus], what: str, name_of: Callable[[LabelStatus], str]) -> list[object]:
    names: dict[str, list[LabelStatus]] = {}
    for label in labels:
        names.setdefault(name_of(label), []).append(label)
    return [
        {
            what: name,
            "queues": sum(label.queues for label in names[name]),
            "partitions": sum(label.partitions for label in names[name]),
            "messages": {
                "total": sum(label.six.total for label in names[name]),
                "pending": sum(label.six.pending for label in names[name]),
            },
        }
        for name in sorted(names)
    ]


def write_overview(
    overview: Overview, ingested_per_second: float, processed_per_second: float, stats_age_seconds: float
) -> bytes:
    labels = overview.labels
    return msgspec.json.encode(
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


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"avg": 0, "median": 0, "min": 0, "max": 0}
    return {
        "avg": round(statistics.fmean(values), 3),
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def write_cleared(queue: str, partition: str | None, count: int) -> bytes:
    return msgspec.json.encode(
        {"cleared": True, "count": count, "queue": queue, "partition": "all" if partition is None else partition}
    )
