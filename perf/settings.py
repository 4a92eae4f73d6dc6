"""What a setting of PostgreSQL does for a server of ours: the same load with it and without it, in turn.

python -m perf.settings wal_compression=pglz
python -m perf.settings max_wal_size=1GB,checkpoint_timeout=30s jit=on --cell push-1 --runs 5
python -m perf.settings "sql:ALTER TABLE queen.cursors SET (fillfactor = 100)" --base checkpoint_timeout=30s

Each variant is compared with the embedded server's own settings (with those of ``--base`` added to both): a run of one,
a run of the other, and so on, each on a new cluster. Printed are the medians, and the ratio of variant to base: rate,
CPU a message of PostgreSQL and of the server, bytes of WAL a message, and the share of updates of cursors that
PostgreSQL could do in place (HOT). A run is a crash-safe server like any other: nothing here turns fsync off.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import trio

from perf import load, procstat
from perf.bodies import PushBodies
from perf.server import Database, free_port, open_process, tail, wait_answering
from queen.storage import embedded

QUEUE = "settings"
START_SECONDS = 60.0
LOOK_SECONDS = 0.02
WARM_UP_SECONDS = 3.0


class Cell(msgspec.Struct, frozen=True):
    """A load. Without ``pop``, pushes alone."""

    batch: int
    connections: int
    partitions: int
    pop: bool
    payload_bytes: int = 256


CELLS = {
    "push-1": Cell(1, 50, 100, pop=False),
    "push-100": Cell(100, 50, 100, pop=False),
    "loop-1": Cell(1, 50, 100, pop=True),
    "loop-100": Cell(100, 50, 100, pop=True),
}


class Figures(msgspec.Struct, frozen=True):
    """Of one run. CPU in microseconds, WAL in bytes, each for a message pushed."""

    pushed: float  # a second
    popped: float
    p99_ms: float
    postgres_us: float
    server_us: float
    wal_bytes: float
    hot: float
    checkpoints: int


@asynccontextmanager
async def open_postgres(directory: Path, settings: dict[str, str]) -> AsyncIterator[tuple[int, Database, str]]:
    """A PostgreSQL as the embedded one, but for these settings: its pid, how to look into it, its URL."""
    log = directory / "postgres.log"
    async with embedded.open_cluster(directory / "postgres") as cluster:
        cluster.clear_locks()
        cluster.socket_directory.mkdir(exist_ok=True)
        process = _launch(cluster, log, settings)
        try:
            with trio.fail_after(START_SECONDS):
                while embedded.READY_LINE not in log.read_bytes():
                    if process.poll() is not None:
                        raise RuntimeError(f"PostgreSQL did not start:\n{tail(log)}")
                    await trio.sleep(LOOK_SECONDS)
            database = Database(str(cluster.socket_directory), embedded.PORT, embedded.SUPERUSER, "postgres")
            yield process.pid, database, cluster.url
        finally:
            process.send_signal(signal.SIGINT)
            with trio.CancelScope(shield=True):  # it holds the directory that is removed next
                await trio.to_thread.run_sync(process.wait)


def _launch(cluster: embedded.Cluster, log: Path, settings: dict[str, str]) -> subprocess.Popen[bytes]:
    extra = [argument for name, value in settings.items() for argument in ("-c", f"{name}={value}")]
    with log.open("ab") as output:
        return subprocess.Popen(
            [*cluster.command(), *extra],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            **cluster.popen_options(),
        )


async def measure(cell: Cell, variant: dict[str, str], statements: list[str], seconds: float) -> Figures:
    """One run on a new cluster."""
    directory = Path(tempfile.mkdtemp(prefix="queen-settings-"))
    os.chmod(directory, 0o755)  # as root, PostgreSQL runs as another user
    try:
        async with open_postgres(directory, variant) as (postgres_pid, database, database_url):
            port = free_port()
            url, log = f"http://127.0.0.1:{port}", directory / "log"
            command = [sys.executable, "-m", "queen", "run", "--database-url", database_url, "--port", str(port)]
            command += ["--host", "127.0.0.1", "--no-spare", "--spool-dir", str(directory / "spool")]
            async with open_process(command, log, {"LOG_LEVEL": "warn"}) as server:
                await wait_answering(url, "/readyz", server, log)
                for statement in statements:
                    await database.psql(statement)
                await _load(url, cell, WARM_UP_SECONDS)
                before = await _counted(database)
                cpu = procstat.cpu_seconds(postgres_pid), procstat.cpu_seconds(server.pid)
                began = time.perf_counter()
                pushed, popped = await _load(url, cell, seconds)
                took = time.perf_counter() - began
                cpu_after = procstat.cpu_seconds(postgres_pid), procstat.cpu_seconds(server.pid)
                after = await _counted(database)
        messages = max(pushed.messages, 1)
        for outcome in filter(None, (pushed, popped)):
            if outcome.errors:
                raise RuntimeError(f"errors: {outcome.errors.most_common(3)}")
        updated = after["updated"] - before["updated"]
        return Figures(
            pushed=pushed.messages / took,
            popped=popped.messages / took if popped is not None else 0.0,
            p99_ms=pushed.percentile_ms(99),
            postgres_us=(cpu_after[0] - cpu[0]) / messages * 1e6,
            server_us=(cpu_after[1] - cpu[1]) / messages * 1e6,
            wal_bytes=(after["wal"] - before["wal"]) / messages,
            hot=(after["hot"] - before["hot"]) / updated if updated else 0.0,
            checkpoints=after["checkpoints"] - before["checkpoints"],
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def _load(url: str, cell: Cell, seconds: float) -> tuple[load.Outcome, load.Outcome | None]:
    bodies = PushBodies(
        url, QUEUE, batch=cell.batch, partitions=cell.partitions, payload_bytes=cell.payload_bytes, seed=1
    )
    popped: load.Outcome | None = None

    async def consume() -> None:
        nonlocal popped
        popped = await load.pop(
            url, QUEUE, batch=max(cell.batch, 10), connections=cell.connections, seconds=seconds, auto_ack=False
        )

    async with trio.open_nursery() as nursery:
        if cell.pop:
            nursery.start_soon(consume)
        pushed = await load.push(url, bodies, batch=cell.batch, connections=cell.connections, seconds=seconds)
    return pushed, popped


async def _counted(database: Database) -> dict[str, int]:
    row = await database.psql(
        "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint, n_tup_upd, n_tup_hot_upd,"
        " (SELECT num_timed + num_requested FROM pg_stat_checkpointer)"
        " FROM pg_stat_user_tables WHERE relid = 'queen.cursors'::regclass"
    )
    return dict(zip(("wal", "updated", "hot", "checkpoints"), map(int, row.split("|")), strict=True))


def parse(variant: str) -> tuple[dict[str, str], list[str]]:
    """``name=value,name=value`` or ``sql:STATEMENT``: settings, and statements to run first."""
    if variant.startswith("sql:"):
        return {}, [variant.removeprefix("sql:")]
    return dict(pair.split("=", 1) for pair in variant.split(",") if pair), []


def median(runs: list[Figures]) -> Figures:
    """Figure by figure."""
    columns = zip(*(msgspec.structs.astuple(run) for run in runs), strict=True)
    return Figures(*(statistics.median(column) for column in columns))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="perf.settings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="+", help="name=value,name=value or sql:STATEMENT")
    parser.add_argument("--base", default="", help="name=value,name=value for both")
    parser.add_argument("--cell", choices=list(CELLS), default="loop-100")
    parser.add_argument("--seconds", type=float, default=12.0, help="of a run")
    parser.add_argument("--runs", type=int, default=3, help="of each")
    parser.add_argument("--json", type=Path, help="file that a line for each comparison is added to")
    given = parser.parse_args()
    base, _ = parse(given.base)
    cell = CELLS[given.cell]
    header = "pushed/s", "popped/s", "p99 ms", "PG us", "server us", "WAL B", "HOT", "checkpoints"
    print(f"cell {given.cell}, {given.runs} runs of {given.seconds:g} s each, base {given.base or 'as embedded'}")
    print(f"{'':50} " + " ".join(f"{name:>11}" for name in header))
    for variant in given.variants:
        settings, statements = parse(variant)
        runs: dict[str, list[Figures]] = {"base": [], "variant": []}
        for _ in range(given.runs):
            runs["base"].append(trio.run(partial(measure, cell, base, [], given.seconds)))
            runs["variant"].append(trio.run(partial(measure, cell, base | settings, statements, given.seconds)))
        without, with_it = median(runs["base"]), median(runs["variant"])
        for name, figures in (("without", without), (variant, with_it)):
            print(f"{name[:50]:50} " + " ".join(f"{value:11.2f}" for value in msgspec.structs.astuple(figures)))
        ratios = [
            f"{after / before:11.3f}" if before else f"{'':11}"
            for before, after in zip(msgspec.structs.astuple(without), msgspec.structs.astuple(with_it), strict=True)
        ]
        print(f"{'  ratio':50} " + " ".join(ratios), flush=True)
        if given.json is not None:
            with given.json.open("a") as lines:
                found = {name: [msgspec.to_builtins(run) for run in each] for name, each in runs.items()}
                lines.write(json.dumps({"cell": given.cell, "base": given.base, "variant": variant, **found}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
