"""How fast the pages of administration are where there is much to show, and what all that costs when nobody asks.

A million idle partitions in one queue and ten thousand idle queues, each with a group, loaded as pushes and pops would
have left them; then every page is asked for, in turn, and after that nothing for a minute. Exit code 1 when a page took
longer than 200 ms, or the idle server with its PostgreSQL used more than 0.05 core.

python -m perf.pages
python -m perf.pages --partitions 100000 --queues 1000 --idle-seconds 10
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Final

import msgspec
import trio

from perf import crowds, load
from perf.bench import cancel_on_signal, check_pushed, measured
from perf.bodies import PushBodies
from perf.server import Server, open_server
from perf.wire import Connection, get, post

MAX_PAGE_MS: Final = 200.0
MAX_IDLE_CORES: Final = 0.05
ROUNDS: Final = 11
QUEUE: Final = "crowd"
GROUP: Final = "readers"
SETTLE_SECONDS: Final = 15.0  # more than an interval of the statistics


class Page(msgspec.Struct):
    """A path, and how long its answers took, in milliseconds, in order."""

    path: str
    took_ms: list[float] = []


async def fill(server: Server, partitions: int, queues: int) -> dict[str, str]:
    """Load what is idle, and a thousand messages that are not. Returns what to put for the parameters of paths."""
    connection = await Connection.open(server.url)
    try:
        bodies = PushBodies(server.url, QUEUE, batch=10, partitions=100)
        check_pushed(await load.push_messages(server.url, bodies, batch=10, connections=1, messages=1000))
        await crowds.register(server.url, QUEUE, [GROUP])
        await crowds.add_partitions(server.database, QUEUE, partitions)
        for statement in (*crowds.idle_queues(queues, QUEUE, "idle ", GROUP), "VACUUM ANALYZE", "CHECKPOINT"):
            await server.database.psql(statement)
        await connection.exchange(get(server.url, f"/api/v1/pop/queue/{QUEUE}?consumerGroup={GROUP}"))
        message = json.loads(connection.body())["messages"][0]
        ack = {
            "transactionId": message["transactionId"],
            "partitionId": message["partitionId"],
            "leaseId": message["leaseId"],
            "consumerGroup": GROUP,
            "status": "dlq",
            "error": "to have one",
        }
        await connection.exchange(post(server.url, "/api/v1/ack", json.dumps(ack).encode()))
        trace = {
            "transactionId": message["transactionId"],
            "partitionId": message["partitionId"],
            "data": {},
            "traceNames": ["first"],
        }
        await connection.exchange(post(server.url, "/api/v1/traces", json.dumps(trace).encode()))
    finally:
        connection.close()
    return {
        "queue": QUEUE,
        "group": GROUP,
        "name": "first",
        "partition_id": message["partitionId"],
        "transaction_id": message["transactionId"],
    }


async def pages(server: Server, parameters: dict[str, str]) -> list[Page]:
    """All that the server says can be read, but pops."""
    connection = await Connection.open(server.url)
    try:
        await connection.exchange(get(server.url, "/openapi.json"))
        paths: dict[str, dict[str, object]] = json.loads(connection.body())["paths"]
    finally:
        connection.close()
    return [
        Page(path.format_map(parameters))
        for path, operations in paths.items()
        if "get" in operations and not path.startswith(("/api/v1/pop", "/api/v1/migration"))
    ]


async def read(server: Server, page: Page) -> None:
    """Ask for a page once.

    Raises:
        SystemExit: it is not there.
    """
    connection = await Connection.open(server.url)
    try:
        began = time.perf_counter()
        status = await connection.exchange(get(server.url, page.path))
        page.took_ms.append((time.perf_counter() - began) * 1000)
        if status != 200:
            raise SystemExit(f"{page.path}: {status} {connection.body()[:200]!r}")
    finally:
        connection.close()


async def measure(server: Server, arguments: argparse.Namespace) -> int:
    """Fill, look, wait, tell; returns the exit code."""
    parameters = await fill(server, arguments.partitions, arguments.queues)
    await trio.sleep(SETTLE_SECONDS)
    found = await pages(server, parameters)
    for _ in range(ROUNDS):
        for page in found:
            await read(server, page)
    async with measured(server) as usage:
        await trio.sleep(arguments.idle_seconds)
    cores = (usage.server + usage.postgres) / usage.seconds

    print(f"{arguments.partitions:,} idle partitions, {arguments.queues:,} idle queues, {ROUNDS} times each page, ms")
    print(f"{'first':>8}{'median':>8}{'worst':>8}  page")
    for page in sorted(found, key=lambda page: -max(page.took_ms)):
        first, median, worst = page.took_ms[0], statistics.median(page.took_ms), max(page.took_ms)
        print(f"{first:>8.1f}{median:>8.1f}{worst:>8.1f}  {page.path}")
    print(f"idle for {usage.seconds:.0f} s: {cores:.4f} core ({usage.server:.2f} s server, {usage.postgres:.2f} s PG)")
    slow = sum(max(page.took_ms) > MAX_PAGE_MS for page in found)
    failed = slow > 0 or cores > MAX_IDLE_CORES
    print(f"FAILED: {slow} pages above {MAX_PAGE_MS:.0f} ms, {cores:.3f} core" if failed else "ok")
    return 1 if failed else 0


async def main() -> int:
    parser = argparse.ArgumentParser(prog="perf.pages", description=__doc__)
    parser.add_argument("--partitions", type=int, default=1_000_000)
    parser.add_argument("--queues", type=int, default=10_000)
    parser.add_argument("--idle-seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    code = 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel_on_signal, nursery.cancel_scope)
        async with open_server(2) as server:
            code = await measure(server, arguments)
        nursery.cancel_scope.cancel()
    return code


if __name__ == "__main__":
    sys.exit(trio.run(main))
