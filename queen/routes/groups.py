"""Routes of consumer groups. An unknown group or queue is no error: nothing of it is deleted or moved."""

from __future__ import annotations

from typing import Final

from queen.routes.call import Answer, Call, Context
from queen.routes.wire.body import check_name
from queen.routes.wire.groups import (
    DeletionQuery,
    LaggingQuery,
    read_partition_seek,
    read_seek,
    read_subscription,
    write_deleted_group,
    write_groups,
    write_lagging,
    write_moved,
    write_moved_partition,
    write_positions,
    write_subscribed,
)
from queen.routes.wire.query import read_query

MAX_LAGGING: Final = 1000
"""Partitions that the list of lagging ones shows; the worst are shown first."""


async def list_groups(context: Context, call: Call) -> Answer:
    return Answer(200, write_groups(await context.engine.admin.groups()))


async def list_lagging(context: Context, call: Call) -> Answer:
    min_lag_seconds = read_query(call.query, LaggingQuery).min_lag_seconds
    return Answer(200, write_lagging(await context.engine.admin.lagging(min_lag_seconds, MAX_LAGGING)))


async def show_group(context: Context, call: Call) -> Answer:
    group = _name(call, "group")
    return Answer(200, write_positions(await context.engine.admin.positions(group)))


async def delete_group(context: Context, call: Call) -> Answer:
    """Forget a group, on one queue or on all; or, keeping its metadata, only how far it has come."""
    group = _name(call, "group")
    queue = _name(call, "queue") if "queue" in call.parameters else None
    metadata = read_query(call.query, DeletionQuery).metadata
    if metadata:
        partitions = await context.engine.admin.forget_group(group, queue)
    else:
        partitions = await context.engine.admin.restart_group(group, queue)
    call.facts["partitions"] = partitions
    return Answer(200, write_deleted_group(group, queue, partitions, metadata=metadata))


async def change_subscription(context: Context, call: Call) -> Answer:
    group = _name(call, "group")
    at = read_subscription(call.body)
    return Answer(200, write_subscribed(group, at, await context.engine.admin.subscribe_from(group, at)))


async def seek(context: Context, call: Call) -> Answer:
    group, queue = _name(call, "group"), _name(call, "queue")
    target = read_seek(call.body)
    moved = await context.engine.admin.move_group(group, queue, target)
    call.facts["partitions"] = moved.cursors
    return Answer(200, write_moved(group, queue, target, moved))


async def seek_partition(context: Context, call: Call) -> Answer:
    group, queue, partition = _name(call, "group"), _name(call, "queue"), _name(call, "partition")
    target = read_partition_seek(call.body)
    moved = await context.engine.admin.move_group(group, queue, target, partition)
    return Answer(200, write_moved_partition(group, queue, partition, moved))


def _name(call: Call, what: str) -> str:
    name = check_name(call.parameters[what], what)
    call.facts[what] = name
    return name
