"""A popped batch on its way to the client: whole when it is small, else in chunks that wait for the client.

What the bytes mean is made in routes/wire.py. Nothing here reads SQL or settings.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Final, NamedTuple, Protocol

import structlog
import trio

from queen.errors import QueenError
from queen.model.message import Batch

CHUNKS_AHEAD: Final = 4
"""Chunks a streamed answer may be ahead of its client. Four of 64 KiB cover one read of the next segment (about a
millisecond) at 250 MB/s, and 1,000 slow clients hold 256 MiB at most."""

GIVE_BACK_SECONDS: Final = 5.0
"""How long giving a batch back may hold up the end of a request. Past it the lease ends by its own expiry."""

log = structlog.get_logger("queen.streaming")


class Part(NamedTuple):
    """The next bytes of an answer, and how many messages end in them."""

    data: bytes
    messages: int


class StreamCounters(Protocol):
    """Where a delivery counts what it does."""

    popped: int
    streamed_answers: int
    backpressure_waits: int


class Delivery:
    """Owns a popped batch from the engine's answer until its first byte is on its way.

    ::

        taken ── prepare ──► prepared ── begin ──► begun ── open_chunks ──► sent, or cut off
          │                     │
          └────── abandon ──────┴──► given back: the messages return to their queue

    Args:
        parts: makes the answer; closed by this delivery, at the latest by ``abandon``.
        threshold_bytes: answers smaller than this are held whole.
        chunk_bytes: size of every chunk of a larger answer but the last.
    """

    def __init__(
        self,
        batch: Batch,
        parts: AsyncGenerator[Part],
        counters: StreamCounters,
        *,
        threshold_bytes: int,
        chunk_bytes: int,
    ) -> None:
        self._batch = batch
        self._parts = parts
        self._counters = counters
        self._threshold_bytes = threshold_bytes
        self._chunk_bytes = chunk_bytes
        self._read: list[bytes] = []
        self._read_bytes = 0
        self._begun = False
        self._given_back = False
        self.messages = 0
        """Messages made into bytes so far."""
        self.whole: bytes | None = None
        """The complete answer, once prepared, when it is small."""

    @property
    def begun(self) -> bool:
        return self._begun

    async def prepare(self) -> None:
        """Make the answer, or as much of it as shows that it is large. Raises what reading the batch raises."""
        async for part in self._parts:
            self._read.append(part.data)
            self._read_bytes += len(part.data)
            self.messages += part.messages
            if self._read_bytes >= self._threshold_bytes:
                return
        self.whole = b"".join(self._read)
        self._read.clear()

    def begin(self) -> None:
        """The answer is being sent: from here on the client may have seen messages, and the lease is its own."""
        self._begun = True
        self._counters.popped += self._batch.message_count

    async def abandon(self) -> None:
        """Give the batch back unless its answer has begun. Harmless when repeated.

        Shielded, because it is mostly called while the request is being cancelled; with a deadline, because the
        server may be going down at the same time. A failure is logged: the lease then ends by its expiry.
        """
        if self._begun or self._given_back:
            return
        self._given_back = True
        with trio.move_on_after(GIVE_BACK_SECONDS, shield=True) as scope:
            try:
                await self._parts.aclose()
                await self._batch.give_back()
            except QueenError as error:
                log.warning("batch not given back; its lease will expire", error=error.detail)
        if scope.cancelled_caught:
            log.warning("batch not given back in time; its lease will expire", seconds=GIVE_BACK_SECONDS)

    @asynccontextmanager
    async def open_chunks(self) -> AsyncIterator[trio.MemoryReceiveChannel[bytes]]:
        """The answer in chunks, read from storage as they are taken; at most CHUNKS_AHEAD are held.

        The reader of storage is a task of this block: leaving the block, also by cancellation, ends it. An error
        of storage ends the block with that error, after the chunks made before it: the client must see a broken
        answer, never one that looks complete.
        """
        self._counters.streamed_answers += 1
        log.info("streaming large response: %s", _size(self._total_bytes()), messages=self._batch.message_count)
        send, receive = trio.open_memory_channel[bytes](CHUNKS_AHEAD)
        failures: list[Exception] = []
        with receive:  # open until the reader has ended: closed before, it would be an error to the reader
            async with trio.open_nursery() as reader:
                reader.start_soon(self._send_chunks, send, failures)
                yield receive
                reader.cancel_scope.cancel()  # the client is served, or gone: nothing more to read
        if failures:
            raise failures[0]

    async def _send_chunks(self, send: trio.MemorySendChannel[bytes], failures: list[Exception]) -> None:
        """Cut the answer into chunks. A failure is kept for the owner of the block, who tells the client."""
        sent_bytes = 0
        reported = -1  # tenths of the answer at the last report of backpressure
        # closed without a checkpoint: at one, the reader could end the block and with it the error that is on its way
        with send:
            async with aclosing(self._parts), aclosing(self._chunks()) as chunks:
                try:
                    async for chunk in chunks:
                        try:
                            send.send_nowait(chunk)
                        except trio.WouldBlock:
                            self._counters.backpressure_waits += 1
                            total_bytes = max(self._total_bytes(), sent_bytes)
                            if (tenth := sent_bytes * 10 // total_bytes) > reported:
                                reported = tenth
                                log.debug(
                                    "backpressure at %s of %s (%.1f%%)",
                                    _size(sent_bytes),
                                    _size(total_bytes),
                                    100 * sent_bytes / total_bytes,
                                )
                            await send.send(chunk)
                        sent_bytes += len(chunk)
                except QueenError as error:
                    log.warning("answer cut off", error=error.detail, sent_bytes=sent_bytes)
                    failures.append(error)

    async def _chunks(self) -> AsyncGenerator[bytes]:
        size = self._chunk_bytes
        held, held_bytes = self._read, self._read_bytes
        while True:
            if held_bytes >= size:
                block = b"".join(held)
                whole_chunks_bytes = held_bytes // size * size
                for start in range(0, whole_chunks_bytes, size):
                    yield block[start : start + size]
                held, held_bytes = [block[whole_chunks_bytes:]], held_bytes - whole_chunks_bytes
                del block  # while the next part is read, only the rest of this one is held
            part = await anext(self._parts, None)
            if part is None:
                break
            held.append(part.data)
            held_bytes += len(part.data)
            self._read_bytes += len(part.data)
            self.messages += part.messages
        if held_bytes:
            yield b"".join(held)

    def _total_bytes(self) -> int:
        """The size of the whole answer, guessed from the messages made so far."""
        if self.messages == 0:
            return self._read_bytes
        return self._read_bytes * max(self._batch.message_count, self.messages) // self.messages


def _size(count: int) -> str:
    return f"{count / 1024 / 1024:.1f} MB" if count >= 1024 * 1024 else f"{count // 1024} KB"
