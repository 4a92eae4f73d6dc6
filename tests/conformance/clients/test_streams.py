"""Conformance section 10: the streaming SDK against a live server: windows, reducers, gates, recovery.

Windows over processing time need events that are apart in time, so these tests let time pass between pushes; what
they wait for is polled with a deadline.
"""

from __future__ import annotations

import asyncio
import importlib
import signal
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from .support import IS_2, Broker, Message, data

Stream: Any = importlib.import_module("queen.streams").Stream
Runner: Any = importlib.import_module("queen.streams.runtime").Runner
gates: Any = importlib.import_module("queen.streams.helpers")

POLL_SECONDS = 0.05

RUNNER_TO_KILL = """
import asyncio, sys
from queen import Queen
from queen.streams import Stream

async def main():
    url, source, sink, query = sys.argv[1:]
    client = Queen(url=url)
    stream = (
        Stream.from_(client.queue(source))
        .window_tumbling(seconds=10, event_time=lambda m: m["data"]["at"], idle_flush_ms=0)
        .aggregate({"count": lambda v: 1, "sum": lambda v: v["n"]})
        .to(client.queue(sink))
    )
    await stream.run(query_id=query, url=url, batch_size=7, max_partitions=2, max_wait_millis=200)
    print("running", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def running(broker: Broker, stream: Any, query: str, **options: Any) -> AsyncIterator[Any]:
    """A runner for the length of the block, which must have met no error by its end."""
    errors: list[str] = []
    options = {"max_wait_millis": 500} | options
    runner = await stream.run(
        query_id=query, url=broker.url, on_error=lambda error, context: errors.append(f"{context}: {error}"), **options
    )
    try:
        yield runner
    finally:
        await runner.stop()
    assert errors == []
    assert runner.metrics()["errorsTotal"] == 0


async def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Poll for what another task or process brings about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(POLL_SECONDS)


def flush_ms(milliseconds: int) -> int:
    """How often quiet windows are flushed.

    In 0.15 the flush and the cycles of one runner do not wait for each other: a window that both have read is emitted
    twice, whatever the server does (2.x has a lock for it). Seldom flushes seldom meet a cycle.
    """
    return milliseconds if IS_2 else 6 * milliseconds


class Sink:
    """Reads a sink queue as an ordinary consumer group and keeps what it got."""

    def __init__(self, broker: Broker, queue: str) -> None:
        self.queue = queue
        self.messages: list[Message] = []
        self._broker = broker

    async def collect(self, enough: Callable[[], bool], seconds: float = 30) -> None:
        """Read until there is enough, and then once more: what comes twice has come by then."""
        deadline = time.monotonic() + seconds
        while not enough():
            assert time.monotonic() < deadline, f"{self.queue} has only {self.messages[-5:]}"
            await self._take(1.0)
        await self._take(0.5)

    async def _take(self, seconds: float) -> None:
        messages = await self._broker.wait_pop(self.queue, 500, seconds, group="check", partitions=50)
        if messages:
            await self._broker.ack(messages, group="check")
            self.messages += messages

    @property
    def data(self) -> list[Any]:
        return data(self.messages)

    def total(self, field: str) -> float:
        return float(sum(value[field] for value in self.data))

    def by_partition(self, field: str) -> dict[str, float]:
        totals: dict[str, float] = defaultdict(int)
        for message in self.messages:
            totals[message["partition"]] += message["data"][field]
        return dict(totals)


async def push(broker: Broker, queue: str, *values: Any, partition: str | None = None) -> None:
    builder = broker.client.queue(queue)
    if partition is not None:
        builder = builder.partition(partition)
    await builder.push([{"data": value} for value in values])


def source_and_sink(broker: Broker) -> tuple[str, Sink, str]:
    """Names of a source and a query, and a sink."""
    return broker.name("-source"), Sink(broker, broker.name("-sink")), broker.name("-query")


def amount(value: Any) -> Any:
    """An extractor: reducers are given payloads, all other functions whole messages."""
    return value["amount"]


def number(value: Any) -> Any:
    return value["n"]


def one(_: Any) -> int:
    return 1


def event_time(message: Message) -> Any:
    return message["data"]["at"]


# -- without state ------------------------------------------------------------------------------------------------


async def test_stream_map_filter_sink(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)
    await push(broker, source, *({"n": n} for n in range(30)))
    stream = (
        Stream.from_(broker.client.queue(source))
        .filter(lambda m: m["data"]["n"] % 3 != 0)
        .map(lambda m: {"n": m["data"]["n"], "marked": True})
        .to(broker.client.queue(sink.queue))
    )

    async with running(broker, stream, query):
        await sink.collect(lambda: len(sink.messages) >= 20)

    assert sink.data == [{"n": n, "marked": True} for n in range(30) if n % 3 != 0]


async def test_stream_foreach_captures_all(broker: Broker) -> None:
    source, _, query = source_and_sink(broker)
    await push(broker, source, *range(12))
    seen: list[Any] = []

    async with running(broker, Stream.from_(broker.client.queue(source)).foreach(seen.append), query):
        await until(lambda: len(seen) >= 12)

    assert seen == list(range(12))


async def test_stream_key_by_does_not_crash(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)
    await push(broker, source, *({"user": n % 2, "n": n} for n in range(6)))
    stream = (
        Stream.from_(broker.client.queue(source))
        .key_by(lambda m: m["data"]["user"])
        .to(broker.client.queue(sink.queue))
    )

    async with running(broker, stream, query):
        await sink.collect(lambda: len(sink.messages) >= 6)

    assert [value["n"] for value in sink.data] == list(range(6))


async def test_stream_async_map(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)
    await push(broker, source, *range(5))

    async def double(message: Message) -> Any:
        await asyncio.sleep(0)
        return {"twice": 2 * message["data"]}

    stream = Stream.from_(broker.client.queue(source)).map(double).to(broker.client.queue(sink.queue))
    async with running(broker, stream, query):
        await sink.collect(lambda: len(sink.messages) >= 5)

    assert sink.data == [{"twice": 2 * n} for n in range(5)]


async def test_stream_flat_map_and_a_sink_partition_by_value(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)
    await push(broker, source, *range(1, 5))
    stream = (
        Stream.from_(broker.client.queue(source))
        .flat_map(lambda m: [{"n": m["data"], "part": part} for part in range(m["data"])])
        .to(broker.client.queue(sink.queue), partition=lambda value: f"part-{value['part']}")
    )

    async with running(broker, stream, query):
        await sink.collect(lambda: len(sink.messages) >= 10)

    got: dict[str, list[int]] = defaultdict(list)
    for message in sink.messages:
        got[message["partition"]].append(message["data"]["n"])
    assert got == {f"part-{part}": list(range(part + 1, 5)) for part in range(4)}


# -- tumbling -----------------------------------------------------------------------------------------------------


async def test_tumbling_basic_window_sum(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)
    stream = (
        Stream.from_(broker.client.queue(source))
        .window_tumbling(seconds=2, idle_flush_ms=flush_ms(1000))
        .aggregate({"count": one, "sum": amount})
        .to(broker.client.queue(sink.queue))
    )

    async with running(broker, stream, query):
        for n in range(1, 9):
            await push(broker, source, {"amount": n})
            await asyncio.sleep(1.1)
        await sink.collect(lambda: sink.total("count") >= 8)

    assert len(sink.messages) >= 3
    assert (sink.total("count"), sink.total("sum")) == (8, 36)


async def test_tumbling_per_partition_isolation(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)
    seen: dict[str, float] = defaultdict(int)
    partitions: set[tuple[str, str]] = set()

    def note(value: Any, ctx: Any) -> None:
        seen[ctx["partition"]] += value["sum"]
        partitions.add((ctx["partition"], ctx["partitionId"]))

    stream = (
        Stream.from_(broker.client.queue(source))
        .window_tumbling(seconds=1, idle_flush_ms=flush_ms(500))
        .aggregate({"sum": amount})
        .foreach(note)
    )
    for number, base in enumerate((100, 200, 300)):
        await push(broker, source, *({"amount": base + n} for n in range(6)), partition=f"p{number}")

    async with running(broker, stream, query):
        await until(lambda: sum(seen.values()) >= 615 + 1215 + 1815)

    assert seen == {"p0": 615, "p1": 1215, "p2": 1815}
    assert len(partitions) == 3
    assert sink.messages == []


async def test_tumbling_aggregate_all_stats(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)
    extractors = {"count": one, "sum": amount, "min": amount, "max": amount, "avg": amount}
    await push(broker, source, *({"amount": n, "at": 1_700_000_000_000 + n} for n in (10, 5, 30, 2, 3)))
    await push(broker, source, {"amount": 0, "at": 1_700_000_060_000})
    stream = (
        Stream.from_(broker.client.queue(source))
        .window_tumbling(seconds=10, event_time=event_time, on_late="include")
        .aggregate(extractors)
        .to(broker.client.queue(sink.queue))
    )

    async with running(broker, stream, query):
        await sink.collect(lambda: len(sink.messages) >= 1)

    [stats] = sink.data
    assert {name: stats[name] for name in extractors} == {"count": 5, "sum": 50, "min": 2, "max": 30, "avg": 10}


async def test_tumbling_idle_flush_closes_quiet_partitions(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)
    stream = (
        Stream.from_(broker.client.queue(source))
        .window_tumbling(seconds=1, idle_flush_ms=flush_ms(500))
        .aggregate({"count": one, "sum": amount})
        .to(broker.client.queue(sink.queue))
    )
    await push(broker, source, *({"amount": n} for n in (6, 7, 8)))

    async with running(broker, stream, query) as runner:
        await sink.collect(lambda: sink.total("count") >= 3)
        assert runner.metrics()["flushCyclesTotal"] >= 1

    assert (sink.total("count"), sink.total("sum")) == (3, 21)


async def test_tumbling_foreach_ctx_has_window_and_partition(broker: Broker) -> None:
    source, _, query = source_and_sink(broker)
    contexts: list[Any] = []
    stream = (
        Stream.from_(broker.client.queue(source))
        .window_tumbling(seconds=1, idle_flush_ms=flush_ms(500))
        .aggregate({"count": one})
        .foreach(lambda value, ctx: contexts.append(ctx))
    )
    await push(broker, source, {"amount": 1}, partition="here")

    async with running(broker, stream, query):
        await until(lambda: bool(contexts))

    [context] = contexts
    assert context["partition"] == "here"
    assert context["partitionId"]
    assert context["windowEnd"] - context["windowStart"] == 1000
    assert datetime.fromisoformat(context["windowKey"]).timestamp() * 1000 == context["windowStart"]


async def test_reduce_with_an_initial_value(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)
    stream = (
        Stream.from_(broker.client.queue(source))
        .window_tumbling(seconds=1, idle_flush_ms=flush_ms(500))
        .reduce(lambda acc, value: {"seen": [*acc["seen"], value]}, {"seen": []})
        .to(broker.client.queue(sink.queue))
    )
    await push(broker, source, "a", "b", "c")

    async with running(broker, stream, query):
        await sink.collect(lambda: sum(len(value["seen"]) for value in sink.data) >= 3)

    assert [seen for value in sink.data for seen in value["seen"]] == ["a", "b", "c"]


# -- sliding, cron, session ---------------------------------------------------------------------------------------


async def test_sliding_rejects_invalid_config(broker: Broker) -> None:
    with pytest.raises(ValueError, match="multiple of slide"):
        Stream.from_(broker.client.queue("unused")).window_sliding(size=5, slide=2)


async def test_sliding_events_appear_in_overlapping_windows(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)
    stream = (
        Stream.from_(broker.client.queue(source))
        .window_sliding(size=4, slide=2, idle_flush_ms=flush_ms(500))
        .aggregate({"count": one})
        .to(broker.client.queue(sink.queue))
    )

    async with running(broker, stream, query):
        for n in range(6):
            await push(broker, source, {"amount": n})
            await asyncio.sleep(0.4)
        await sink.collect(lambda: sink.total("count") >= 12, seconds=20)

    assert sink.total("count") == 12  # each event is in two windows


async def test_cron_rejects_invalid_every(broker: Broker) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        Stream.from_(broker.client.queue("unused")).window_cron(every="fortnight")


async def test_cron_every_second_live(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)
    stream = (
        Stream.from_(broker.client.queue(source))
        .window_cron(every="second", idle_flush_ms=flush_ms(500))
        .aggregate({"count": one})
        .to(broker.client.queue(sink.queue))
    )

    async with running(broker, stream, query):
        for n in range(7):
            await push(broker, source, {"amount": n})
            await asyncio.sleep(0.75)
        await sink.collect(lambda: sink.total("count") >= 7)

    assert len(sink.messages) >= 4
    assert sink.total("count") == 7


async def test_session_gap_closes_and_starts_new(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)
    stream = (
        Stream.from_(broker.client.queue(source))
        .window_session(gap=2, idle_flush_ms=flush_ms(500))
        .aggregate({"count": one, "sum": amount})
        .to(broker.client.queue(sink.queue))
    )

    async with running(broker, stream, query):
        for n in (1, 2):
            await push(broker, source, {"amount": n})
        await asyncio.sleep(3.5)
        for n in (3, 4):
            await push(broker, source, {"amount": n})
        await sink.collect(lambda: sink.total("count") >= 4)

    assert [(value["count"], value["sum"]) for value in sink.data] == [(2, 3), (2, 7)]


async def test_session_idle_flush_closes_quiet_session(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)
    stream = (
        Stream.from_(broker.client.queue(source))
        .window_session(gap=1, idle_flush_ms=flush_ms(500))
        .aggregate({"count": one, "sum": amount})
        .to(broker.client.queue(sink.queue))
    )
    await push(broker, source, *({"amount": n} for n in (1, 2, 3)))

    async with running(broker, stream, query):
        await sink.collect(lambda: bool(sink.messages))

    assert [(value["count"], value["sum"]) for value in sink.data] == [(3, 6)]


# -- event time ---------------------------------------------------------------------------------------------------


def milliseconds(hour: int, minute: int, second: int = 0) -> int:
    return int(datetime(2025, 3, 1, hour, minute, second, tzinfo=UTC).timestamp() * 1000)


async def test_event_time_buckets_by_extractor(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)
    events = [(1, milliseconds(10, 0, 5)), (2, milliseconds(10, 0, 50)), (4, milliseconds(10, 3))]
    await push(broker, source, *({"amount": n, "at": at} for n, at in events))
    stream = (
        Stream.from_(broker.client.queue(source))
        .window_tumbling(seconds=60, event_time=event_time)
        .aggregate({"count": one, "sum": amount})
        .map(lambda value, ctx: {**value, "window": ctx["windowKey"]})
        .to(broker.client.queue(sink.queue))
    )

    async with running(broker, stream, query):
        await sink.collect(lambda: bool(sink.messages))

    assert [(value["window"], value["count"], value["sum"]) for value in sink.data] == [
        ("2025-03-01T10:00:00.000Z", 2, 3)
    ]


async def test_event_time_allowed_lateness_included(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)

    def stream() -> Any:
        return (
            Stream.from_(broker.client.queue(source))
            .window_tumbling(seconds=60, event_time=event_time, allowed_lateness=60)
            .aggregate({"count": one})
            .to(broker.client.queue(sink.queue))
        )

    await push(broker, source, {"at": milliseconds(10, 1)})
    async with running(broker, stream(), query) as first:
        await until(lambda: first.metrics()["messagesTotal"] >= 1)

    await push(broker, source, {"at": milliseconds(10, 0, 30)}, {"at": milliseconds(10, 9)})
    async with running(broker, stream(), query) as second:
        await sink.collect(lambda: sink.total("count") >= 2)
        assert second.metrics()["lateEventsTotal"] == 0

    assert sink.total("count") == 2


async def test_event_time_late_include_policy(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)

    def stream() -> Any:
        return (
            Stream.from_(broker.client.queue(source))
            .window_tumbling(seconds=60, event_time=event_time, on_late="include")
            .aggregate({"count": one})
            .to(broker.client.queue(sink.queue))
        )

    await push(broker, source, {"at": milliseconds(10, 30)})
    async with running(broker, stream(), query) as first:
        await until(lambda: first.metrics()["messagesTotal"] >= 1)

    await push(broker, source, {"at": milliseconds(9, 0)}, {"at": milliseconds(11, 0)})
    async with running(broker, stream(), query) as second:
        await sink.collect(lambda: sink.total("count") >= 2)
        assert second.metrics()["lateEventsTotal"] == 0


async def test_late_events_are_dropped_by_a_watermark_that_outlives_the_runner(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)

    def stream() -> Any:
        return (
            Stream.from_(broker.client.queue(source))
            .window_tumbling(seconds=60, event_time=event_time)
            .aggregate({"count": one})
            .to(broker.client.queue(sink.queue))
        )

    await push(broker, source, {"at": milliseconds(10, 30)})
    async with running(broker, stream(), query) as first:
        await until(lambda: first.metrics()["messagesTotal"] >= 1)

    await push(broker, source, {"at": milliseconds(9, 0)}, {"at": milliseconds(11, 0)})
    async with running(broker, stream(), query) as second:
        await sink.collect(lambda: sink.total("count") >= 1)
        assert second.metrics()["lateEventsTotal"] == 1

    assert sink.total("count") == 1


# -- gates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["token bucket", "sliding window"])
async def test_a_rate_limiter_lets_all_through_in_order_and_in_time(broker: Broker, kind: str) -> None:
    source = await broker.create("-source", lease_time=1)
    sink, query = Sink(broker, broker.name("-sink")), broker.name("-query")
    await push(broker, source, *({"n": n} for n in range(12)))
    if kind == "token bucket":
        gate = gates.token_bucket_gate(capacity=5, refill_per_sec=5)
    else:
        gate = gates.sliding_window_gate(limit=5, window_sec=1)
    stream = Stream.from_(broker.client.queue(source)).gate(gate).to(broker.client.queue(sink.queue))
    begun = time.monotonic()

    async with running(broker, stream, query) as runner:
        await sink.collect(lambda: len(sink.messages) >= 12)
        metrics = runner.metrics()

    assert [value["n"] for value in sink.data] == list(range(12))
    assert time.monotonic() - begun >= 1.0
    assert metrics["gateDenialsTotal"] > 0
    assert metrics["gateAllowsTotal"] == 12


# -- recovery -----------------------------------------------------------------------------------------------------


async def test_recovery_config_hash_mismatch_rejects_and_reset_accepts(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)
    await push(broker, source, {"amount": 1})
    windowed = Stream.from_(broker.client.queue(source)).window_tumbling(seconds=60)
    totals = windowed.aggregate({"count": one}).to(broker.client.queue(sink.queue))
    changed = windowed.aggregate({"sum": amount}).to(broker.client.queue(sink.queue))
    async with running(broker, totals, query) as runner:
        await until(lambda: runner.metrics()["messagesTotal"] >= 1)

    # not through run(), which would leave the connections of the runner that it could not start
    refused = Runner(queryId=query, url=broker.url, stream=changed._compile())
    try:
        with pytest.raises(Exception, match="config_hash mismatch"):
            await refused.start()
    finally:
        await refused.http.close()

    async with running(broker, changed, query, reset=True):
        pass
    async with running(broker, changed, query):
        pass


async def test_recovery_from_stops_counts_everything_once(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)
    await broker.client.queue(source).config({"lease_time": 2}).create()
    at = milliseconds(10, 0)
    for part in range(3):
        await push(broker, source, *({"n": n, "at": at + n * 100} for n in range(200)), partition=f"p{part}")

    def stream() -> Any:
        return (
            Stream.from_(broker.client.queue(source))
            .window_tumbling(seconds=5, event_time=event_time, idle_flush_ms=0)
            .aggregate({"count": one, "sum": number})
            .to(broker.client.queue(sink.queue))
        )

    for round_ in range(3):
        async with running(broker, stream(), query, batch_size=20, max_partitions=2) as runner:
            await until(lambda: runner.metrics()["cyclesTotal"] >= 3)
        assert round_ == 2 or runner.metrics()["messagesTotal"] < 600
    for part in range(3):
        await push(broker, source, {"n": 0, "at": at + 1_000_000}, partition=f"p{part}")
    async with running(broker, stream(), query):
        await sink.collect(lambda: sink.total("count") >= 600)

    assert sink.by_partition("count") == {f"p{part}": 200 for part in range(3)}
    assert sink.by_partition("sum") == {f"p{part}": sum(range(200)) for part in range(3)}
    assert len(sink.messages) == 3 * 4  # each window of each partition once


async def test_a_killed_runner_is_resumed_with_exactly_once_state(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)
    await broker.client.queue(source).config({"lease_time": 2}).create()
    at, events, kills = milliseconds(10, 0), 600, 3
    for part in range(4):
        await push(broker, source, *({"n": n, "at": at + n * 500} for n in range(events)), partition=f"p{part}")
        await push(broker, source, {"n": 0, "at": at + 10_000_000}, partition=f"p{part}")

    for kill in range(kills):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", RUNNER_TO_KILL, broker.url, source, sink.queue, query, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"running\n"
            await sink.collect(lambda: len(sink.messages) >= 8 * (kill + 1))  # noqa: B023  awaited here
        finally:
            process.send_signal(signal.SIGKILL)
            await process.communicate()
    assert sink.total("count") < 4 * events

    stream = (
        Stream.from_(broker.client.queue(source))
        .window_tumbling(seconds=10, event_time=event_time, idle_flush_ms=0)
        .aggregate({"count": one, "sum": number})
        .to(broker.client.queue(sink.queue))
    )
    async with running(broker, stream, query):
        await sink.collect(lambda: sink.total("count") >= 4 * events)

    assert sink.by_partition("count") == {f"p{part}": events for part in range(4)}
    assert sink.by_partition("sum") == {f"p{part}": sum(range(events)) for part in range(4)}
    assert len(sink.messages) == 4 * events * 500 // 10_000  # each window of each partition once


# -- all of it ----------------------------------------------------------------------------------------------------


async def test_combined_full_pipeline(broker: Broker) -> None:
    source, _, query = source_and_sink(broker)
    for number, base in enumerate((100, 200, 300)):
        values = [{"amount": base + n, "keep": n < 3} for n in range(5)]
        await push(broker, source, *values, partition=f"p{number}")
    seen: dict[str, list[float]] = defaultdict(lambda: [0, 0])

    def note(value: Any, ctx: Any) -> None:
        seen[ctx["partition"]][0] += value["n"]
        seen[ctx["partition"]][1] += value["total"]

    stream = (
        Stream.from_(broker.client.queue(source))
        .filter(lambda m: m["data"]["keep"])
        .map(lambda m: m["data"])
        .window_tumbling(seconds=1, idle_flush_ms=flush_ms(500))
        .aggregate({"count": one, "sum": amount})
        .map(lambda value, ctx: {"n": value["count"], "total": value["sum"]})
        .foreach(note)
    )

    async with running(broker, stream, query):
        await until(lambda: sum(count for count, _ in seen.values()) >= 9)

    assert seen == {"p0": [3, 303], "p1": [3, 603], "p2": [3, 903]}


@pytest.mark.seconds(120)
async def test_throughput_5k_across_20_partitions(broker: Broker) -> None:
    source, sink, query = source_and_sink(broker)
    for part in range(20):
        await push(broker, source, *({"amount": n} for n in range(250)), partition=f"p{part}")
    stream = (
        Stream.from_(broker.client.queue(source))
        .window_tumbling(seconds=2, idle_flush_ms=flush_ms(1000))
        .aggregate({"count": one, "sum": amount})
        .to(broker.client.queue(sink.queue))
    )
    begun = time.monotonic()

    async with running(broker, stream, query):
        await sink.collect(lambda: sink.total("count") >= 5000, seconds=60)

    assert time.monotonic() - begun < 60
    assert sink.by_partition("count") == {f"p{part}": 250 for part in range(20)}
    assert sink.by_partition("sum") == {f"p{part}": sum(range(250)) for part in range(20)}
