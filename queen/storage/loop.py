"""The asyncio loop that database work is done in, inside Trio's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
import trio_asyncio

log = structlog.get_logger("queen.storage")


@asynccontextmanager
async def open_asyncio() -> AsyncIterator[None]:
    """Open the loop. What breaks in its callbacks ends it, as trio-asyncio has it; what nobody asked for does not."""
    async with trio_asyncio.open_loop() as loop:
        loop.set_exception_handler(_judge)
        yield


def _judge(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A future that is thrown away with an exception in it, as asyncpg leaves one when PostgreSQL hangs up on a
    connection that is being opened and given up at that moment, says nothing about the work of others."""
    if "future" in context:
        error = context.get("exception")
        log.warning("an error of PostgreSQL's connection that nobody waited for", error=repr(error))
    else:
        loop.default_exception_handler(context)
