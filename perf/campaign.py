"""A campaign: producers and consumers over HTTP while processes are killed underneath, and a ledger that checks it all.

python -m perf.campaign                                  1,000,000 messages, a worker killed every 5 s
python -m perf.campaign --postgres-every 40 --supervisor-every 60 --stop-every 90

The ledger knows each message from the producer's hand to the acknowledgement, and tells of: an answered push that never
arrives, a message delivered twice within its order or after its ack was answered, a gap, a lease given to two, an ack
refused within its lease. Exit code 1 if it has anything to tell. Speed is not measured here; with a kill every few
seconds it means little.
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
import uuid
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import trio

from perf import procstat
from perf.server import PROJECT, free_port, tail
from perf.wire import Connection, Disconnected, get, post

QUEUE = "campaign"
GROUP = "ledger"
READY = b'worker ready"'  # in the log: of one that serves, and of a spare
RETRY_SECONDS = 0.05
EXCHANGE_SECONDS = 30.0  # a slot's backlog waits for its next worker: slower than this is a finding
START_SECONDS = 60.0
STOP_SECONDS = 60.0
CLOCK_SLACK_SECONDS = 0.25  # the lease is PostgreSQL's, the stop watch ours; both run on this machine


class Payload(msgspec.Struct):
    p: int  # partition
    n: int  # position in it, from 0


class Popped(msgspec.Struct, rename="camel"):
    transaction_id: str
    partition_id: str
    lease_id: str
    data: Payload


class PopAnswer(msgspec.Struct):
    messages: list[Popped]


class PushVerdict(msgspec.Struct):
    status: str
    transaction_id: str


class AckVerdict(msgspec.Struct):
    success: bool
    error: str | None = None


class Run(msgspec.Struct):
    """Messages of one partition that one pop delivered."""

    partition: int
    first: int
    end: int
    popped_at: float  # when the pop was sent: its lease cannot have begun earlier


class Partition:
    """What is known of one partition from outside."""

    def __init__(self) -> None:
        self.sent = 0  # messages that a producer has tried to push
        self.pushed = 0  # messages whose push was answered 2xx
        self.delivered = 0  # end of what has been delivered
        self.maybe_acked = 0  # end of what an ack was sent for, whatever became of it
        self.acked: list[tuple[int, int]] = [(0, 0)]  # (event, end): acks answered with success, both growing
        self.holder: Run | None = None


class Ledger:
    """The checker. Pure: told in the order things happen, it collects what must not be."""

    def __init__(self, partitions: int, lease_seconds: float) -> None:
        self.partitions = [Partition() for _ in range(partitions)]
        self.lease_seconds = lease_seconds
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()
        self.event = 0  # grows with each answered ack: tells which came before which pop

    def sending(self, partition: int, count: int) -> None:
        self.partitions[partition].sent += count

    def pushed(self, partition: int, count: int) -> None:
        self.partitions[partition].pushed += count
        self.counts["pushed"] += count

    def delivered(self, messages: Sequence[Payload], event: int, popped_at: float, now: float) -> list[Run]:
        """An answer to a pop that was sent at ``popped_at``, when ``event`` acks had been answered."""
        runs: list[Run] = []
        for message in messages:
            if runs and runs[-1].partition == message.p:
                if message.n != runs[-1].end:
                    self.wrong(f"partition {message.p}: {message.n} follows {runs[-1].end - 1} in one answer")
                runs[-1].end = message.n + 1
            else:
                runs.append(Run(message.p, message.n, message.n + 1, popped_at))
        for run in runs:
            self._check(run, event, now)
        self.counts["delivered"] += len(messages)
        return runs

    def _check(self, run: Run, event: int, now: float) -> None:
        at = self.partitions[run.partition]
        known = at.acked[bisect_right(at.acked, event, key=lambda entry: entry[0]) - 1][1]
        if run.first < known:
            self.wrong(f"partition {run.partition}: {run.first} delivered after acks up to {known} were answered")
        if run.first > at.maybe_acked:
            self.wrong(f"partition {run.partition}: {run.first} delivered, {at.maybe_acked} skipped")
        if run.end > at.sent:
            self.wrong(f"partition {run.partition}: {run.end - 1} delivered, which nobody pushed")
        if at.holder is not None and now < at.holder.popped_at + self.lease_seconds - CLOCK_SLACK_SECONDS:
            self.wrong(f"partition {run.partition}: {run.first} delivered while {at.holder.first} was under a lease")
        if run.first < at.delivered:
            self.counts["redelivered"] += min(at.delivered, run.end) - run.first
        at.delivered = max(at.delivered, run.end)
        at.holder = run

    def settling(self, run: Run, *, ack: bool) -> None:
        """An ack, or a nack, is on its way: from now on the server may give the partition to others."""
        at = self.partitions[run.partition]
        if at.holder is run:
            at.holder = None
        if ack:
            at.maybe_acked = max(at.maybe_acked, run.end)

    def acked(self, run: Run, verdicts: Sequence[AckVerdict], *, retried: bool, now: float) -> None:
        """The answer to the acks of one run."""
        refused = [verdict.error for verdict in verdicts if not verdict.success]
        if not refused:
            at = self.partitions[run.partition]
            self.event += 1
            at.acked.append((self.event, max(run.end, at.acked[-1][1])))
            self.counts["acked"] += len(verdicts)
        elif now >= run.popped_at + self.lease_seconds - CLOCK_SLACK_SECONDS:
            self.counts["ack runs refused after their lease"] += 1
        elif retried:
            self.counts["ack runs refused when repeated"] += 1
        else:
            self.wrong(f"partition {run.partition}: ack of {run.first}-{run.end - 1} refused in time: {refused[0]}")

    def wrong(self, sentence: str) -> None:
        self.violations.append(sentence)

    @property
    def drained(self) -> bool:
        """Whether an ack was at least sent for everything."""
        return all(at.maybe_acked >= at.pushed for at in self.partitions)

    def close(self, wanted: int) -> None:
        """The end: everything that was answered must have come out."""
        if self.counts["pushed"] != wanted:
            self.wrong(f"{self.counts['pushed']} of {wanted} messages were pushed")
        lost = sum(max(0, at.pushed - at.delivered) for at in self.partitions)
        if lost:
            self.wrong(f"{lost} messages whose push was answered were never delivered")


class Client:
    """One connection that is made anew when it breaks; an exchange is repeated until it has an answer."""

    def __init__(self, url: str, ledger: Ledger) -> None:
        self.url = url
        self._ledger = ledger
        self._connection: Connection | None = None

    async def exchange(self, request: bytes, *, repeat: bool = True) -> tuple[int, bytes, bool]:
        """Status, body, and whether it was sent more than once. Status 0: not repeated, and no answer.

        Raises:
            AssertionError: the server says that the request is wrong.
        """
        again = False
        while True:
            with trio.move_on_after(EXCHANGE_SECONDS) as limit:
                try:
                    if self._connection is None:
                        self._connection = await Connection.open(self.url)
                    status = await self._connection.exchange(request)
                    if status < 500:
                        body = self._connection.body()
                        assert status < 400, f"{status}: {body.decode(errors='replace')}"
                        return status, body, again
                    self._ledger.counts[f"answers {status}"] += 1
                except (OSError, Disconnected):
                    self._ledger.counts["connections lost"] += 1
                    self.close()
            if limit.cancelled_caught:
                self._ledger.wrong(f"no answer within {EXCHANGE_SECONDS} s: {request[:80]!r}")
                self.close()
            if not repeat:
                return 0, b"", again
            again = True
            await trio.sleep(RETRY_SECONDS)

    async def look(self, request: bytes) -> tuple[int, bytes]:
        """One exchange, not repeated, whatever the status; status 0: no answer."""
        with trio.move_on_after(EXCHANGE_SECONDS):
            try:
                if self._connection is None:
                    self._connection = await Connection.open(self.url)
                status = await self._connection.exchange(request)
                return status, self._connection.body()
            except (OSError, Disconnected):
                pass
        self.close()
        return 0, b""

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Options(msgspec.Struct, frozen=True):
    messages: int
    partitions: int
    producers: int
    consumers: int
    batch: int
    spread: int  # partitions of one push
    workers: int
    lease_seconds: int
    nack: float  # share of deliveries
    rate: float  # messages a second over all producers; 0: as fast as it goes
    worker_every: float
    postgres_every: float
    supervisor_every: float
    stop_every: float
    limit_seconds: float
    seed: int


async def produce(url: str, ledger: Ledger, options: Options, number: int) -> None:
    """One producer: its share of the partitions, each in order, ids of its own that a retry repeats."""
    draw = random.Random(options.seed * 1000 + number)
    client = Client(url, ledger)
    share = [
        [partition, options.messages // options.partitions + (partition < options.messages % options.partitions)]
        for partition in range(number, options.partitions, options.producers)
    ]
    next_number = dict.fromkeys(range(options.partitions), 0)
    began, done = trio.current_time(), 0
    while share := [entry for entry in share if entry[1]]:
        chosen = draw.sample(share, min(options.spread, len(share)))
        items, counts = [], []
        for entry in chosen:
            partition, left = entry
            count = min(left, -(-options.batch // len(chosen)))
            entry[1] -= count
            counts.append((partition, count))
            for n in range(next_number[partition], next_number[partition] + count):
                # Half of the producers name messages the way that is checked by range, half the way of order numbers.
                name = str(uuid7()) if number % 2 else f"order-{partition}-{n}"
                items.append(
                    {
                        "queue": QUEUE,
                        "partition": str(partition),
                        "transactionId": name,
                        "payload": Payload(partition, n),
                    }
                )
            next_number[partition] += count
            ledger.sending(partition, count)
        _, body, again = await client.exchange(post(url, "/api/v1/push", msgspec.json.encode({"items": items})))
        verdicts = msgspec.json.decode(body, type=list[PushVerdict])
        if [verdict.transaction_id for verdict in verdicts] != [item["transactionId"] for item in items]:
            ledger.wrong(f"a push of {len(items)} was answered with {len(verdicts)} verdicts or other ids")
        statuses = Counter(verdict.status for verdict in verdicts)
        if set(statuses) - {"queued", "buffered"} - ({"duplicate"} if again else set()):
            ledger.wrong(f"a push was answered {dict(statuses)}, sent {'again' if again else 'once'}")
        ledger.counts["pushes spooled"] += "buffered" in statuses
        ledger.counts["pushes found stored when repeated"] += "duplicate" in statuses
        for partition, count in counts:
            ledger.pushed(partition, count)
        done += len(items)
        if options.rate:
            await trio.sleep_until(began + done * options.producers / options.rate)
    client.close()


async def consume(url: str, ledger: Ledger, options: Options, number: int) -> None:
    """One consumer, until cancelled: pop under a lease, check, ack; now and then nack."""
    draw = random.Random(options.seed * 2000 + number)
    client = Client(url, ledger)
    pop = get(
        url,
        f"/api/v1/pop/queue/{QUEUE}?batch={options.batch}&partitions={options.spread}"
        f"&consumerGroup={GROUP}&wait=true&timeout=1000",
    )
    try:
        while True:
            event, popped_at = ledger.event, trio.current_time()
            status, body, _ = await client.exchange(pop, repeat=False)
            if status != 200:
                await trio.sleep(0 if status else RETRY_SECONDS)
                continue
            messages = msgspec.json.decode(body, type=PopAnswer).messages
            runs = ledger.delivered([message.data for message in messages], event, popped_at, trio.current_time())
            if draw.random() < options.nack:
                ledger.counts["nacks"] += 1
                for run in runs:
                    ledger.settling(run, ack=False)
                await settle(client, [first_of(messages, run) for run in runs], "failed")
                continue
            for run in runs:
                ledger.settling(run, ack=True)
            verdicts, again = await settle(client, messages, "completed")
            at = 0
            for run in runs:
                size = run.end - run.first
                ledger.acked(run, verdicts[at : at + size], retried=again, now=trio.current_time())
                at += size
    finally:
        client.close()


def first_of(messages: Sequence[Popped], run: Run) -> Popped:
    return next(message for message in messages if (message.data.p, message.data.n) == (run.partition, run.first))


async def settle(client: Client, messages: Sequence[Popped], status: str) -> tuple[list[AckVerdict], bool]:
    acknowledgments = [
        {
            "transactionId": message.transaction_id,
            "partitionId": message.partition_id,
            "leaseId": message.lease_id,
            "status": status,
        }
        for message in messages
    ]
    body = msgspec.json.encode({"acknowledgments": acknowledgments, "consumerGroup": GROUP})
    _, answer, again = await client.exchange(post(client.url, "/api/v1/ack/batch", body))
    return msgspec.json.decode(answer, type=list[AckVerdict]), again


def uuid7() -> uuid.UUID:
    """A UUIDv7 of now (RFC 9562); Python has one from 3.14 on."""
    value = time.time_ns() // 1_000_000 << 80 | random.getrandbits(80)
    return uuid.UUID(int=value & ~(0xF << 76) & ~(0b11 << 62) | 7 << 76 | 0b10 << 62)


class Victim:
    """The server under test: one data directory and one port over all its lives."""

    def __init__(self, directory: Path, options: Options, ledger: Ledger) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / "log"
        self.where: tuple[str, ...] = ("--data-dir", str(directory / "data"))
        self._options = options
        self._ledger = ledger
        self._process: trio.Process | None = None
        self._ready_wanted = 0  # reports of a worker that serves, over all lives

    @property
    def process(self) -> trio.Process:
        assert self._process is not None
        return self._process

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Start it; on leaving, stop it and check that it does so cleanly."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await self.start()
            try:
                yield
                await self.stop()
            finally:
                nursery.cancel_scope.cancel()

    async def start(self) -> None:
        command = [sys.executable, "-m", "queen", "run", *self.where, "--port", str(self.port)]
        self._ready_wanted = self._log_count(READY) + self._options.workers
        listening_before = self._log_count(b" listening on http")
        with self.log.open("ab") as output:
            self._process = await self._nursery.start(
                partial(
                    trio.run_process,
                    [*command, "--workers", str(self._options.workers)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=PROJECT,
                    env={**os.environ, "LOG_FORMAT": "json"},
                    check=False,
                    deliver_cancel=self._end,
                )
            )
        began = trio.current_time()
        while self._log_count(b" listening on http") == listening_before:
            if self.process.poll() is not None or trio.current_time() > began + START_SECONDS:
                raise RuntimeError(f"the server did not start: exit {self.process.returncode}\n{tail(self.log)}")
            await trio.sleep(0.02)
        self._ledger.counts["starts"] += 1
        slowest = round((trio.current_time() - began) * 1000)
        self._ledger.counts["slowest start, ms"] = max(slowest, self._ledger.counts["slowest start, ms"])

    def _log_count(self, needle: bytes) -> int:
        return self.log.read_bytes().count(needle) if self.log.exists() else 0

    async def wait_whole(self) -> None:
        """Until all workers serve. Killing those that only boot would tell how fast this machine boots, no more."""
        while self._log_count(READY) < self._ready_wanted:  # noqa: ASYNC110  # another process's log
            await trio.sleep(0.05)

    async def _end(self, process: trio.Process) -> None:
        process.terminate()
        await trio.sleep(STOP_SECONDS)
        process.kill()

    def _named(self, name: str) -> list[int]:
        return [
            process.pid
            for process in procstat.tree(self.process.pid)
            if process.parent == self.process.pid and name in command_of(process.pid)
        ]

    async def kill_worker(self) -> None:
        if workers := self._named("queen.worker"):  # none for a moment after a kill before
            self._ready_wanted = self._log_count(READY) + 1
            os.kill(random.choice(workers), signal.SIGKILL)
            self._ledger.counts["workers killed"] += 1

    async def restart_postgres(self) -> None:
        """Fast, immediate or by SIGKILL in turn; the supervisor starts it again."""
        number = (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)[self._ledger.counts["PostgreSQL ended"] % 3]
        if servers := self._named("/postgres"):
            os.kill(servers[0], number)
            self._ledger.counts["PostgreSQL ended"] += 1

    async def kill_supervisor(self) -> None:
        workers = self._named("queen.worker")
        self.process.kill()
        await self.process.wait()
        with trio.move_on_after(2) as limit:
            while any(is_alive(pid) for pid in workers):  # noqa: ASYNC110  # strangers' ends raise no event
                await trio.sleep(0.01)
        if limit.cancelled_caught:
            self._ledger.wrong("workers outlived their supervisor by 2 s")
        self._ledger.counts["supervisors killed"] += 1
        await self.start()

    async def restart(self) -> None:
        await self.stop()
        self._ledger.counts["clean restarts"] += 1
        await self.start()

    async def stop(self) -> None:
        family = [process.pid for process in procstat.tree(self.process.pid)]
        self.process.send_signal(signal.SIGTERM)
        with trio.move_on_after(STOP_SECONDS):
            await self.process.wait()
        if self.process.poll() != 0:
            self._ledger.wrong(f"the server did not stop cleanly: exit {self.process.returncode}")
        if left := [pid for pid in family if is_alive(pid)]:
            self._ledger.wrong(f"processes left after a stop: {left}")


def is_alive(pid: int) -> bool:
    """Whether that process runs; one that has ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


async def inflict(victim: Victim, options: Options) -> None:
    """Do each kind of harm at its interval, one at a time, until cancelled."""
    kinds: list[tuple[float, Callable[[], object]]] = [
        (every, harm)
        for every, harm in (
            (options.worker_every, victim.kill_worker),
            (options.postgres_every, victim.restart_postgres),
            (options.supervisor_every, victim.kill_supervisor),
            (options.stop_every, victim.restart),
        )
        if every
    ]
    began = trio.current_time()
    due = [began + every for every, _ in kinds]
    while kinds:
        which = min(range(len(kinds)), key=due.__getitem__)
        await trio.sleep_until(due[which])
        every, harm = kinds[which]
        await victim.wait_whole()
        await harm()  # type: ignore[misc]
        due[which] = max(due[which] + every, trio.current_time())


async def run(options: Options, ledger: Ledger) -> None:
    """The whole campaign; closes the ledger."""
    directory = Path(tempfile.mkdtemp(prefix="queen-campaign-"))
    os.chmod(directory, 0o755)  # as root, PostgreSQL runs as another user
    victim = Victim(directory, options, ledger)
    try:
        async with victim.open():
            configure = {"leaseTime": options.lease_seconds, "retryLimit": 1_000_000}
            body = msgspec.json.encode({"queue": QUEUE, "options": configure})
            await Client(victim.url, ledger).exchange(post(victim.url, "/api/v1/configure", body))
            with trio.move_on_after(options.limit_seconds) as limit:
                async with trio.open_nursery() as consumers:
                    for number in range(options.consumers):
                        consumers.start_soon(consume, victim.url, ledger, options, number)
                    async with trio.open_nursery() as harm:
                        harm.start_soon(inflict, victim, options)
                        harm.start_soon(report, ledger)
                        async with trio.open_nursery() as producers:
                            for number in range(options.producers):
                                producers.start_soon(produce, victim.url, ledger, options, number)
                        await wait_drained(ledger)
                        harm.cancel_scope.cancel()
                    if victim.process.poll() is not None:
                        await victim.start()  # the harm was cut short between an end and a start
                    await settle_down(ledger, options)
                    consumers.cancel_scope.cancel()
            if limit.cancelled_caught:
                ledger.wrong(f"not done within {options.limit_seconds} s")
        ledger.close(options.messages)
        if ledger.violations:
            print(tail(victim.log, 60), file=sys.stderr)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def wait_drained(ledger: Ledger) -> None:
    while not ledger.drained:  # noqa: ASYNC110  # the ledger is pure: it knows no events
        await trio.sleep(0.1)


async def settle_down(ledger: Ledger, options: Options) -> None:
    """For a lease longer than it takes: an ack that was lost shows as one more delivery."""
    while True:
        await wait_drained(ledger)
        delivered = ledger.counts["delivered"]
        await trio.sleep(options.lease_seconds + 1)
        if ledger.drained and ledger.counts["delivered"] == delivered:
            return


async def report(ledger: Ledger) -> None:
    while True:
        await trio.sleep(10)
        print(dict(ledger.counts), f"{len(ledger.violations)} violations", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="perf.campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--partitions", type=int, default=1000)
    parser.add_argument("--producers", type=int, default=4)
    parser.add_argument("--consumers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=500, help="messages of a push, and at most of a pop")
    parser.add_argument("--spread", type=int, default=10, help="partitions of a push, and at most of a pop")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--lease-seconds", type=int, default=10)
    parser.add_argument("--nack", type=float, default=0.02, help="share of deliveries that are nacked")
    parser.add_argument("--rate", type=float, default=0.0, help="messages pushed a second; 0: as fast as it goes")
    parser.add_argument("--worker-every", type=float, default=5.0, metavar="SECONDS", help="kill a worker; 0: never")
    parser.add_argument("--postgres-every", type=float, default=0.0, metavar="SECONDS", help="end PostgreSQL")
    parser.add_argument(
        "--supervisor-every", type=float, default=0.0, metavar="SECONDS", help="kill all but PostgreSQL"
    )
    parser.add_argument("--stop-every", type=float, default=0.0, metavar="SECONDS", help="stop and start cleanly")
    parser.add_argument("--limit-seconds", type=float, default=1800.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000), help="of choices, not of timing")
    options = Options(**vars(parser.parse_args()))
    ledger = Ledger(options.partitions, options.lease_seconds)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either way, no server is left behind
    began = time.monotonic()
    try:
        trio.run(run, options, ledger)
    finally:
        summary = {"seconds": round(time.monotonic() - began, 1), "seed": options.seed, **ledger.counts}
        print(json.dumps({**summary, "violations": len(ledger.violations)}))
        for sentence in ledger.violations[:20]:
            print(sentence, flush=True)
    return 1 if ledger.violations else 0


if __name__ == "__main__":
    sys.exit(main())
