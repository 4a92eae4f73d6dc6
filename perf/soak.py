"""A soak: mixed load for a quarter of an hour, or for hours, that tells whether anything grows, is lost or loses order.

python -m perf.soak                                     15 minutes
python -m perf.soak --hours 8 --rate 2000 --json soak.json

A server of its own does, all at once: pushes over many partitions; a group that acks under leases and nacks now and
then; a group that takes everything at once (autoAck); one that polls for single messages; a hundred polls that find
nothing; queues and groups that come and go; partition names by the thousand; new connections all the time; status
pages and scrapes; retention that removes what all groups have consumed. The ledger knows for each group and partition
what has to come next, so nothing can be missing, doubled or out of order without being told of.

Every few seconds it samples memory, descriptors, threads and tasks of each process, connections, the size of the
database, PostgreSQL's connections, and rates. In the end each figure is judged by a line through its samples after the
warm-up (flat.py). Exit code 1: something grew, or the ledger had something to tell.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio

from perf.campaign import AckVerdict, PopAnswer, Popped, PushVerdict
from perf.flat import Allowance, fit, is_flat
from perf.server import Server, open_server, tail
from perf.wire import Connection, Disconnected, get, post

QUEUE = "soak"
WIDE = "wide"  # of many partitions with little in each
EMPTY = "empty"
BATCH = 20  # messages of a push
SPREAD = 4  # partitions of a push
WIDE_NAMES = 5_000
EXCHANGE_SECONDS = 30.0
DRAIN_SECONDS = 60.0
MIB = 1024 * 1024

ALLOWED = {
    "rss": Allowance(4.0, 0.08),  # MiB; prepared statements and other bounded caches fill for a while
    "fds": Allowance(4),
    "threads": Allowance(3),
    "tasks": Allowance(10, 0.05),
    "connections": Allowance(10, 0.05),
    "database": Allowance(24.0, 0.15),  # MiB
    "backends": Allowance(2),
    "pushed": Allowance(0.0, 0.1, falls=True),  # messages a second
    "delivered": Allowance(0.0, 0.1, falls=True),
}


class Options(msgspec.Struct, frozen=True):
    seconds: float
    warm_up: float
    rate: float  # messages pushed a second
    partitions: int
    parked: int
    every: float
    workers: int
    nack: float
    seed: int


class Group:
    """What one consumer group has to be given next, by partition."""

    def __init__(self, name: str, partitions: int) -> None:
        self.name = name
        self.next = [0] * partitions


class Ledger:
    """The checker. Without deaths and lost connections every delivery is exactly foreseen."""

    def __init__(self, partitions: int, groups: Sequence[str]) -> None:
        self.pushed = [0] * partitions
        self.groups = {name: Group(name, partitions) for name in groups}
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()

    def delivered(self, group: Group, messages: Sequence[Popped]) -> dict[int, int]:
        """Check an answer. Returns, by partition, where the group stands when all of it is acked."""
        ends: dict[int, int] = {}
        for message in messages:
            partition, number = message.data.p, message.data.n
            due = ends.get(partition, group.next[partition])
            if number != due:
                self.wrong(f"group {group.name}, partition {partition}: {number} delivered, {due} was due")
            ends[partition] = number + 1
        self.counts["delivered"] += len(messages)
        return ends

    def settled(self, group: Group, ends: dict[int, int]) -> None:
        for partition, end in ends.items():
            group.next[partition] = end

    def wrong(self, sentence: str) -> None:
        self.counts["violations"] += 1
        if len(self.violations) < 100:
            self.violations.append(sentence)

    def behind(self) -> int:
        """Messages that groups have still to be given."""
        return sum(
            max(0, pushed - given)
            for group in self.groups.values()
            for pushed, given in zip(self.pushed, group.next, strict=True)
        )


class Client:
    """One connection, made anew when it was closed for idleness. Anything but an answer is told of."""

    def __init__(self, url: str, ledger: Ledger) -> None:
        self.url = url
        self._ledger = ledger
        self._connection: Connection | None = None

    async def exchange(self, request: bytes, *statuses: int) -> tuple[int, bytes]:
        """Status and body; status 0 when there was no answer, which is told of, as is a status that is not expected."""
        with trio.move_on_after(EXCHANGE_SECONDS):
            try:
                if self._connection is None:
                    self._connection = await Connection.open(self.url)
                status = await self._connection.exchange(request)
                body = self._connection.body()
                if status not in (statuses or (200, 201, 204)):
                    self._ledger.wrong(f"{status} for {request[:60]!r}: {body[:200]!r}")
                return status, body
            except (OSError, Disconnected) as error:
                self._ledger.wrong(f"connection lost at {request[:60]!r}: {error}")
                self.close()
                return 0, b""
        self._ledger.wrong(f"no answer within {EXCHANGE_SECONDS} s: {request[:60]!r}")
        self.close()
        return 0, b""

    async def post(self, path: str, body: object, *statuses: int) -> tuple[int, bytes]:
        return await self.exchange(post(self.url, path, msgspec.json.encode(body)), *statuses)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Load:
    """The parts of the load; each method runs in a task of its own until ``stop`` is set, then ends what it is at."""

    def __init__(self, url: str, ledger: Ledger, options: Options) -> None:
        self.url = url
        self.ledger = ledger
        self.options = options
        self.pushing = True
        self.polling = True
        self._draw = random.Random(options.seed)

    def client(self) -> Client:
        return Client(self.url, self.ledger)

    async def configure(self) -> None:
        """The queues, with retention; and the groups, each by a pop that finds nothing, to be there from the start."""
        client = self.client()
        keep = {"retentionEnabled": True, "completedRetentionSeconds": 20, "retentionSeconds": 600, "retryDelay": 0}
        for queue in (QUEUE, WIDE, EMPTY):
            await client.post("/api/v1/configure", {"queue": queue, "options": {"retryLimit": 1_000_000, **keep}})
        for group in self.ledger.groups:
            await client.exchange(get(self.url, f"/api/v1/pop/queue/{QUEUE}?consumerGroup={group}"))
        client.close()

    async def produce(self, partitions: range) -> None:
        """Its share of the partitions, in order within each."""
        client, ledger = self.client(), self.ledger
        began, done = trio.current_time(), 0
        share = self.options.rate * len(partitions) / self.options.partitions
        while self.pushing:
            chosen = self._draw.sample(partitions, SPREAD)
            items = [
                {"queue": QUEUE, "partition": str(p), "payload": {"p": p, "n": ledger.pushed[p] + at, "x": "y" * 100}}
                for p in chosen
                for at in range(BATCH // SPREAD)
            ]
            _, body = await client.post("/api/v1/push", {"items": items})
            verdicts = msgspec.json.decode(body, type=list[PushVerdict]) if body else []
            stored = sum(verdict.status == "queued" for verdict in verdicts)
            if stored != BATCH:
                ledger.wrong(f"{stored} of {BATCH} messages of a push were stored")
                return  # numbers behind it would only repeat it
            for p in chosen:
                ledger.pushed[p] += BATCH // SPREAD
            ledger.counts["pushed"] += BATCH
            done += BATCH
            await trio.sleep_until(began + done / share)
        client.close()

    async def consume(self, name: str, *, batch: int, spread: int, auto_ack: bool = False) -> None:
        """One consumer of a group; without ``auto_ack`` it acks, and now and then nacks."""
        client, ledger, group = self.client(), self.ledger, self.ledger.groups[name]
        pop = get(
            self.url,
            f"/api/v1/pop/queue/{QUEUE}?batch={batch}&partitions={spread}&consumerGroup={name}"
            f"&wait=true&timeout=2000{'&autoAck=true' if auto_ack else ''}",
        )
        while self.polling:
            status, body = await client.exchange(pop)
            if status != 200:
                continue
            messages = msgspec.json.decode(body, type=PopAnswer).messages
            ends = ledger.delivered(group, messages)
            if auto_ack:
                ledger.settled(group, ends)
            elif self._draw.random() < self.options.nack:
                firsts = {message.data.p: message for message in reversed(messages)}
                await self._settle(client, name, list(firsts.values()), "failed")
                ledger.counts["nacked"] += len(firsts)
            else:
                ledger.settled(group, ends)  # before the answer: a next pop may be answered sooner
                await self._settle(client, name, messages, "completed")
                ledger.counts["acked"] += len(messages)
        client.close()

    async def _settle(self, client: Client, group: str, messages: Sequence[Popped], status: str) -> None:
        acknowledgments = [
            {
                "transactionId": message.transaction_id,
                "partitionId": message.partition_id,
                "leaseId": message.lease_id,
                "status": status,
            }
            for message in messages
        ]
        if len(acknowledgments) == 1:
            _, body = await client.post("/api/v1/ack", {**acknowledgments[0], "consumerGroup": group})
        else:
            batch = {"acknowledgments": acknowledgments, "consumerGroup": group}
            _, body = await client.post("/api/v1/ack/batch", batch)
        for verdict in msgspec.json.decode(body, type=list[AckVerdict]) if body else []:
            if not verdict.success:
                self.ledger.wrong(f"an ack of group {group} was refused: {verdict.error}")

    async def park(self) -> None:
        """Polls that find nothing, each time of another length."""
        client = self.client()
        while self.polling:
            timeout = self._draw.randrange(500, 8000)
            await client.exchange(get(self.url, f"/api/v1/pop/queue/{EMPTY}?wait=true&timeout={timeout}"), 204)
        client.close()

    async def pass_by(self) -> None:
        """Queues, partitions, groups and connections that are there for a moment."""
        number = 0
        while self.polling:
            number += 1
            client, queue, group = self.client(), f"passing-{number}", f"group-{number}"
            await client.post("/api/v1/configure", {"queue": queue, "options": {}})
            path = f"/api/v1/pop/queue/{queue}?batch=10&consumerGroup={group}"
            items = [{"queue": queue, "partition": f"p-{number}", "payload": {"p": 0, "n": n}} for n in range(3)]
            await client.post("/api/v1/push", {"items": items})
            status, body = await client.exchange(get(self.url, path + "&wait=true&timeout=5000"))
            messages = msgspec.json.decode(body, type=PopAnswer).messages if status == 200 else []
            if [message.data.n for message in messages] != [0, 1, 2]:
                self.ledger.wrong(f"queue {queue} gave {[message.data.n for message in messages]}, not 0, 1, 2")
            await self._settle(client, group, messages[-1:], "completed")
            request = f"DELETE /api/v1/resources/queues/{queue} HTTP/1.1\r\nHost: soak\r\n\r\n".encode()
            await client.exchange(request, 200)
            client.close()
            self.ledger.counts["queues that came and went"] += 1
            await trio.sleep(1.0)

    async def widen(self) -> None:
        """Messages into one partition after another of very many."""
        client, number = self.client(), 0
        pop = get(self.url, f"/api/v1/pop/queue/{WIDE}?batch=100&partitions=50&consumerGroup=wide&autoAck=true")
        while self.polling:
            items = []
            for _ in range(10):
                number += 1
                items.append({"queue": WIDE, "partition": f"w{number % WIDE_NAMES}", "payload": {"p": 0, "n": number}})
            await client.post("/api/v1/push", {"items": items})
            await client.exchange(pop)
            await trio.sleep(0.5)
        client.close()

    async def look(self) -> None:
        """What people and monitoring ask for."""
        client = self.client()
        while self.polling:
            for path in ("/metrics/prometheus", "/api/v1/status", "/api/v1/resources/queues", "/health"):
                await client.exchange(get(self.url, path), 200)
            await trio.sleep(5.0)
        client.close()


class Sampler:
    """Looks at the server every few seconds. ``series``: figure, then what it is of, then (seconds, value)."""

    def __init__(self, server: Server, ledger: Ledger) -> None:
        self.series: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        self._server = server
        self._ledger = ledger
        self._began = self._last = trio.current_time()
        self._counted: Counter[str] = Counter()
        self._pids: dict[str, int] = {}
        self._control = server.directory / "data" / "control.sock"

    async def sample(self) -> None:
        status = await trio.to_thread.run_sync(self._ask, "status")
        tree = await trio.to_thread.run_sync(self._ask, "tree")
        database = await self._server.database.psql(
            "SELECT pg_database_size(current_database()), count(*) FROM pg_stat_activity WHERE backend_type = 'client"
            " backend'"
        )
        now = trio.current_time()
        at = now - self._began
        slots = {slot["pid"]: slot for slot in status["slots"] if slot.get("pid")}
        tasks = {branch.get("pid"): _tasks(branch) for branch in tree.get("branches", ())}
        total = 0.0
        for process in self._server.processes():
            role = "supervisor"
            if process.pid != self._server.pid:
                slot = slots.get(process.pid)
                role = "spare" if slot is None else f"worker {slot['slot']}"
                if slot is not None:
                    self.note("connections", role, at, slot["connections"])
                if tasks.get(process.pid):
                    self.note("tasks", role, at, tasks[process.pid])
            if self._pids.setdefault(role, process.pid) != process.pid:
                self._ledger.wrong(f"{role} is another process after {at:.0f} s")
                self._pids[role] = process.pid
            if role != "spare":
                total += process.rss_bytes / MIB
            self.note("rss", role, at, process.rss_bytes / MIB)
            self.note("fds", role, at, _entries(process.pid, "fd"))
            self.note("threads", role, at, _entries(process.pid, "task"))
        self.note("rss", "supervisor and workers", at, total)
        size, backends = map(int, database.split("|"))
        self.note("database", "all", at, size / MIB)
        self.note("backends", "all", at, backends)
        counts = self._ledger.counts.copy()
        for name in ("pushed", "delivered"):
            if now > self._last + 1.0:
                self.note(name, "all", at, (counts[name] - self._counted[name]) / (now - self._last))
        self._counted, self._last = counts, now

    def note(self, figure: str, of: str, at: float, value: float) -> None:
        self.series[figure][of].append((round(at, 1), round(value, 2)))

    def _ask(self, what: str) -> Any:
        """Blocking: one command over the control socket."""
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(15.0)
            asking.connect(str(self._control))
            asking.sendall(b'{"do":"%b"}\n' % what.encode())
            received = b""
            while not received.endswith(b"\n"):
                piece = asking.recv(1 << 20)
                if not piece:
                    break
                received += piece
        return json.loads(received)["result"]

    def say(self) -> None:
        """A line for who watches."""
        last = {of: values[-1][1] for of, values in self.series["rss"].items()}
        at = self.series["database"]["all"][-1]
        memory = ", ".join(f"{of} {value:.1f}" for of, value in sorted(last.items()))
        pushed = self.series["pushed"]["all"][-1][1] if self.series["pushed"]["all"] else 0.0
        delivered = self.series["delivered"]["all"][-1][1] if self.series["delivered"]["all"] else 0.0
        print(
            f"{at[0]:7.0f} s  pushed {pushed:.0f}/s, delivered {delivered:.0f}/s, database {at[1]:.1f} MiB, RSS"
            f" {memory} MiB, behind {self._ledger.behind()}, violations {self._ledger.counts['violations']}",
            flush=True,
        )


def _entries(pid: int, kind: str) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/{kind}"))
    except OSError:
        return 0


def _tasks(worker: dict[str, Any]) -> int:
    for branch in worker.get("branches", ()):
        if found := re.fullmatch(r"(\d+) tasks in all", branch["name"]):
            return int(found[1])
    return 0


async def run(options: Options, ledger: Ledger) -> tuple[Sampler, dict[str, object]]:
    """The whole of it. Returns the samples and what the server used in all."""
    environment = {
        "RETENTION_INTERVAL": "5000",
        "EVICTION_INTERVAL": "5000",
        "LOG_FORMAT": "json",
        "LOG_LEVEL": "warn",
    }
    async with open_server(options.workers, environment) as server:
        load = Load(server.url, ledger, options)
        await load.configure()
        sampler = Sampler(server, ledger)
        await sampler.sample()  # idle
        cpu, began = server.cpu_seconds(), trio.current_time()
        async with trio.open_nursery() as consumers:
            parts: list[Callable[[], Awaitable[None]]] = [
                *(partial(load.consume, "leased", batch=50, spread=4) for _ in range(4)),
                # one alone: without a lease, answers to two consumers may overtake each other
                partial(load.consume, "at-once", batch=200, spread=20, auto_ack=True),
                *(partial(load.consume, "single", batch=10, spread=1) for _ in range(8)),
                *(load.park for _ in range(options.parked)),
                load.pass_by,
                load.widen,
                load.look,
            ]
            for part in parts:
                consumers.start_soon(part)
            async with trio.open_nursery() as producers:
                half = options.partitions // 2
                producers.start_soon(load.produce, range(half))
                producers.start_soon(load.produce, range(half, options.partitions))
                due, said = began, began
                while (due := due + options.every) <= began + options.seconds:
                    await trio.sleep_until(due)
                    await sampler.sample()
                    if due >= said + 60.0:
                        said = due
                        sampler.say()
                load.pushing = False
            with trio.move_on_after(DRAIN_SECONDS):
                while ledger.behind():  # noqa: ASYNC110  # many tasks together bring it to an end
                    await trio.sleep(0.1)
            load.polling = False
        if ledger.behind():
            ledger.wrong(f"{ledger.behind()} deliveries are missing {DRAIN_SECONDS:.0f} s after the last push")
        used = server.cpu_seconds()
        log = tail(server.directory / "log", 20)
    seconds = trio.current_time() - began
    figures: dict[str, object] = {
        "seconds": round(seconds, 1),
        "server cores": round((used[0] - cpu[0]) / seconds, 3),
        "PostgreSQL cores": round((used[1] - cpu[1]) / seconds, 3),
        "last lines of the log": log.splitlines()[-5:],
    }
    return sampler, figures


def judge(sampler: Sampler, warm_up: float) -> list[dict[str, object]]:
    """Each figure with its line, and whether it is flat."""
    verdicts: list[dict[str, object]] = []
    for figure, allowance in ALLOWED.items():
        for of, samples in sorted(sampler.series[figure].items()):
            line = fit([sample for sample in samples if sample[0] >= warm_up])
            verdicts.append(
                {
                    "figure": figure,
                    "of": of,
                    "first": samples[0][1],
                    "mean": round(line.mean, 2),
                    "most": max(value for _, value in samples),
                    "growth": round(line.growth, 2),
                    "per hour": round(line.slope * 3600, 2),
                    "flat": is_flat(line, allowance),
                }
            )
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="perf.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--hours", type=float, default=0.0, help="instead of minutes")
    parser.add_argument("--warm-up", type=float, help="seconds that are not judged; a third, at most ten minutes")
    parser.add_argument("--rate", type=float, default=1000.0, help="messages pushed a second, for three groups")
    parser.add_argument("--partitions", type=int, default=200)
    parser.add_argument("--parked", type=int, default=100, help="polls that find nothing")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="between samples")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--nack", type=float, default=0.02, help="share of deliveries")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--json", type=Path, help="file for all samples and verdicts")
    given = parser.parse_args()
    seconds = given.hours * 3600 or given.minutes * 60
    options = Options(
        seconds=seconds,
        warm_up=given.warm_up if given.warm_up is not None else min(seconds / 3, 600.0),
        rate=given.rate,
        partitions=given.partitions,
        parked=given.parked,
        every=given.every,
        workers=given.workers,
        nack=given.nack,
        seed=given.seed,
    )
    ledger = Ledger(options.partitions, ("leased", "at-once", "single"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either way, no server is left behind
    began = time.time()
    sampler, figures = trio.run(partial(run, options, ledger))
    verdicts = judge(sampler, options.warm_up)
    print(f"{'':34} {'first':>9} {'mean':>9} {'most':>9} {'growth':>9} {'per hour':>9}")
    for verdict in verdicts:
        name = f"{verdict['figure']}, {verdict['of']}"
        numbers = " ".join(f"{verdict[column]:>9}" for column in ("first", "mean", "most", "growth", "per hour"))
        print(f"{name:34} {numbers}  {'flat' if verdict['flat'] else 'GROWS' if name[:4] != 'push' else 'FALLS'}")
    summary = {"seed": options.seed, **figures, **ledger.counts}
    print(json.dumps(summary))
    for sentence in ledger.violations[:20]:
        print(sentence)
    if given.json is not None:
        given.json.write_text(
            json.dumps(
                {
                    "begun": began,
                    "options": msgspec.to_builtins(options),
                    **summary,
                    "verdicts": verdicts,
                    "series": sampler.series,
                }
            )
        )
    return 1 if ledger.violations or not all(verdict["flat"] for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
