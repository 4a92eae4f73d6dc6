"""Retention, eviction, dead letters of what expired, empty partitions and the remains of deleted queues: loops under
one nursery, in bounded steps, one server at a time in a bucket.

What is expired is invisible to pops at once (storage looks at the time when it claims); this only frees the space.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import structlog
import trio

from queen.config.settings import Settings
from queen.errors import QueenError
from queen.model.queue import Queue
from queen.storage.store import Store

_FORGET_INTERVAL_SECONDS: Final = 3600.0
_MINUTES_DAYS: Final = 2
"""How long the series by the minute are kept: pages use them for windows of up to six hours."""

log = structlog.get_logger("queen.engine")


async def run_housekeeping(store: Store, settings: Settings) -> None:
    """Until cancelled. A failed round is told and tried again at the next."""
    async with trio.open_nursery() as loops:
        loops.start_soon(_run, store, settings, settings.retention_interval_seconds, _has_retention)
        loops.start_soon(_run, store, settings, settings.eviction_interval_seconds, _has_eviction)
        loops.start_soon(_bury, store, settings)
        loops.start_soon(_clean, store, settings)
        loops.start_soon(_forget, store, settings)


def _has_retention(queue: Queue) -> bool:
    return queue.options.retention_enabled


def _has_eviction(queue: Queue) -> bool:
    return queue.options.max_wait_time_seconds > 0 or queue.options.ttl_enforced


async def _bury(store: Store, settings: Settings) -> None:
    """When a pop has passed something that expired: at once. Else now and then, for what a server left behind."""
    while True:
        with trio.move_on_after(settings.eviction_interval_seconds):
            await store.expiry.wait_noticed()
        try:
            buried = await store.expiry.bury()
            if buried:
                log.info("expired messages became dead letters", messages=buried)
        except QueenError as error:
            log.warning("expired messages did not become dead letters, will try again", error=str(error))


async def _clean(store: Store, settings: Settings) -> None:
    while settings.partition_cleanup_days:
        await trio.sleep(settings.retention_interval_seconds)
        try:
            removed = await store.expiry.clean(settings.partition_cleanup_days, settings.retention_batch)
            if removed:
                log.info("empty partitions removed", partitions=removed)
        except QueenError as error:
            log.warning("empty partitions not removed, will try again", error=str(error))


async def _forget(store: Store, settings: Settings) -> None:
    """Once an hour: old metrics, traces and dead letters."""
    while True:
        await trio.sleep(_FORGET_INTERVAL_SECONDS)
        try:
            await store.metrics.forget(
                {
                    1: min(_MINUTES_DAYS, settings.metrics_retention_days),
                    15: min(settings.stats_retention_days, settings.metrics_retention_days),
                    360: settings.metrics_retention_days,
                }
            )
            await store.traces.expire(settings.metrics_retention_days)
            if settings.dead_letter_retention_days:
                removed = await store.redrive.expire(settings.dead_letter_retention_days)
                if removed:
                    log.info("old dead letters removed", messages=removed)
        except QueenError as error:
            log.warning("old metrics not removed, will try again", error=str(error))


async def _run(store: Store, settings: Settings, interval_seconds: float, concerns: Callable[[Queue], bool]) -> None:
    while True:
        await trio.sleep(interval_seconds)
        try:
            for queue in await store.expiry.due():
                if concerns(queue):
                    removed = await store.expire(queue, settings.retention_batch)
                    if removed:
                        kind = "retention_messages" if concerns is _has_retention else "eviction_messages"
                        store.activity.count(queue.name, expiries=1, **{kind: removed})
                        log.info("expired messages removed", queue=queue.name, messages=removed)
            for queue_id in await store.catalogue.deleted():
                await store.catalogue.purge(queue_id)
        except QueenError as error:
            log.warning("housekeeping failed, will try again", error=str(error))
