"""An outage: load over HTTP while PostgreSQL is stopped for a while, and a ledger that checks every message.

python -m perf.outage                                    60 s, 500 messages a second, PostgreSQL shut down
python -m perf.outage --how freeze                       the same, its processes stopped: silent, not gone
python -m perf.outage --how kill --seconds 10 --worker-every 2

Every push carries one message, with a transaction id of its own, and goes over one of several connections of its
producer, which lie at different workers. The ledger is that of perf.campaign: an answered push that never arrives, a
message delivered twice or out of its order is told of, and the exit code is 1. Figures: how long pushes took before,
during and after, how soon the spool was used, how soon it was empty again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import trio

from perf import procstat
from perf.campaign import (
    QUEUE,
    Client,
    Ledger,
    Options,
    Payload,
    PushVerdict,
    Victim,
    consume,
    report,
    settle_down,
    uuid7,
    wait_drained,
)
from perf.server import tail
from perf.wire import get, post
from queen.storage import embedded

CONNECTIONS = 4  # of a producer
START_SECONDS = 60.0
STOP_SECONDS = 60.0
LOOK_SECONDS = 0.02


class Outage(msgspec.Struct, frozen=True):
    how: str  # stop: a fast shutdown; kill: SIGKILL; freeze: SIGSTOP of all its processes
    before: float
    seconds: float
    after: float


class Sent(msgspec.Struct, frozen=True):
    """A push that was answered."""

    at: float
    seconds: float
    status: str
    again: bool


class Postgres:
    """A PostgreSQL of our own, to be ended and started again."""

    def __init__(self, cluster: embedded.Cluster, log: Path) -> None:
        self.url = cluster.url
        self._cluster = cluster
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen: list[int] = []

    def _launch(self) -> subprocess.Popen[bytes]:
        self._cluster.clear_locks()
        self._cluster.socket_directory.mkdir(exist_ok=True)
        with self._log.open("ab") as output:
            return subprocess.Popen(
                self._cluster.command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                **self._cluster.popen_options(),
            )

    async def start(self) -> None:
        before = self._log.read_bytes().count(embedded.READY_LINE) if self._log.exists() else 0
        self._process = self._launch()
        with trio.fail_after(START_SECONDS):
            while self._log.read_bytes().count(embedded.READY_LINE) == before:  # noqa: ASYNC110  # another's log
                await trio.sleep(LOOK_SECONDS)

    async def end(self, how: str) -> None:
        assert self._process is not None
        if how == "freeze":
            self._frozen = [process.pid for process in procstat.tree(self._process.pid)]
            for pid in self._frozen:
                os.kill(pid, signal.SIGSTOP)
            return
        family = [process.pid for process in procstat.tree(self._process.pid)]
        self._process.send_signal(signal.SIGKILL if how == "kill" else signal.SIGINT)
        await trio.to_thread.run_sync(self._process.wait)
        for pid in family:  # of one that was killed: its backends notice by themselves, but later
            if how == "kill" and procstat.read(pid) is not None:
                os.kill(pid, signal.SIGQUIT)

    async def resume(self) -> None:
        if self._frozen:
            for pid in self._frozen:
                os.kill(pid, signal.SIGCONT)
            self._frozen = []
        else:
            await self.start()

    def close(self) -> None:
        for pid in self._frozen:
            os.kill(pid, signal.SIGCONT)
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(STOP_SECONDS)


@asynccontextmanager
async def open_postgres(directory: Path) -> AsyncIterator[Postgres]:
    async with embedded.open_cluster(directory / "postgres") as cluster:
        postgres = Postgres(cluster, directory / "postgres.log")
        await postgres.start()
        try:
            yield postgres
        finally:
            await trio.to_thread.run_sync(postgres.close)


class Server(Victim):
    """The server under test, on that PostgreSQL."""

    def __init__(self, directory: Path, options: Options, ledger: Ledger, url: str) -> None:
        super().__init__(directory, options, ledger)
        self.where = ("--database-url", url, "--spool-dir", str(directory / "spool"))


async def produce(url: str, ledger: Ledger, options: Options, number: int, sent: list[Sent]) -> None:
    """One producer: its share of the partitions in turn, one message a push, at its rate."""
    draw = random.Random(options.seed * 1000 + number)
    clients = [Client(url, ledger) for _ in range(CONNECTIONS)]
    partitions = range(number, options.partitions, options.producers)
    began = trio.current_time()
    for at in range(options.messages // options.producers):
        partition, n = partitions[at % len(partitions)], at // len(partitions)
        name = str(uuid7()) if at % 2 else f"order-{partition}-{n}"
        item = {
            "queue": QUEUE,
            "partition": str(partition),
            "transactionId": name,
            "payload": Payload(partition, n),
        }
        ledger.sending(partition, 1)
        started_at = trio.current_time()
        request = post(url, "/api/v1/push", msgspec.json.encode({"items": [item]}))
        _, body, again = await draw.choice(clients).exchange(request)
        (verdict,) = msgspec.json.decode(body, type=list[PushVerdict])
        if verdict.transaction_id != name or verdict.status not in ("queued", "buffered", *(["duplicate"] * again)):
            ledger.wrong(f"a push was answered {verdict}, sent {'again' if again else 'once'}")
        ledger.pushed(partition, 1)
        sent.append(Sent(started_at, trio.current_time() - started_at, verdict.status, again))
        await trio.sleep_until(began + (at + 1) * options.producers / options.rate)
    for client in clients:
        client.close()


async def kill_workers(server: Server, every: float) -> None:
    while True:
        await trio.sleep(every)
        await server.kill_worker()


class Course(msgspec.Struct):
    """When what happened."""

    ended_at: float = 0.0
    resumed_at: float = 0.0
    empty_at: float = 0.0
    most_pending: int = 0


async def watch_spool(url: str, ledger: Ledger, course: Course) -> None:
    """Until the spool is empty after the outage."""
    client = Client(url, Ledger(1, 1.0))  # an outage is no finding of this one
    while True:
        _, body = await client.look(get(url, "/health"))
        spool = msgspec.json.decode(body).get("spool", {}) if body else {}
        course.most_pending = max(course.most_pending, spool.get("pending", 0))
        if course.resumed_at and spool and not spool["pending"] and not spool["active"]:
            course.empty_at = trio.current_time()
            ledger.counts["set aside"] = spool["failed"]
            client.close()
            return
        await trio.sleep(LOOK_SECONDS)


async def run(options: Options, outage: Outage, ledger: Ledger) -> dict[str, object]:
    """The whole of it; closes the ledger. Returns the figures."""
    directory = Path(tempfile.mkdtemp(prefix="queen-outage-"))
    os.chmod(directory, 0o755)  # as root, PostgreSQL runs as another user
    sent: list[Sent] = []
    course = Course()
    try:
        async with open_postgres(directory) as postgres:
            server = Server(directory, options, ledger, postgres.url)
            async with server.open():
                configure = {"leaseTime": options.lease_seconds, "retryLimit": 1_000_000}
                body = msgspec.json.encode({"queue": QUEUE, "options": configure})
                await Client(server.url, ledger).exchange(post(server.url, "/api/v1/configure", body))
                with trio.move_on_after(options.limit_seconds) as limit:
                    await _run(server, postgres, options, outage, ledger, sent, course)
                if limit.cancelled_caught:
                    ledger.wrong(f"not done within {options.limit_seconds} s")
        ledger.close(options.messages // options.producers * options.producers)
        if ledger.violations:
            print(tail(server.log, 60), file=sys.stderr)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return figures(sent, course)


async def _run(
    server: Server,
    postgres: Postgres,
    options: Options,
    outage: Outage,
    ledger: Ledger,
    sent: list[Sent],
    course: Course,
) -> None:
    async with trio.open_nursery() as others:
        for number in range(options.consumers):
            others.start_soon(consume, server.url, ledger, options, number)
        others.start_soon(report, ledger)
        async with trio.open_nursery() as harm:
            async with trio.open_nursery() as producers:
                for number in range(options.producers):
                    producers.start_soon(produce, server.url, ledger, options, number, sent)
                await trio.sleep(outage.before)
                producers.start_soon(watch_spool, server.url, ledger, course)
                course.ended_at = trio.current_time()
                await postgres.end(outage.how)
                if options.worker_every:
                    harm.start_soon(kill_workers, server, options.worker_every)
                await trio.sleep_until(course.ended_at + outage.seconds)
                await postgres.resume()
                course.resumed_at = trio.current_time()
            harm.cancel_scope.cancel()
        await wait_drained(ledger)
        await settle_down(ledger, options)
        others.cancel_scope.cancel()


def figures(sent: list[Sent], course: Course) -> dict[str, object]:
    """What is worth knowing of the pushes."""
    phases = {
        "before": (0.0, course.ended_at),
        "away": (course.ended_at, course.resumed_at),
        "draining": (course.resumed_at, course.empty_at),
        "after": (course.empty_at, float("inf")),
    }
    found: dict[str, object] = {}
    for name, (since, until) in phases.items():
        of = sorted(push.seconds for push in sent if since <= push.at < until)
        if of:
            counts = Counter(push.status for push in sent if since <= push.at < until)
            found[name] = {
                "pushes": len(of),
                **counts,
                "repeated": sum(push.again for push in sent if since <= push.at < until),
                "p50_ms": round(of[len(of) // 2] * 1000, 1),
                "p99_ms": round(of[len(of) * 99 // 100] * 1000, 1),
                "max_ms": round(of[-1] * 1000, 1),
            }
    buffered = [push.at + push.seconds for push in sent if push.status == "buffered"]
    found["most spooled"] = course.most_pending
    if buffered:
        found["first buffered after s"] = round(min(buffered) - course.ended_at, 2)
    found["spool empty after s"] = round(course.empty_at - course.resumed_at, 2)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="perf.outage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--how", choices=("stop", "kill", "freeze"), default="stop")
    parser.add_argument("--before", type=float, default=5.0, help="seconds of pushes before")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the outage")
    parser.add_argument("--after", type=float, default=10.0, help="seconds of pushes after")
    parser.add_argument("--rate", type=float, default=500.0, help="messages a second, one a push")
    parser.add_argument("--partitions", type=int, default=64)
    parser.add_argument("--producers", type=int, default=16)
    parser.add_argument("--consumers", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker-every", type=float, default=0.0, metavar="SECONDS", help="kill a worker; 0: never")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000), help="of choices, not of timing")
    given = parser.parse_args()
    outage = Outage(given.how, given.before, given.seconds, given.after)
    options = Options(
        messages=int(given.rate * (given.before + given.seconds + given.after)),
        partitions=given.partitions,
        producers=given.producers,
        consumers=given.consumers,
        batch=500,
        spread=10,
        workers=given.workers,
        lease_seconds=5,
        nack=0.02,
        rate=given.rate,
        worker_every=given.worker_every,
        postgres_every=0.0,
        supervisor_every=0.0,
        stop_every=0.0,
        limit_seconds=given.before + given.seconds + given.after + 300,
        seed=given.seed,
    )
    ledger = Ledger(options.partitions, options.lease_seconds)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either way, no server is left behind
    began = time.monotonic()
    found: dict[str, object] = {}
    try:
        found = trio.run(partial(run, options, outage, ledger))
    finally:
        summary = {"seconds": round(time.monotonic() - began, 1), "seed": options.seed, **ledger.counts, **found}
        print(json.dumps({**summary, "violations": len(ledger.violations)}))
        for sentence in ledger.violations[:20]:
            print(sentence, flush=True)
    return 1 if ledger.violations else 0


if __name__ == "__main__":
    sys.exit(main())
