"""How evenly keep-alive connections spread over the workers: 200 of them, and what each worker answers on them.

``python -m perf.even_load [--workers 2,4,8] [--connections 200] [--runs 5]``. Exit code 1 when the busiest worker has
more than 1.5 times the requests of the least busy, in the median run of any number of workers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys

import trio

from perf.server import Server, open_server
from perf.wire import Connection, get

MOST: float = 1.5
REQUESTS = 10  # on each connection
OPEN_AT_ONCE = 50
STATUS_SECONDS = 5.0  # heartbeats bring the counters twice a second


async def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", default="2,4,8", help="numbers of workers to try (2,4,8)")
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{arguments.connections} keep-alive connections, {REQUESTS} requests on each, {arguments.runs} runs")
    print("workers  busiest/least: median  worst   requests by worker in the median run")
    uneven = False
    for workers in map(int, arguments.workers.split(",")):
        async with open_server(workers, {"QUEEN_SPARE": "false", "LOG_LEVEL": "warn"}) as server:
            runs = [await run(server, arguments.connections) for _ in range(arguments.runs)]
        ratios = [max(counts) / max(1, min(counts)) for counts in runs]
        median = statistics.median_low(ratios)
        uneven = uneven or median > MOST
        print(f"{workers:7}  {median:21.2f}  {max(ratios):5.2f}   {runs[ratios.index(median)]}", flush=True)
    return 1 if uneven else 0


async def run(server: Server, connections: int) -> list[int]:
    """Requests that each worker has answered."""
    before = await requests_by_slot(server)
    opened: list[Connection] = []
    limiter = trio.CapacityLimiter(OPEN_AT_ONCE)

    async def use() -> None:
        async with limiter:
            connection = await Connection.open(server.url)
            opened.append(connection)
            await connection.exchange(get(server.url, "/livez"))

    async def go_on(connection: Connection) -> None:
        for _ in range(REQUESTS - 1):
            await connection.exchange(get(server.url, "/livez"))

    try:
        async with trio.open_nursery() as clients:
            for _ in range(connections):
                clients.start_soon(use)
        async with trio.open_nursery() as clients:
            for connection in opened:
                clients.start_soon(go_on, connection)
        with trio.fail_after(STATUS_SECONDS):
            while True:
                counts = [now - then for now, then in zip(await requests_by_slot(server), before, strict=True)]
                if sum(counts) >= connections * REQUESTS:
                    return counts
                await trio.sleep(0.1)
    finally:
        for connection in opened:
            connection.close()


async def requests_by_slot(server: Server) -> list[int]:
    """By the server's own word."""
    done = await trio.run_process(
        [sys.executable, "-m", "queen", "status", "--json", "--data-dir", str(server.directory / "data")],
        capture_stdout=True,
    )
    return [slot["requests"] for slot in json.loads(done.stdout)["slots"]]


if __name__ == "__main__":
    sys.exit(trio.run(main))
