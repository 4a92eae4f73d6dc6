"""Consumer groups: lists, positions, moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Final, Literal, NotRequired, TypedDict

import msgspec
from msgspec import Meta, field

from queen.errors import InvalidRequest
from queen.model.status import GroupPosition, GroupStatus
from queen.routes.wire.body import (
    INT32_MAX,
    TimeText,
    UuidText,
    body_fields,
    decode_body,
    format_time,
    is_null,
    is_text,
    scalar_of,
    text_of,
)
from queen.routes.wire.query import read_time, time_or_null
from queen.storage.groups import Moved, Target

LAGGING_SECONDS: Final = 300
"""A group further behind than this is called lagging (contract/http-admin.md §5)."""


class DeletionQuery(msgspec.Struct, frozen=True, kw_only=True):
    """What of a group is to go. The one switch whose default is on."""

    metadata: Annotated[bool, Meta(description="Also where the group starts, not only how far it is.")] = field(
        name="deleteMetadata", default=True
    )


class LaggingQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which partitions count as lagging."""

    min_lag_seconds: Annotated[int, Meta(ge=0, le=INT32_MAX)] = field(name="minLagSeconds", default=3600)


class SubscriptionBody(msgspec.Struct, frozen=True, kw_only=True):
    """Where a group starts the next time it starts over."""

    at: TimeText = field(name="subscriptionTimestamp")


class SeekBody(msgspec.Struct, frozen=True, kw_only=True):
    """Where to move a group: to the end, or else behind what was created up to a time, or else to an offset."""

    to_end: bool | None = field(name="toEnd", default=None)
    timestamp: Annotated[TimeText | None, Meta(description="The text now means the end.")] = None
    offset: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None


_SUBSCRIPTION: Final = msgspec.json.Decoder(SubscriptionBody)
_SEEK: Final = msgspec.json.Decoder(SeekBody)


_NO_SUBSCRIPTION: Final = "Missing subscriptionTimestamp in request body"
_NO_TARGET: Final = "Must specify either 'toEnd': true or 'timestamp'"


def read_subscription(body: bytes) -> datetime:
    text = decode_body(body, _SUBSCRIPTION, _refuse_subscription).at if body else ""
    if not text:
        raise InvalidRequest(_NO_SUBSCRIPTION)
    return _time(text, "subscriptionTimestamp")


def _refuse_subscription(body: bytes) -> SubscriptionBody:
    body_fields(body)
    raise InvalidRequest(_NO_SUBSCRIPTION)


def read_seek(body: bytes) -> Target:
    """Where to move the group on its queue."""
    target = _read_target(body) if body else None
    if target is None:
        raise InvalidRequest(_NO_TARGET)
    return target


def read_partition_seek(body: bytes) -> Target:
    """Where to move the group on one partition: the body may be absent, and then it is the end."""
    return (_read_target(body) if body else None) or Target("end")


def _read_target(body: bytes) -> Target | None:
    asked = decode_body(body, _SEEK, _read_loose_seek)
    if asked.to_end or asked.timestamp == "now":
        return Target("end")
    if asked.timestamp:
        return Target("time", at=_time(asked.timestamp, "timestamp"))
    return None if asked.offset is None else Target("offset", offset=asked.offset)


def _read_loose_seek(body: bytes) -> SeekBody:
    """A seek of which a part is not what it should be: of several that are given, the first that can be used counts."""
    fields = body_fields(body)
    if scalar_of(fields.get("toEnd")) is True:
        return SeekBody(to_end=True)
    if is_text(fields.get("timestamp")):
        return SeekBody(timestamp=text_of(fields, "timestamp"))
    if is_null(fields.get("offset")):
        return SeekBody()
    offset = scalar_of(fields.get("offset"))
    if not isinstance(offset, int) or isinstance(offset, bool) or not 0 <= offset < 2**63:
        raise InvalidRequest("offset must be an integer, 0 or more")
    return SeekBody(offset=offset)


def _time(text: str, name: str) -> datetime:
    moment = read_time(text)
    if moment is None:
        raise InvalidRequest(f"{name} must be an ISO 8601 time")
    return moment


class GroupEntry(TypedDict):
    """A consumer group on one queue. Lagging: more than 300 s behind; dead: behind, and nobody consumes."""

    name: str
    queueName: str
    topics: list[str]
    members: int
    partitionsWithLag: int
    totalLag: int
    maxTimeLag: float
    state: Literal["Stable", "Lagging", "Dead"]
    subscriptionMode: str | None
    subscriptionTimestamp: TimeText | None
    subscriptionCreatedAt: TimeText | None


class LaggingEntry(TypedDict):
    """A partition in which a group is behind."""

    consumer_group: str
    queue_name: str
    partition_name: str
    partition_id: UuidText
    worker_id: str | None
    offset_lag: int
    time_lag_seconds: int
    lag_hours: float
    oldest_unconsumed_at: TimeText | None
    last_consumed_at: TimeText | None


class PositionEntry(TypedDict):
    """Where a group is in a partition."""

    partition: str
    partitionId: UuidText
    workerId: str | None
    lastConsumedAt: TimeText | None
    totalConsumed: int
    offsetLag: int
    timeLagSeconds: int
    leaseActive: bool


class Positions(TypedDict):
    """Where a group is on a queue."""

    partitions: list[PositionEntry]


class DeletedGroup(TypedDict):
    """What went with a group."""

    success: bool
    consumerGroup: str
    queueName: NotRequired[str]
    deletedPartitions: int
    metadataDeleted: bool


class Subscribed(TypedDict):
    """Where a group starts from now on."""

    success: bool
    consumerGroup: str
    newTimestamp: TimeText
    rowsUpdated: int


class MovedGroup(TypedDict):
    """Where a group was moved."""

    success: bool
    consumerGroup: str
    queueName: str
    seekToEnd: bool
    targetTimestamp: TimeText | None
    targetOffset: int | None
    partitionsUpdated: int


class MovedPartition(TypedDict):
    """Whether a group was moved in a partition, and to which message."""

    success: bool
    consumerGroup: str
    queueName: str
    partitionName: str
    updated: bool
    cursorMovedTo: UuidText | None


def _state(group: GroupStatus) -> Literal["Stable", "Lagging", "Dead"]:
    if group.ahead and not group.members:
        return "Dead"
    return "Lagging" if group.lag_seconds > LAGGING_SECONDS else "Stable"


def write_groups(groups: Sequence[GroupStatus]) -> bytes:
    return msgspec.json.encode(
        list[GroupEntry](
            [
                {
                    "name": group.name,
                    "queueName": group.queue,
                    "topics": [group.queue],
                    "members": group.members,
                    "partitionsWithLag": group.lag.partitions,
                    "totalLag": group.ahead,
                    "maxTimeLag": round(group.lag_seconds, 3),
                    "state": _state(group),
                    "subscriptionMode": group.mode,
                    "subscriptionTimestamp": time_or_null(group.start_at),
                    "subscriptionCreatedAt": format_time(group.created_at),
                }
                for group in groups
            ]
        )
    )


def write_lagging(positions: Sequence[GroupPosition]) -> bytes:
    return msgspec.json.encode(
        list[LaggingEntry](
            [
                {
                    "consumer_group": position.group,
                    "queue_name": position.queue,
                    "partition_name": position.partition,
                    "partition_id": str(position.partition_id),
                    "worker_id": _worker(position),
                    "offset_lag": position.ahead,
                    "time_lag_seconds": int(position.lag_seconds),
                    "lag_hours": round(position.lag_seconds / 3600, 2),
                    "oldest_unconsumed_at": time_or_null(position.oldest_at),
                    "last_consumed_at": time_or_null(position.consumed_at),
                }
                for position in positions
            ]
        )
    )


def _worker(position: GroupPosition) -> str | None:
    """Who has the partition: consumers have no name, their lease does."""
    return None if position.lease_id is None else str(position.lease_id)


def write_positions(queues: Mapping[str, Sequence[GroupPosition]]) -> bytes:
    return msgspec.json.encode(
        dict[str, Positions](
            {
                queue: {
                    "partitions": [
                        {
                            "partition": position.partition,
                            "partitionId": str(position.partition_id),
                            "workerId": _worker(position),
                            "lastConsumedAt": time_or_null(position.consumed_at),
                            "totalConsumed": position.committed,
                            "offsetLag": position.ahead,
                            "timeLagSeconds": int(position.lag_seconds),
                            "leaseActive": position.lease_id is not None,
                        }
                        for position in positions
                    ]
                }
                for queue, positions in queues.items()
            }
        )
    )


def write_deleted_group(group: str, queue: str | None, partitions: int, *, metadata: bool) -> bytes:
    answer: DeletedGroup = {
        "success": True,
        "consumerGroup": group,
        "deletedPartitions": partitions,
        "metadataDeleted": metadata,
    }
    if queue is not None:
        answer["queueName"] = queue
    return msgspec.json.encode(answer)


def write_subscribed(group: str, at: datetime, rows: int) -> bytes:
    return msgspec.json.encode(
        Subscribed(success=True, consumerGroup=group, newTimestamp=format_time(at), rowsUpdated=rows)
    )


def write_moved(group: str, queue: str, target: Target, moved: Moved) -> bytes:
    return msgspec.json.encode(
        MovedGroup(
            {
                "success": True,
                "consumerGroup": group,
                "queueName": queue,
                "seekToEnd": target.to == "end",
                "targetTimestamp": time_or_null(target.at),
                "targetOffset": target.offset,
                "partitionsUpdated": moved.cursors,
            }
        )
    )


def write_moved_partition(group: str, queue: str, partition: str, moved: Moved) -> bytes:
    return msgspec.json.encode(
        MovedPartition(
            {
                "success": True,
                "consumerGroup": group,
                "queueName": queue,
                "partitionName": partition,
                "updated": moved.cursors > 0,
                "cursorMovedTo": None if moved.message_id is None else str(moved.message_id),
            }
        )
    )
