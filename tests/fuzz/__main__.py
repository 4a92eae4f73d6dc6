"""python -m tests.fuzz: broken requests to servers of its own, both ways of serving; exits with 1 if one was found.

Beside the answers it looks at what a flood of them leaves behind: the memory of the worker, the size of the log, and
whether the server is there at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import trio

from tests.acceptance.support import Server

from .cases import Case, cases
from .client import Tally, send

MIB: Final = 1024 * 1024

GROWTH_BYTES: Final = 64 * MIB
"""What a worker may grow by in the second half of a run. The first half fills caches and the allocator's arenas, up to
what the largest bodies need; a leak of 1 KB a request would show as 25 MB and more in 25,000 requests."""

LOG_BYTES: Final = 700
"""Of log for each request, on average: one line each is what is promised."""

HYPERCORNS_OWN: Final = "another task is currently sending data on this SocketStream"
"""hypercorn refuses the broken rest of a connection while the application is still sending an answer on it, about once
in 17,000 of these requests; that connection ends, and nothing else."""

FINDINGS_SHOWN: Final = 20


def resident_bytes(pids: Sequence[int]) -> int:
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * 4096


async def flood(port: int, seed: int, start: int, count: int, connections: int, tally: Tally) -> None:
    """Send the cases from ``start`` on, so many at a time."""
    sender, receiver = trio.open_memory_channel[Case](connections)

    async def work(receiver: trio.MemoryReceiveChannel[Case]) -> None:
        async with receiver:
            async for case in receiver:
                await send(port, case, tally)

    async with trio.open_nursery() as nursery:
        async with receiver:
            for _ in range(connections):
                nursery.start_soon(work, receiver.clone())
        async with sender:
            for number, case in enumerate(cases(seed, start + count)):
                if number >= start:
                    await sender.send(case)


def run(way: str, count: int, seed: int, connections: int) -> list[str]:
    """Send ``count`` cases to a server of its own, served one way. Prints a summary; returns what was found."""
    scratch = Path(tempfile.mkdtemp(prefix="queen-fuzz-"))
    scratch.chmod(0o755)
    environment = {"MAX_TIMEOUT": "50", "QUEEN_FAST_HTTP": "true" if way == "fast" else "false"}
    server = Server(scratch / "data", logs=scratch, workers=1, environment=environment)
    tally = Tally()
    try:
        server.wait_ready()
        pids = server.worker_pids
        started_at, before, half = time.monotonic(), resident_bytes(pids), count // 2
        trio.run(flood, server.port, seed, 0, half, connections, tally)
        middle = resident_bytes(pids)
        trio.run(flood, server.port, seed, half, count - half, connections, tally)
        after, seconds = resident_bytes(pids), time.monotonic() - started_at
        log = server.log
        findings = tally.findings
        if server.worker_pids != pids:
            findings.append(f"the worker did not live through it: {pids} became {server.worker_pids}")
        if server.get("/health")[0] != 200:
            findings.append("the server is not healthy any more")
        if after - middle > GROWTH_BYTES:
            findings.append(f"the worker grew by {(after - middle) // MIB} MiB in the second half")
        if len(log) > LOG_BYTES * count:
            findings.append(f"{len(log)} bytes of log for {count} requests")
        findings += [f"logged: {line[:200]} ... {line[-700:]}" for line in alarms(log)]
    finally:
        server.end()
        shutil.rmtree(scratch)
    answers = ", ".join(f"{status or 'none'}: {times}" for status, times in sorted(tally.statuses.items()))
    print(f"{way}: {count} cases of seed {seed} in {seconds:.0f} s ({count / seconds:.0f}/s); answers {answers}")
    print(
        f"    501 by meaning {tally.refused_501}; resident {before // MIB} -> {middle // MIB} -> {after // MIB} MiB; "
        f"log {len(log) / count:.0f} bytes a request; {len(findings)} findings"
    )
    return findings


def alarms(log: str) -> list[str]:
    """Lines of the log that say that something went wrong on the server's side."""
    found = []
    for line in log.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            found.append(line)  # a traceback that nobody has put in order
            continue
        if HYPERCORNS_OWN in str(entry.get("exception")):
            continue
        if entry.get("level") in ("error", "critical") or entry.get("status", 0) in (500, 502, 503, 504):
            found.append(line)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--cases", type=int, default=100_000, help="altogether (100,000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--connections", type=int, default=48)
    parser.add_argument("--ways", default="fast,hypercorn", help="fast, hypercorn, or both")
    arguments = parser.parse_args()
    ways = arguments.ways.split(",")
    findings = []
    for way in ways:
        findings += [
            f"{way}: {finding}"
            for finding in run(way, arguments.cases // len(ways), arguments.seed, arguments.connections)
        ]
    for finding in findings[:FINDINGS_SHOWN]:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
