"""pgqueuer: one row a job, SKIP LOCKED, a log of what was done; its own queries, without its worker loop."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import timedelta

import asyncpg
from pgqueuer.db import AsyncpgDriver
from pgqueuer.queries import EntrypointExecutionParameter, Queries

ENTRYPOINT = "peers"
STALE = timedelta(seconds=60)


class Pgqueuer:
    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self._queries = Queries(AsyncpgDriver(connection))
        self._consumer = uuid.uuid4()

    async def push(self, payloads: Sequence[str]) -> None:
        count = len(payloads)
        await self._queries.enqueue([ENTRYPOINT] * count, [payload.encode() for payload in payloads], [0] * count)

    async def take(self, most: int) -> list[str]:
        jobs = await self._queries.dequeue(
            most, {ENTRYPOINT: EntrypointExecutionParameter(0)}, self._consumer, None, STALE
        )
        if jobs:
            await self._queries.log_jobs([(job, "successful", None) for job in jobs])
        return [job.payload.decode() for job in jobs]

    async def aclose(self) -> None:
        await self._connection.close()


async def prepare(url: str) -> None:
    connection = await asyncpg.connect(url)
    await Queries(AsyncpgDriver(connection)).install()
    await connection.close()


async def connect(url: str) -> Pgqueuer:
    return Pgqueuer(await asyncpg.connect(url))
