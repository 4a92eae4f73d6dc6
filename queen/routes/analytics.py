"""GET /api/v1/analytics/…: series for dashboards."""

from __future__ import annotations

from datetime import UTC, datetime

from queen.routes.call import Answer, Call, Context
from queen.routes.wire.analytics import (
    write_parked,
    write_postgres,
    write_queue_lag,
    write_queue_ops,
    write_retention,
    write_system_metrics,
    write_worker_metrics,
)
from queen.routes.wire.query import read_query
from queen.routes.wire.window import QueueWindowQuery, read_window, window_of


async def show_worker_metrics(context: Context, call: Call) -> Answer:
    admin, asked = context.engine.admin, read_query(call.query, QueueWindowQuery)
    window = window_of(asked)
    overview, *_ = await admin.overview()
    body = write_worker_metrics(
        window,
        await admin.everything(window),
        await admin.series(window, asked.queue),
        await admin.workers(window),
        await admin.processes(),
        overview.six.pending,
    )
    return Answer(200, body)


async def show_system_metrics(context: Context, call: Call) -> Answer:
    window = read_window(call.query)
    return Answer(200, write_system_metrics(window, await context.engine.admin.workers(window), context.settings.port))


async def show_queue_lag(context: Context, call: Call) -> Answer:
    asked = read_query(call.query, QueueWindowQuery)
    return Answer(200, write_queue_lag(await context.engine.admin.series(window_of(asked), asked.queue)))


async def show_queue_ops(context: Context, call: Call) -> Answer:
    admin, asked = context.engine.admin, read_query(call.query, QueueWindowQuery)
    window, queue = window_of(asked), asked.queue
    points = await admin.series(window, queue)
    parked = await admin.parked(window, queue)
    names = sorted({point.queue for point in points if point.queue is not None} | {pops.queue for pops in parked})
    return Answer(200, write_queue_ops(window, points, parked, await admin.partition_counts(names)))


async def show_parked(context: Context, call: Call) -> Answer:
    asked = read_query(call.query, QueueWindowQuery)
    window = window_of(asked)
    return Answer(200, write_parked(window, await context.engine.admin.parked(window, asked.queue)))


async def show_retention(context: Context, call: Call) -> Answer:
    admin, asked = context.engine.admin, read_query(call.query, QueueWindowQuery)
    window, queue = window_of(asked), asked.queue
    points = await (admin.everything(window) if queue is None else admin.series(window, queue))
    return Answer(200, write_retention(window, points))


async def show_postgres(context: Context, call: Call) -> Answer:
    return Answer(200, write_postgres(datetime.now(UTC), await context.engine.admin.postgres()))
