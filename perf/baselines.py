"""What this machine does without queen, in the same run: rates travel between machines only as ratios to these.

disk       one fdatasync of 8 KiB, the price of a commit that shares with nobody
hypercorn  a bare ASGI app with the same requests and answers, one process: the ceiling of one worker
rows       one row per message in the PostgreSQL of the server (perf/rows.py): the plain way to a queue
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path

import trio

from perf import load, procstat
from perf.bodies import PushBodies
from perf.server import PROJECT, Server, free_port, open_process, wait_answering

HYPERCORN_SECONDS = 2.0
FSYNC_SECONDS = 1.5

Figures = dict[str, float]


def disk(directory: Path) -> Figures:
    """Median and p99 of one appended 8 KiB block made durable, in milliseconds. Blocks the loop: nothing else runs."""
    path = directory / "fdatasync-probe"
    block = os.urandom(8192)
    times: list[float] = []
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        # Overwriting allocated blocks, as WAL segments are recycled: an append would measure metadata too.
        os.write(descriptor, block * 256)
        os.fsync(descriptor)
        stop = time.perf_counter() + FSYNC_SECONDS
        while time.perf_counter() < stop:
            os.lseek(descriptor, 8192 * (len(times) % 256), os.SEEK_SET)
            began = time.perf_counter()
            os.write(descriptor, block)
            os.fdatasync(descriptor)
            times.append((time.perf_counter() - began) * 1000)
    finally:
        os.close(descriptor)
        path.unlink()
    times.sort()
    return {"fdatasync_p50_ms": statistics.median(times), "fdatasync_p99_ms": times[int(len(times) * 0.99)]}


async def hypercorn(directory: Path) -> Figures:
    """Rates and CPU per message of the bare app at batch 1 and 1,000."""
    url = f"http://127.0.0.1:{free_port()}"
    log = directory / "hypercorn-log"
    command = [sys.executable, "-m", "hypercorn", "-k", "trio", "-b", url.removeprefix("http://")]
    figures: Figures = {}
    async with open_process([*command, "perf.baseline_app:app"], log, {}) as process:
        await wait_answering(url, "/?batch=1", process, log)
        for batch in (1, 1000):
            bodies = PushBodies(url, "bench", batch=batch)
            for verb in ("push", "pop"):
                before = procstat.cpu_seconds(process.pid)
                if verb == "push":
                    outcome = await load.push(url, bodies, batch=batch, connections=50, seconds=HYPERCORN_SECONDS)
                else:
                    outcome = await load.pop(url, "bench", batch=batch, connections=50, seconds=HYPERCORN_SECONDS)
                used = procstat.cpu_seconds(process.pid) - before
                figures[f"{verb}_{batch}_per_second"] = outcome.rate
                figures[f"{verb}_{batch}_cpu_us"] = used / max(outcome.messages, 1) * 1e6
    return figures


async def rows(server: Server) -> Figures:
    """Rates of storing one row per message, in a database of its own beside the server's, which idles."""
    database = server.database
    await database.psql("CREATE DATABASE perf_rows")
    try:
        done = await trio.run_process(
            [sys.executable, "-m", "perf.rows", database.dsn_of("perf_rows")], capture_stdout=True, cwd=PROJECT
        )
    finally:
        await database.psql("DROP DATABASE perf_rows WITH (FORCE)")
    figures: Figures = json.loads(done.stdout)
    return figures


async def measure(server: Server) -> dict[str, Figures]:
    """All of them, one after another."""
    return {
        "disk": disk(server.directory),
        "hypercorn": await hypercorn(server.directory),
        "rows": await rows(server),
    }
