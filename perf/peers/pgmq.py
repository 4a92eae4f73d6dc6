"""pgmq: SQL functions over one table a queue; the SQL that its Python package carries, called through asyncpg."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence

import asyncpg

QUEUE = "peers"
HIDDEN_SECONDS = 60


class Pgmq:
    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def push(self, payloads: Sequence[str]) -> None:
        await self._connection.execute("SELECT pgmq.send_batch($1, $2::jsonb[])", QUEUE, list(payloads))

    async def take(self, most: int) -> list[str]:
        rows = await self._connection.fetch(
            "SELECT msg_id, message FROM pgmq.read($1, $2, $3)", QUEUE, HIDDEN_SECONDS, most
        )
        if rows:
            ids = [row["msg_id"] for row in rows]
            await self._connection.execute("SELECT pgmq.delete($1::text, $2::bigint[])", QUEUE, ids)
        return [row["message"] for row in rows]

    async def aclose(self) -> None:
        await self._connection.close()


async def prepare(url: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(importlib.resources.files("pgmq.sql").joinpath("pgmq.sql").read_text())
    await connection.execute("SELECT pgmq.create($1)", QUEUE)
    await connection.close()


async def connect(url: str) -> Pgmq:
    return Pgmq(await asyncpg.connect(url))
