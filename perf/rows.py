"""The plain way, for comparison: one row per message in PostgreSQL. A process of its own; prints one JSON object.

``python -m perf.rows DSN``: the database named is filled with a table ``rows`` that is dropped afterwards. Three ways
to store the same messages, each for a few seconds: COPY and multi-row INSERT of 1,000 in a transaction over 8
connections, and one row per transaction over 50. Everything here is asyncio-flavored: asyncpg without a bridge.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Awaitable, Callable

import asyncpg

SECONDS = 2.0
TABLE = """
CREATE TABLE rows (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    transaction_id uuid NOT NULL UNIQUE,
    payload jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
)"""
INSERT = "INSERT INTO rows (transaction_id, payload) SELECT * FROM unnest($1::uuid[], $2::jsonb[])"

Message = tuple[uuid.UUID, str]
Write = Callable[["asyncpg.Connection", list[Message]], Awaitable[object]]


def messages(count: int) -> list[Message]:
    return [(uuid.uuid4(), f'{{"r":10000000,"i":{i},"x":"{i:06x}"}}') for i in range(count)]


async def copy(connection: asyncpg.Connection, batch: list[Message]) -> None:
    await connection.copy_records_to_table("rows", records=batch, columns=["transaction_id", "payload"])


async def insert(connection: asyncpg.Connection, batch: list[Message]) -> None:
    await connection.execute(INSERT, [m[0] for m in batch], [m[1] for m in batch])


async def rate(dsn: str, write: Write, batch: int, connections: int) -> float:
    """Messages a second, until the last transaction begun within SECONDS is committed."""
    stored = 0

    async def producer(connection: asyncpg.Connection) -> None:
        nonlocal stored
        while time.perf_counter() < stop:
            await write(connection, messages(batch))
            stored += batch

    opened = [await asyncpg.connect(dsn) for _ in range(connections)]
    try:
        began = time.perf_counter()
        stop = began + SECONDS
        await asyncio.gather(*map(producer, opened))
        return stored / (time.perf_counter() - began)
    finally:
        for connection in opened:
            await connection.close()


async def main(dsn: str) -> dict[str, float]:
    owner = await asyncpg.connect(dsn)
    await owner.execute("DROP TABLE IF EXISTS rows")
    await owner.execute(TABLE)
    try:
        return {
            "copy_1000_per_second": await rate(dsn, copy, 1000, 8),
            "insert_1000_per_second": await rate(dsn, insert, 1000, 8),
            "insert_1_per_second": await rate(dsn, insert, 1, 50),
        }
    finally:
        await owner.execute("DROP TABLE rows")
        await owner.close()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1]))))
