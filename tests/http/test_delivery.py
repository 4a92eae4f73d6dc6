"""The way of a popped batch to its client: whole or in chunks, how far ahead, and what becomes of it when it fails."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any
from uuid import UUID

import pytest
import structlog
import trio
import trio.testing

from queen.errors import StorageUnavailable
from queen.model.message import ClaimedPartition, SegmentSlice
from queen.routes.call import Counters
from queen.streaming import delivery as delivery_module
from queen.streaming.delivery import CHUNKS_AHEAD, Delivery, Part

KiB = 1024


class PlainBatch:
    """A batch that remembers being given back; what it holds is the test's own."""

    lease_id: UUID | None = None
    group = "g"
    claims: tuple[ClaimedPartition, ...] = ()

    def __init__(self, message_count: int) -> None:
        self.message_count = message_count
        self.given_back = 0

    def slices(self) -> AsyncIterator[SegmentSlice]:
        raise AssertionError("the parts are given")

    async def give_back(self) -> None:
        await trio.lowlevel.checkpoint()
        self.given_back += 1


class Source:
    """Parts of an answer, and how many have been asked for."""

    def __init__(self, parts: int, part_bytes: int, error: Exception | None = None) -> None:
        self.made = 0
        self.closed = False
        self.batch = PlainBatch(parts)
        self.counters = Counters()
        self._error = error
        self._parts, self._part_bytes = parts, part_bytes

    async def parts(self) -> AsyncGenerator[Part]:
        try:
            for number in range(self._parts):
                await trio.lowlevel.checkpoint()
                self.made += 1
                yield Part(bytes([number % 256]) * self._part_bytes, 1)
            if self._error is not None:
                raise self._error
        finally:
            self.closed = True

    @property
    def data(self) -> bytes:
        return b"".join(bytes([number % 256]) * self._part_bytes for number in range(self._parts))

    def deliver(self) -> Delivery:
        return Delivery(self.batch, self.parts(), self.counters, threshold_bytes=128 * KiB, chunk_bytes=64 * KiB)


@pytest.mark.parametrize(("parts", "part_bytes"), [(0, 0), (1, 128 * KiB - 1), (127, KiB), (1000, 10)])
async def test_an_answer_below_the_threshold_is_whole(parts: int, part_bytes: int) -> None:
    source = Source(parts, part_bytes)
    delivery = source.deliver()

    await delivery.prepare()

    assert delivery.whole == source.data
    assert delivery.messages == parts
    assert source.closed


@pytest.mark.parametrize(
    ("parts", "part_bytes"),
    [
        (1, 128 * KiB),
        (128, KiB),
        (1, 999 * KiB + 1),
        (3, 64 * KiB),
        (10_000, 77),
        (20, 100 * KiB),
        (400, 10 * KiB + 3),
    ],
)
async def test_a_larger_answer_leaves_in_equal_chunks(parts: int, part_bytes: int) -> None:
    source = Source(parts, part_bytes)
    delivery = source.deliver()
    await delivery.prepare()
    assert delivery.whole is None

    async with delivery.open_chunks() as chunks:
        received = [chunk async for chunk in chunks]

    assert b"".join(received) == source.data
    assert {len(chunk) for chunk in received[:-1]} <= {64 * KiB}
    assert 0 < len(received[-1]) <= 64 * KiB
    assert source.closed
    assert source.counters.streamed_answers == 1


@pytest.mark.parametrize("part_bytes", [100, 7 * KiB, 64 * KiB])
async def test_an_answer_is_never_far_ahead_of_its_client(part_bytes: int) -> None:
    source = Source(1000 * 64 * KiB // part_bytes, part_bytes)
    delivery = source.deliver()
    await delivery.prepare()

    async with delivery.open_chunks() as chunks:
        taken = 0
        for _ in range(5):
            await trio.testing.wait_all_tasks_blocked()
            held_bytes = source.made * part_bytes - taken
            assert held_bytes <= (CHUNKS_AHEAD + 1) * 64 * KiB + 2 * part_bytes
            taken += len(await chunks.receive())

    assert source.closed
    assert source.counters.backpressure_waits >= 5


async def test_a_streamed_answer_and_its_backpressure_are_logged_once_for_each_tenth() -> None:
    source = Source(1000, 10 * KiB)
    delivery = source.deliver()

    with structlog.testing.capture_logs() as lines:
        await delivery.prepare()
        async with delivery.open_chunks() as chunks:
            await trio.testing.wait_all_tasks_blocked()
            async for _ in chunks:
                await trio.testing.wait_all_tasks_blocked()

    assert [line["event"] for line in lines[:2]] == [
        "streaming large response: 9.8 MB",
        "backpressure at 256 KB of 9.8 MB (2.6%)",
    ]
    assert [line["log_level"] for line in lines] == ["info", *["debug"] * 10]
    assert source.counters.backpressure_waits > 100


async def test_an_error_of_storage_ends_the_stream_after_what_was_read_before_it() -> None:
    source = Source(10, 50 * KiB, StorageUnavailable("PostgreSQL is away"))
    delivery = source.deliver()
    await delivery.prepare()
    received = []

    async def receive() -> None:
        async with delivery.open_chunks() as chunks:
            received.extend([chunk async for chunk in chunks])

    with pytest.raises(StorageUnavailable):
        await receive()

    assert source.data.startswith(b"".join(received))
    assert len(b"".join(received)) == 7 * 64 * KiB


async def test_a_fault_in_the_making_is_not_kept_quiet() -> None:
    source = Source(10, 50 * KiB, ZeroDivisionError())
    delivery = source.deliver()
    await delivery.prepare()

    async def receive() -> None:
        async with delivery.open_chunks() as chunks:
            async for _ in chunks:
                pass

    with pytest.RaisesGroup(ZeroDivisionError):
        await receive()


async def test_a_client_that_leaves_stops_the_reading() -> None:
    source = Source(100_000, 10 * KiB)
    delivery = source.deliver()
    await delivery.prepare()
    delivery.begin()

    with trio.CancelScope() as client:
        async with delivery.open_chunks() as chunks:
            await chunks.receive()
            client.cancel()
            await chunks.receive()
    await delivery.abandon()

    assert source.closed
    assert source.made < 200
    assert source.batch.given_back == 0  # it may have got messages


@pytest.mark.parametrize("prepared", [False, True])
async def test_a_batch_that_was_not_begun_goes_back_once(prepared: bool) -> None:
    source = Source(3, 10)
    delivery = source.deliver()
    if prepared:
        await delivery.prepare()

    await delivery.abandon()
    await delivery.abandon()

    assert source.batch.given_back == 1
    assert source.counters.popped == 0


async def test_a_batch_goes_back_while_its_request_is_cancelled() -> None:
    source = Source(3, 10)
    delivery = source.deliver()

    with trio.CancelScope() as request:
        try:
            await delivery.prepare()
            request.cancel()
            await trio.lowlevel.checkpoint()
        finally:
            await delivery.abandon()

    assert source.batch.given_back == 1


async def test_giving_back_does_not_take_for_ever(monkeypatch: pytest.MonkeyPatch, autojump_clock: Any) -> None:
    source = Source(3, 10)
    monkeypatch.setattr(source.batch, "give_back", trio.sleep_forever)

    with structlog.testing.capture_logs() as lines:
        await source.deliver().abandon()

    assert trio.current_time() == delivery_module.GIVE_BACK_SECONDS
    assert [line["event"] for line in lines] == ["batch not given back in time; its lease will expire"]


async def test_a_batch_that_storage_will_not_take_back_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(3, 10)

    async def refuse() -> None:
        raise StorageUnavailable("PostgreSQL is away")

    monkeypatch.setattr(source.batch, "give_back", refuse)

    with structlog.testing.capture_logs() as lines:
        await source.deliver().abandon()

    assert lines == [
        {
            "event": "batch not given back; its lease will expire",
            "error": "PostgreSQL is away",
            "log_level": "warning",
        }
    ]


async def test_what_has_begun_is_counted_and_stays_with_its_client() -> None:
    source = Source(3, 10)
    delivery = source.deliver()
    await delivery.prepare()

    delivery.begin()
    await delivery.abandon()

    assert source.counters.popped == 3
    assert source.batch.given_back == 0
