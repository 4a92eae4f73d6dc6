"""What a transaction that stays open does to the rate: dead rows that nobody may remove pile up behind it.

A closed loop of pushes and pops with autoAck of one message each, as nothing makes more dead rows of a message; first
undisturbed, then with a snapshot held by another session. Told are the rates of stretches before it and at its
end, the dead rows, and how many entries each look-up in an index reads. Exit code 1 when the rate at the end is below
95 % of that before.

python -m perf.pinned                      two minutes pinned, on a server of its own
python -m perf.pinned --pinned-seconds 600
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

from perf import load
from perf.bench import cancel_on_signal, check_pushed
from perf.bodies import PushBodies
from perf.load import Outcome
from perf.server import Database, Server, open_server, pg_bin

CONNECTIONS = 50  # half of them push
PARTITIONS = 100
LEAST_RATIO = 0.95
DRAIN_SECONDS = 60.0
DEAD = "SELECT sum(n_dead_tup) FROM pg_stat_user_tables WHERE schemaname = 'queen'"
INDEXES = ("partitions_pkey", "cursors_pkey", "cursors_ready")  # by which pushes and pops find what they change
READ = (
    "SELECT indexrelname, idx_scan, idx_tup_read FROM pg_stat_user_indexes WHERE schemaname = 'queen'"
    f" AND indexrelname IN {INDEXES!r}"
)
REPORTED_SECONDS = 1.5  # backends report what they have read up to a second later


@asynccontextmanager
async def pin(database: Database) -> AsyncIterator[None]:
    """Hold a snapshot in a session of its own."""
    command = [str(pg_bin() / "psql"), "-XAtq", "-v", "ON_ERROR_STOP=1", "-h", database.socket_directory]
    command += ["-p", str(database.port), "-U", database.user, "-d", database.name]
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdin.send_all(
            b"SET idle_in_transaction_session_timeout = 0; BEGIN ISOLATION LEVEL REPEATABLE READ;"
            b" SELECT pg_current_xact_id();\n"
        )
        if not await process.stdout.receive_some():
            raise RuntimeError("psql ended before it held a snapshot")
        try:
            yield
        finally:
            await process.stdin.aclose()  # psql ends, and its transaction with it


async def read(database: Database) -> dict[str, tuple[int, int]]:
    """By index: look-ups so far, and the entries that they read."""
    rows = (row.split("|") for row in (await database.psql(READ)).splitlines())
    return {name: (int(scans), int(entries)) for name, scans, entries in rows}


async def stretch(server: Server, queue: str, seconds: float) -> tuple[Outcome, Outcome]:
    """The load; what is left over is taken, too."""
    bodies = PushBodies(server.url, queue, batch=1, partitions=PARTITIONS)
    outcomes: dict[str, Outcome] = {}

    async def produce() -> None:
        outcomes["push"] = await load.push(server.url, bodies, batch=1, connections=CONNECTIONS // 2, seconds=seconds)

    async def consume() -> None:
        outcomes["pop"] = await load.pop(server.url, queue, batch=1, connections=CONNECTIONS // 2, seconds=seconds)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(produce)
        nursery.start_soon(consume)
    pushed, popped = outcomes["push"], outcomes["pop"]
    check_pushed(pushed)
    rest = pushed.messages - popped.messages
    if rest > 0:
        await load.pop(server.url, queue, batch=1000, connections=4, seconds=DRAIN_SECONDS, expected=rest)
    return pushed, popped


async def told(when: str, server: Server, queue: str, seconds: float) -> float:
    """A stretch, printed; returns pushes and pops a second together."""
    before = await read(server.database)
    pushed, popped = await stretch(server, queue, seconds)
    await trio.sleep(REPORTED_SECONDS)
    after = await read(server.database)
    entries: list[str] = []
    for name in INDEXES:
        lookups, found = (later - earlier for earlier, later in zip(before[name], after[name], strict=True))
        entries.append(f"{name} {found / max(lookups, 1):,.0f}")
    print(
        f"{when:<16}{pushed.rate:>9,.0f} pushes/s{popped.rate:>9,.0f} pops/s, p99 {pushed.percentile_ms(99):.1f} and"
        f" {popped.percentile_ms(99):.1f} ms; {int(await server.database.psql(DEAD)):,} dead rows; entries a look-up:"
        f" {', '.join(entries)}",
        flush=True,
    )
    return pushed.rate + popped.rate


async def measure(arguments: argparse.Namespace) -> float:
    """The ratio of the rates."""
    async with open_server(arguments.workers) as server:
        await stretch(server, "warm-up", 2.0)
        before = await told("undisturbed", server, "q", arguments.seconds)
        async with pin(server.database):
            began = trio.current_time()
            while (left := arguments.pinned_seconds - arguments.seconds - (trio.current_time() - began)) > 0:
                await told("pinned", server, "q", min(left, 30.0))
            after = await told("pinned, the end", server, "q", arguments.seconds)
        return after / before


async def main() -> int:
    parser = argparse.ArgumentParser(prog="perf.pinned", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pinned-seconds", type=float, default=120.0)
    parser.add_argument("--seconds", type=float, default=15.0, help="of the stretches that are compared")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    ratio = 0.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel_on_signal, nursery.cancel_scope)
        ratio = await measure(arguments)
        nursery.cancel_scope.cancel()
    print(f"at the end {ratio:.2f} times the rate before ({LEAST_RATIO} is to be reached)")
    return 0 if ratio >= LEAST_RATIO else 1


if __name__ == "__main__":
    sys.exit(trio.run(main))
