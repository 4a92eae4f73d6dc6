"""GET /api/v1/status/…, and POST stats/refresh."""

from __future__ import annotations

import msgspec

from queen.errors import NotFound
from queen.routes.call import Answer, Call, Context
from queen.routes.health import is_connected, worker_number
from queen.routes.wire.body import check_name
from queen.routes.wire.messages import read_queue_messages_query, write_short_messages
from queen.routes.wire.query import read_query
from queen.routes.wire.resources import QueueStatusQuery
from queen.routes.wire.status import (
    Status,
    write_buffers,
    write_refreshed,
    write_status,
    write_status_analytics,
    write_status_queue,
    write_status_queues,
)
from queen.routes.wire.window import read_interval, read_window

MAX_QUEUES = 1000
"""Queues that the status page names, the newest."""


async def show_status(context: Context, call: Call) -> Answer:
    admin, window = context.engine.admin, read_window(call.query)
    overview, *_ = await admin.overview()
    status = Status(
        window=window,
        everything=await admin.everything(window),
        workers=await admin.workers(window),
        queues=await admin.queues(None, None, None, MAX_QUEUES, 0),
        overview=overview,
        leases=await admin.leases(),
        dead_letters=await admin.dead_letter_summary(),
    )
    return Answer(200, write_status(status))


async def list_queues(context: Context, call: Call) -> Answer:
    asked = read_query(call.query, QueueStatusQuery)
    admin, namespace = context.engine.admin, asked.wanted_namespace
    queues = await admin.queues(asked.name, namespace, asked.task, asked.limit, asked.offset)
    total = len(queues) if asked.name is not None else await admin.count_queues(namespace, asked.task)
    return Answer(200, write_status_queues(asked, queues, total))


async def show_queue(context: Context, call: Call) -> Answer:
    name = call.facts["queue"] = check_name(call.parameters["queue"], "queue")
    found = await context.engine.admin.queue(name)
    if found is None:
        raise NotFound("Queue not found")
    return Answer(200, write_status_queue(*found))


async def list_queue_messages(context: Context, call: Call) -> Answer:
    name = call.facts["queue"] = check_name(call.parameters["queue"], "queue")
    found = await context.engine.admin.messages(read_queue_messages_query(name, call.query))
    return Answer(200, write_short_messages(found))


async def show_analytics(context: Context, call: Call) -> Answer:
    interval, window = read_interval(call.query)
    return Answer(200, write_status_analytics(interval, window, await context.engine.admin.everything(window)))


async def show_buffers(context: Context, call: Call) -> Answer:
    healthy, spool = await is_connected(context), context.engine.spooling.figures
    return Answer(200, write_buffers(worker_number(context.settings), spool, healthy=healthy))


async def refresh(context: Context, call: Call) -> Answer:
    """The body is not read. Counts are exact without it; what all live workers did is written and folded now."""
    folded = await context.engine.refresh()
    overview, *_ = await context.engine.admin.overview()
    return Answer(200, write_refreshed(folded, msgspec.structs.asdict(overview.six)))
