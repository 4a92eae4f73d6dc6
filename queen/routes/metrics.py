"""GET /metrics and /metrics/prometheus: of all workers of all servers on this database, whichever answers.

The first says what is in memory and waits for nothing; the second asks storage too, and goes without it when it does
not answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

import structlog
import trio

from queen.errors import QueenError, RouteNotFound
from queen.model.metrics import QueuePoint, Window, WorkerPoint
from queen.routes.call import Answer, Call, Context
from queen.routes.wire.metrics import PROMETHEUS, ServerMetrics, StoredMetrics, write_metrics, write_prometheus

SCRAPE_SECONDS: Final = 2.0
"""How long a scrape waits for storage; Prometheus gives up after ten."""

Point = TypeVar("Point", QueuePoint, WorkerPoint)

log = structlog.get_logger("queen.http")


async def show_metrics(context: Context, call: Call) -> Answer:
    _check_enabled(context)
    return Answer(200, write_metrics(_known(context, healthy=True)))


async def show_prometheus(context: Context, call: Call) -> Answer:
    _check_enabled(context)
    stored = server = None
    with trio.move_on_after(SCRAPE_SECONDS):
        server = await context.ask_supervisor()
        try:
            stored = await _stored(context)
        except QueenError as error:
            log.warning("scraped without storage", error=error.detail)
    return Answer(200, write_prometheus(_known(context, healthy=stored is not None), stored, server), PROMETHEUS)


def _check_enabled(context: Context) -> None:
    if not context.settings.metrics_endpoint:
        raise RouteNotFound("Not Found")


def _known(context: Context, *, healthy: bool) -> ServerMetrics:
    monitor = context.engine.admin.monitor
    now = datetime.now(UTC)
    started_at = min((process.started_at for process in monitor.processes), default=monitor.started_at)
    return ServerMetrics(
        uptime_seconds=max(0.0, (now - started_at).total_seconds()),
        processes=monitor.processes,
        cluster=monitor.cluster,
        recent=monitor.recent,
        healthy=healthy,
        spool=context.engine.spooling.figures,
        maintenance=context.engine.spooling.maintenance,
    )


async def _stored(context: Context) -> StoredMetrics:
    admin = context.engine.admin
    now = datetime.now(UTC)
    minute = now.replace(second=0, microsecond=0) - timedelta(minutes=1)
    window = Window(minute, now, 1)
    letters = await admin.dead_letters_by_queue()
    return StoredMetrics(
        now=now,
        cluster=await admin.cluster(),
        queues=_of_a_minute(minute, await admin.series(window, None), lambda point: point.queue),
        workers=_of_a_minute(
            minute, await admin.workers(window), lambda point: (point.hostname, point.worker_id, point.pid)
        ),
        dead_letters=letters,
        dead_letter_total=sum(letters.values()),
        pops_paused=context.engine.pops_paused,
    )


def _of_a_minute(minute: datetime, points: Sequence[Point], whose: Callable[[Point], object]) -> list[Point]:
    """One point of each: of that minute, or else of the one that has begun, for who did nothing before it."""
    found: dict[object, Point] = {}
    for point in points:
        if point.at == minute or whose(point) not in found:
            found[whose(point)] = point
    return list(found.values())
