"""One process that puts load on one queue: push for a while, then take and acknowledge all of it. Prints JSON.

    python -m perf.peers.load MODULE URL --batch 100 --connections 50 --seconds 5 --server PID ...

asyncio, since that is what the peers' own clients are written for. CPU is read of this process and of the servers
named, so that a slow client does not pass for a slow server.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import itertools
import json
import random
import sys
import time
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from perf import procstat

IDLE_ROUNDS = 20  # of a consumer that finds nothing while messages are still missing, before it is called a loss
IDLE_SECONDS = 0.05


class Client(Protocol):
    """One connection to a queue."""

    async def push(self, payloads: Sequence[str]) -> None:
        """Send them; durable, as the server understands it, when this returns."""

    async def take(self, most: int) -> list[str]:
        """Receive up to ``most`` payloads and acknowledge them; empty when there are none just now."""

    async def aclose(self) -> None:
        """Close the connection."""


class Peer(Protocol):
    """What a client module offers."""

    async def prepare(self, url: str) -> None: ...
    async def connect(self, url: str) -> Client: ...


@dataclass
class Phase:
    """What was done in which time, and what it cost."""

    messages: int
    seconds: float
    client_cpu_seconds: float
    server_cpu_seconds: float


class Meter:
    """Time and CPU from its making to ``read``."""

    def __init__(self, servers: Sequence[int]) -> None:
        self._servers = servers
        self._before = self._now()

    def read(self, messages: int) -> Phase:
        now = self._now()
        seconds, client, server = (after - before for after, before in zip(now, self._before, strict=True))
        return Phase(messages, seconds, client, server)

    def _now(self) -> tuple[float, float, float]:
        servers = sum(procstat.cpu_seconds(pid) for pid in self._servers)
        return time.perf_counter(), time.process_time(), servers


async def run(
    peer: Peer, url: str, batch: int, connections: int, seconds: float, servers: Sequence[int]
) -> list[Phase]:
    """Push, then take all of it; what was taken must be what was pushed."""
    await peer.prepare(url)
    clients = [await peer.connect(url) for _ in range(connections)]
    numbers = itertools.count()
    missing: set[str] = set()

    meter = Meter(servers)
    stop = time.perf_counter() + seconds

    async def produce(client: Client) -> None:
        while time.perf_counter() < stop:
            payloads = [f'{{"n":{next(numbers)},"r":"{random.randbytes(6).hex()}"}}' for _ in range(batch)]
            await client.push(payloads)
            missing.update(map(number, payloads))

    await together(produce(client) for client in clients)
    pushed = len(missing)
    phases = [meter.read(pushed)]

    async def consume(client: Client) -> None:
        idle = 0
        while missing and idle < IDLE_ROUNDS:
            payloads = await client.take(batch)
            missing.difference_update(map(number, payloads))
            idle = 0 if payloads else idle + 1
            if not payloads:
                await asyncio.sleep(IDLE_SECONDS)

    meter = Meter(servers)
    await together(consume(client) for client in clients)
    phases.append(meter.read(pushed - len(missing)))
    for client in clients:
        await client.aclose()
    if missing:
        raise SystemExit(f"{len(missing)} of {pushed} messages were not delivered")
    return phases


async def together(work: Iterable[Awaitable[None]]) -> None:
    """All at once; the first failure ends the rest."""
    async with asyncio.TaskGroup() as group:
        for each in work:
            group.create_task(waiting_for(each))


async def waiting_for(work: Awaitable[None]) -> None:
    await work


def number(payload: str) -> str:
    """The part of a payload that tells it from the others, however a server has spaced the JSON."""
    return payload.partition('"n":')[2].partition(",")[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("module")
    parser.add_argument("url")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--server", type=int, action="append", required=True, help="root of a process tree to account")
    options = parser.parse_args()
    peer: Peer = importlib.import_module(f"perf.peers.{options.module}")
    work = run(peer, options.url, options.batch, options.connections, options.seconds, options.server)
    push, take = asyncio.run(work)
    json.dump({"push": asdict(push), "take": asdict(take)}, sys.stdout)


if __name__ == "__main__":
    main()
