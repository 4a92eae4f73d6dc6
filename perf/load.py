"""Closed and open loops over many connections, and what they counted. No processes, no tables.

Closed loop: every connection sends its next request when the last was answered; for throughput. Its latencies say how
long a request took at full load and nothing more (a slow server is asked less often: coordinated omission).
Open loop: requests have intended times, fixed beforehand; latency counts from the intended time, so a stall is felt by
every request that should have been sent meanwhile (Gil Tene, "How NOT to Measure Latency").
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from perf.bodies import PushBodies, identities
from perf.wire import Connection, Disconnected, get, post

QUEUED = b'"status":"queued"'
PAYLOAD = b'"r":'  # one per message: no key of an answer has this name
RECONNECT_SECONDS = 0.1


@dataclass
class Outcome:
    """What a loop did. Times in nanoseconds of ``perf_counter_ns``; latencies one per counted request."""

    started: int = field(default_factory=time.perf_counter_ns)
    last_answer: int = 0  # when the last answer that carried messages was complete
    messages: int = 0
    requests: int = 0  # answered, with or without messages
    empty: int = 0  # answered without messages
    sent_messages: int = 0  # push only: in requests that were answered
    body_bytes: int = 0
    latencies: list[int] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    seen: list[bytes] | None = None  # bodies kept for checking identities; None: not kept

    @property
    def seconds(self) -> float:
        """From the start to the last answer that carried messages."""
        return max(self.last_answer - self.started, 1) / 1e9

    @property
    def rate(self) -> float:
        """Messages a second."""
        return self.messages / self.seconds

    def percentile_ms(self, percent: float) -> float:
        """A latency percentile, nearest rank; 0 without requests."""
        if not self.latencies:
            return 0.0
        ordered = sorted(self.latencies)
        rank = min(len(ordered) - 1, int(len(ordered) * percent / 100))
        return ordered[rank] / 1e6

    def note(self, began: int, messages: int, connection: Connection) -> None:
        """Count one answered request."""
        now = time.perf_counter_ns()
        self.requests += 1
        self.body_bytes += connection.body_bytes
        if messages:
            self.latencies.append(now - began)
            self.messages += messages
            self.last_answer = now
        else:
            self.empty += 1


class Pacer:
    """Intended send times, handed out in order to whichever connection is free next."""

    def __init__(self, per_second: float) -> None:
        self._interval = 1 / per_second
        self._next = trio.current_time()

    async def wait_turn(self) -> int:
        """Wait for the next intended time and return it; who comes late gets the time that should have been."""
        intended = self._next
        self._next += self._interval
        await trio.sleep_until(intended)
        # Trio's clock and perf_counter_ns have different origins: carry the lateness over, not the time.
        return time.perf_counter_ns() - int((trio.current_time() - intended) * 1e9)


async def push(
    url: str, bodies: PushBodies, *, batch: int, connections: int, seconds: float, pacer: Pacer | None = None
) -> Outcome:
    """Push for ``seconds``; requests under way at the end are finished and counted. Closed loop unless paced."""
    outcome = Outcome()
    stop = trio.current_time() + seconds

    async def producer(connection: Connection) -> None:
        while trio.current_time() < stop:
            body = bodies.next()
            began = time.perf_counter_ns() if pacer is None else await pacer.wait_turn()
            status = await connection.exchange(bodies.head, body)
            outcome.sent_messages += batch
            if status != 201:
                outcome.errors[f"status {status}: {connection.body()[:200]!r}"] += 1
                continue
            stored = connection.count(QUEUED)
            if stored != batch:
                outcome.errors[f"{batch - stored} of a request not stored"] += 1
            outcome.note(began, stored, connection)

    await _on_connections(url, connections, producer, outcome, stop)
    return outcome


async def push_messages(url: str, bodies: PushBodies, *, batch: int, connections: int, messages: int) -> Outcome:
    """Push at least ``messages``, rounded up to whole requests."""
    outcome = Outcome()
    requests = -(-messages // batch)

    async def producer(connection: Connection) -> None:
        nonlocal requests
        while requests > 0:
            requests -= 1
            body = bodies.next()
            began = time.perf_counter_ns()
            status = await connection.exchange(bodies.head, body)
            outcome.sent_messages += batch
            if status != 201:
                outcome.errors[f"status {status}: {connection.body()[:200]!r}"] += 1
                continue
            outcome.note(began, connection.count(QUEUED), connection)

    await _on_connections(url, min(connections, requests), producer, outcome, trio.current_time() + 600)
    return outcome


async def pop(
    url: str,
    queue: str,
    *,
    batch: int,
    connections: int,
    seconds: float,
    expected: int | None = None,
    auto_ack: bool = True,
    wait: bool = True,
    partitions: int = 1,
    group: str | None = None,
    keep: bool = False,
    pacer: Pacer | None = None,
) -> Outcome:
    """Pop until ``expected`` messages came or ``seconds`` are over; without autoAck every batch is acked.

    A request under way when the time is over is abandoned with its connection; one that got nothing is not a latency.

    Args:
        partitions: how many partitions one pop may claim.
        keep: keep every body in ``Outcome.seen``, to check identities afterwards.
    """
    outcome = Outcome(seen=[] if keep else None)
    path = f"/api/v1/pop/queue/{queue}?batch={batch}&partitions={partitions}"
    path += "&autoAck=true" * auto_ack + "&wait=true&timeout=1000" * wait
    if group is not None:
        path += f"&consumerGroup={group}"
    request = get(url, path)
    stop = trio.current_time() + seconds

    async def consumer(connection: Connection) -> None:
        while trio.current_time() < stop and (expected is None or outcome.messages < expected):
            began = time.perf_counter_ns() if pacer is None else await pacer.wait_turn()
            status = await connection.exchange(request)
            if status not in (200, 204):
                outcome.errors[f"status {status}: {connection.body()[:200]!r}"] += 1
                continue
            messages = connection.count(PAYLOAD) if status == 200 else 0
            if messages and outcome.seen is not None:
                outcome.seen.append(connection.body())
            if messages and not auto_ack:
                # The latency of a leased pop includes its ack, as a consumer lives it.
                await _ack(url, connection, group, outcome)
            outcome.note(began, messages, connection)
            if expected is not None and outcome.messages >= expected:
                scope.cancel()  # the others are parked and would wait for nothing

    with trio.move_on_at(stop + 1) as scope:
        await _on_connections(url, connections, consumer, outcome, stop)
    return outcome


_TRANSACTION_ID = re.compile(rb'"transactionId":"([^"]*)"')
_PARTITION_ID = re.compile(rb'"partitionId":"([^"]*)"')
_LEASE_ID = re.compile(rb'"leaseId":"([^"]*)"')


async def _ack(url: str, connection: Connection, group: str | None, outcome: Outcome) -> None:
    """Ack all messages of the body just popped; it must be of one partition."""
    body = connection.body()
    partition, lease = _PARTITION_ID.search(body), _LEASE_ID.search(body)
    ids = _TRANSACTION_ID.findall(body)
    if partition is None or lease is None or not ids:
        raise Disconnected(f"a popped body without ids: {body[:200]!r}")
    rest = b'","partitionId":"%b","leaseId":"%b"}' % (partition[1], lease[1])
    items = b'{"transactionId":"' + (rest + b',{"transactionId":"').join(ids) + rest
    tail = b"" if group is None else b',"consumerGroup":"%b"' % group.encode()
    status = await connection.exchange(post(url, "/api/v1/ack/batch", b'{"acknowledgments":[%b]%b}' % (items, tail)))
    if status != 200 or connection.count(b'"success":true') != len(ids):
        outcome.errors[f"ack: status {status}: {connection.body()[:200]!r}"] += 1


async def _on_connections(
    url: str, count: int, work: Callable[[Connection], object], outcome: Outcome, stop: float
) -> None:
    """Run ``work`` on ``count`` connections opened beforehand; a broken connection is counted and opened again."""

    async def run(connection: Connection | None) -> None:
        while True:
            try:
                if connection is None:
                    connection = await Connection.open(url)
                await work(connection)  # type: ignore[misc]
            except (OSError, Disconnected) as error:
                outcome.errors[f"{type(error).__name__}: {error}"] += 1
            else:
                return
            finally:
                if connection is not None:
                    connection.close()
                connection = None
            if trio.current_time() >= stop:
                return
            await trio.sleep(RECONNECT_SECONDS)

    opened = [await Connection.open(url) for _ in range(count)]
    outcome.started = time.perf_counter_ns()
    async with trio.open_nursery() as nursery:
        for connection in opened:
            nursery.start_soon(run, connection)


def check_identities(outcomes: list[Outcome], expected: int) -> None:
    """Raise ValueError unless the kept bodies hold ``expected`` distinct messages, each request's in order."""
    seen: set[tuple[int, int]] = set()
    count = 0
    for outcome in outcomes:
        for body in outcome.seen or ():
            last: dict[int, int] = {}
            for request, position in identities(body):
                if position <= last.get(request, -1):
                    raise ValueError(f"order broken in one answer: request {request}, position {position}")
                last[request] = position
                seen.add((request, position))
                count += 1
    if count != len(seen):
        raise ValueError(f"{count - len(seen)} messages were delivered twice")
    if count != expected:
        raise ValueError(f"{expected} messages expected, {count} delivered")


def tell(outcome: Outcome, verb: str, cpu_seconds: float) -> int:
    """Print an outcome; returns the exit code: 1 when anything was answered with an error."""
    print(
        f"{outcome.messages:,} messages {verb} in {outcome.seconds:.2f} s: {outcome.rate:,.0f}/s; "
        f"{outcome.requests:,} requests ({outcome.empty:,} empty), "
        f"p50 {outcome.percentile_ms(50):.1f} ms, p99 {outcome.percentile_ms(99):.1f} ms; "
        f"generator {cpu_seconds / max(outcome.messages, 1) * 1e6:.2f} CPU-µs a message"
    )
    for what, count in outcome.errors.most_common():
        print(f"{count:,} times {what}")
    return 1 if outcome.errors else 0
