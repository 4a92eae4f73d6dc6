"""GET /api/v1/resources/…: what there is and how much is in it; DELETE queues/:q/clear: empty it."""

from __future__ import annotations

from queen.errors import NotFound
from queen.routes.call import Answer, Call, Context
from queen.routes.wire.body import check_name
from queen.routes.wire.query import read_query
from queen.routes.wire.resources import (
    ClearQuery,
    DepthQuery,
    PartitionQuery,
    QueueQuery,
    write_cleared,
    write_deleted_partition,
    write_depth,
    write_namespaces,
    write_overview,
    write_partitions,
    write_queue,
    write_queues,
    write_tasks,
)


async def list_queues(context: Context, call: Call) -> Answer:
    asked = read_query(call.query, QueueQuery)
    queues = await context.engine.admin.queues(
        asked.name, asked.wanted_namespace, asked.task, asked.limit, asked.offset
    )
    return Answer(200, write_queues(queues))


async def show_queue(context: Context, call: Call) -> Answer:
    name = _queue(call)
    found = await context.engine.admin.queue(name)
    if found is None:
        raise NotFound("Queue not found")
    return Answer(200, write_queue(*found))


async def show_depth(context: Context, call: Call) -> Answer:
    name = _queue(call)
    group = read_query(call.query, DepthQuery).group or None
    depth = await context.engine.admin.depth(name, group)
    if depth is None:
        raise NotFound("Queue not found")
    return Answer(200, write_depth(name, group, depth))


async def list_partitions(context: Context, call: Call) -> Answer:
    asked = read_query(call.query, PartitionQuery)
    found = await context.engine.admin.partitions(asked.queue, asked.min_depth, asked.limit)
    return Answer(200, write_partitions(found))


async def list_namespaces(context: Context, call: Call) -> Answer:
    return Answer(200, write_namespaces(await context.engine.admin.labels()))


async def list_tasks(context: Context, call: Call) -> Answer:
    return Answer(200, write_tasks(await context.engine.admin.labels()))


async def show_overview(context: Context, call: Call) -> Answer:
    return Answer(200, write_overview(*await context.engine.admin.overview()))


async def clear(context: Context, call: Call) -> Answer:
    name = _queue(call)
    partition = read_query(call.query, ClearQuery).partition
    count = await context.engine.admin.clear(name, partition)
    if count is None:
        raise NotFound("Queue not found")
    call.facts["messages"] = count
    return Answer(200, write_cleared(name, partition, count))


async def delete_partition(context: Context, call: Call) -> Answer:
    """One that is missing is deleted already."""
    name = _queue(call)
    partition = check_name(call.parameters["partition"], "partition")
    count = await context.engine.admin.delete_partition(name, partition)
    call.facts["partition"], call.facts["messages"] = partition, count or 0
    return Answer(200, write_deleted_partition(name, partition, count))


def _queue(call: Call) -> str:
    name = check_name(call.parameters["queue"], "queue")
    call.facts["queue"] = name
    return name
