"""GET /health, /livez, /readyz: is this process fit to serve. They wait for no lock of storage and need no login."""

from __future__ import annotations

import re
from typing import Final

import trio

from queen._version import __version__
from queen.config.settings import Settings
from queen.errors import RouteNotFound
from queen.routes.call import Answer, Call, Context
from queen.routes.wire.queue import SpoolState, spool_state, write_health, write_liveness, write_readiness

HEALTH_SECONDS: Final = 2.0
"""Longest a health answer may take: half of the shortest probe timeout in common use leaves room for a busy loop."""


async def health(context: Context, call: Call) -> Answer:
    if not context.settings.health_endpoint:
        raise RouteNotFound("Not Found")
    connected = await is_connected(context)
    uptime_seconds = trio.current_time() - context.started_at
    return Answer(
        200 if connected else 503,
        write_health(connected, worker_number(context.settings), __version__, uptime_seconds, state_of_spool(context)),
    )


async def livez(context: Context, call: Call) -> Answer:
    """This process answers. Says nothing about the database: restarting us would not mend it."""
    return Answer(200, write_liveness())


async def readyz(context: Context, call: Call) -> Answer:
    """Send requests here, or do not: the database answers, or pushes can be kept until it does, and this process is not
    shutting down."""
    connected = await is_connected(context)
    ready = (connected or context.engine.spooling.takes_pushes) and not context.draining
    spool = None if connected else state_of_spool(context)
    return Answer(200 if ready else 503, write_readiness(ready, connected, context.draining, spool))


async def is_connected(context: Context) -> bool:
    """Whether PostgreSQL answers in time."""
    with trio.move_on_after(HEALTH_SECONDS):
        return await context.engine.health()
    return False


def state_of_spool(context: Context) -> SpoolState | None:
    """What the spool of this server holds; None: there is none."""
    spooling = context.engine.spooling
    if spooling.spool is None:
        return None
    return spool_state(spooling.active, spooling.figures, spooling.spool.max_bytes)


def worker_number(settings: Settings) -> int:
    """The number at the end of the worker's name; the wire wants an integer."""
    number = re.search(r"[0-9]+$", settings.worker_id)
    return int(number[0]) if number else 0
