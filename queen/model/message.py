"""Messages on their way in and out, and what became of them. No I/O, no JSON."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from enum import StrEnum
from typing import Protocol
from uuid import UUID

import msgspec

from queen.model.queue import QUEUE_MODE, StartFrom


class NewMessage(Protocol):
    """A message to push, as a producer sent it.

    ``payload`` is valid UTF-8 JSON text without a newline byte. ``transaction_id`` None: the server mints one.
    ``trace_id`` is a canonical lower-case UUID text or None.
    """

    @property
    def queue(self) -> str: ...
    @property
    def partition(self) -> str: ...
    @property
    def payload(self) -> bytes: ...
    @property
    def transaction_id(self) -> str | None: ...
    @property
    def trace_id(self) -> str | None: ...


class PushResult(msgspec.Struct, frozen=True, gc=False):
    """What became of one message: stored now, or found to be stored already (``duplicate``)."""

    transaction_id: str
    message_id: str
    partition_id: str
    duplicate: bool


class Buffered(msgspec.Struct, frozen=True, gc=False):
    """What became of a push that PostgreSQL could not take now: it is on the disk, and will be stored in its turn."""

    transaction_ids: list[str | None]  # one for each message, in order; None: PostgreSQL may have named it already


class PopRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One pop. Either ``queue`` is given, or at least one of ``namespace`` and ``task``.

    ``timeout_seconds`` None: do not wait.
    """

    queue: str | None = None
    partition: str | None = None  # None: any partition that has something
    namespace: str | None = None
    task: str | None = None
    group: str = QUEUE_MODE
    batch: int = 1
    partitions: int = 1
    auto_ack: bool = False
    timeout_seconds: float | None = None
    start: StartFrom = StartFrom()


class ClaimedPartition(msgspec.Struct, frozen=True, kw_only=True):
    """One partition of a popped batch: offsets ``first`` (inclusive) to ``end`` (exclusive) go to this consumer."""

    queue: str
    partition: str
    partition_id: UUID
    first: int
    end: int
    retry_count: int  # failed deliveries of this batch so far
    attempt: int  # 1 on first delivery
    skipped: tuple[int, ...] = ()  # offsets in between that are not delivered: deleted, or dead-lettered by hand
    born_at: datetime | None = None  # of the partition: one that was removed and came again has the same id


class SegmentSlice(msgspec.Struct, frozen=True, kw_only=True):
    """A run of messages of one claimed partition, decompressed and decrypted.

    ``lines`` is ``count`` lines joined by b"\\n" (no trailing newline), each of the form
    ``<12 hex digits>","transactionId":<JSON>,"traceId":<JSON>,"producerSub":<JSON>,"data":<JSON>``
    that is: a JSON object without its opening ``{"id":"<id_prefix>`` and its closing brace. The id of a message is
    ``id_prefix`` followed by the first 12 characters of its line. Where ``minted`` is true the transactionId is the
    message id, and the line carries the byte ``\\x00`` in place of ``id_prefix`` inside it.
    """

    claim: ClaimedPartition
    created_at: datetime
    id_prefix: str  # the first 24 characters of a UUIDv7, ending in "-"
    minted: bool
    first: int  # offset of the first line
    count: int  # lines; those of messages that are not delivered are left out
    lines: bytes


class Batch(Protocol):
    """What a pop took. ``lease_id`` is None with autoAck. Close it always: an unsent batch goes back to its queue."""

    @property
    def lease_id(self) -> UUID | None: ...
    @property
    def group(self) -> str: ...
    @property
    def claims(self) -> tuple[ClaimedPartition, ...]: ...

    @property
    def message_count(self) -> int: ...

    def slices(self) -> AsyncIterator[SegmentSlice]:
        """The messages in order, partition by partition, read from storage as the caller asks for more."""
        ...

    async def give_back(self) -> None:
        """Nothing of it reached the client: end the lease (or rewind the autoAck) with the attempt uncounted."""
        ...


class AckStatus(StrEnum):
    """The outcome a consumer reports. COMPLETED is also said as ``success`` on the wire."""

    COMPLETED = "completed"
    FAILED = "failed"
    DLQ = "dlq"
    RETRY = "retry"


class Ack(msgspec.Struct, frozen=True, kw_only=True):
    """One acknowledgement. ``status`` None: the consumer said a status that does not exist."""

    transaction_id: str
    partition_id: str  # as given; need not be a UUID
    status: AckStatus | None = AckStatus.COMPLETED
    group: str = QUEUE_MODE
    lease_id: str | None = None  # None: no lease check
    error: str | None = None


class AckResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one acknowledgement. ``error`` is None on success, and for an unknown status."""

    transaction_id: str
    success: bool
    error: str | None = None
    queue: str | None = None
    partition: str | None = None
    lease_released: bool = False
    dead_lettered: bool = False


class LeaseExtension(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of an extend: ``renewed`` partitions, or an error and no time."""

    lease_id: str
    renewed: int
    expires_at: datetime | None = None
    error: str | None = None


class TransactionResult(msgspec.Struct, frozen=True, kw_only=True):
    """All applied (``error`` None) or nothing. ``results``: PushResult or AckResult, flattened, in operation order."""

    transaction_id: str
    error: str | None = None
    results: tuple[PushResult | AckResult, ...] = ()
