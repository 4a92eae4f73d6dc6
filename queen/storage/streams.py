"""Streams in PostgreSQL: registrations, state, and the cycle, which is one transaction.

The way of a cycle: find the acknowledged message; then, in the transaction, take the turn on (query, partition), change
the state, store the sink messages, move the cursor. What a client repeats because it lost the answer is not applied
again: see :class:`queen.model.stream.Cycle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID, uuid4

import msgspec
import zstandard

from queen.errors import EncryptionUnavailable
from queen.model.message import Ack, AckStatus, PushResult
from queen.model.stream import (
    Cycle,
    CycleAck,
    CycleResult,
    Registration,
    StateChange,
    StateFilter,
    StateRow,
    StreamQuery,
)
from queen.observability.activity import Activity
from queen.storage.acks import LEASE_LOST, NOT_FOUND, AckFlush, Released, bury
from queen.storage.bridge import Bridge
from queen.storage.catalogue import Catalogue
from queen.storage.connect import Connection
from queen.storage.ids import bucket_of
from queen.storage.pushes import Flush, Pushes, PushRequest, Woken
from queen.storage.segments import Body, Keyring, seal, unseal

_REGISTER: Final = "SELECT * FROM queen.register_stream(NULL, $1, $2, $3, $4, $5, $6)"
_BEGIN: Final = "SELECT * FROM queen.begin_cycle($1, $2, $3)"
_CHANGE: Final = "SELECT queen.change_stream_state($1, NULL, $2, $3, $4, $5, $6, $7, $8, $9)"
_ACK: Final = "SELECT * FROM queen.ack_cycle($1, NULL, $2, $3, $4, $5, $6, $7)"
_END: Final = """
    -- a row that is locked and so exists: changed by ON CONFLICT, which finds it by its key
    INSERT INTO queen.stream_partitions (bucket, query_id, partition_id, last_digest, last_answer)
    VALUES ($1, $2, $3, $4, $5)
    ON CONFLICT ON CONSTRAINT stream_partitions_pkey
    DO UPDATE SET last_digest = excluded.last_digest, last_answer = excluded.last_answer
"""
_STATE: Final = "SELECT * FROM queen.read_stream_state($1, $2, $3, $4, $5, $6, $7)"
_QUEUE_OF: Final = """
    SELECT q.name FROM queen.partitions p JOIN queen.queues q ON q.queue_id = p.queue_id
    WHERE p.bucket = $1 AND p.partition_id = $2
"""

UNKNOWN_QUERY: Final = "Unknown query_id"
_STALE_TRIES: Final = 8
_NO_REASON: Final = "Set aside by a stream"
_PUSHED: Final = msgspec.msgpack.Decoder(list[PushResult])
_AFTER_ANY_KEY: Final = b"\xff"
"""Greater than any UTF-8 text."""


class _Work:
    """One cycle as it is applied: called with a connection, and again after a conflict that undid it."""

    def __init__(self, cycle: Cycle, flush: Flush, keyring: Keyring, buckets: int) -> None:
        self._cycle = cycle
        self._flush = flush
        self._keyring = keyring
        self._bucket = bucket_of(cycle.partition_id, buckets)
        self._acks: AckFlush | None = None
        if cycle.ack is not None:
            ack = Ack(transaction_id=cycle.ack.transaction_id, partition_id=str(cycle.partition_id))
            self._acks = AckFlush([[ack]], buckets)
        self._begin()

    def _begin(self) -> None:
        self.refusal: str | None = None
        self.queue: str | None = None
        self.woken: list[Woken] = []
        self.released: list[Released] = []
        self.pushed: list[PushResult] = []
        self.consumed = 0
        self.repeated = False

    def result(self) -> CycleResult:
        """What became of it."""
        if self.refusal is not None:
            return CycleResult(error=self.refusal, queue=self.queue)
        ack = self._cycle.ack
        dead = ack is not None and ack.status is not AckStatus.COMPLETED
        return CycleResult(
            queue=self.queue,
            pushed=self.pushed,
            lease_released=ack is not None and (dead or self._cycle.release_lease),
            dead_lettered=dead,
            consumed=self.consumed,
            repeated=self.repeated,
        )

    def count(self, activity: Activity) -> None:
        """Say what became of it."""
        if self.repeated or self.refusal is not None:
            return
        if self._cycle.messages:
            self._flush.count(activity)
        if (ack := self._cycle.ack) is not None:
            dead = ack.status is not AckStatus.COMPLETED
            activity.count(self.queue, ack_requests=1, ack_success=self.consumed, dead_letters=int(dead))

    async def __call__(self, connection: Connection) -> str | None:
        """asyncio flavor. Returns the verdict of a push that has to be prepared anew; all else is in the attributes."""
        self._begin()
        if self._acks is not None:
            await self._acks.locate(connection)
        transaction = connection.transaction()
        await transaction.start()
        try:
            verdict = await self._apply(connection)
        except BaseException:
            await transaction.rollback()
            raise
        if verdict is None and self.refusal is None:
            await transaction.commit()
        else:
            await transaction.rollback()
        return verdict

    async def _apply(self, connection: Connection) -> str | None:
        """asyncio flavor."""
        cycle, where = self._cycle, (self._bucket, self._cycle.query_id, self._cycle.partition_id)
        found = await connection.fetchrow(_BEGIN, *where)
        if found is None:
            self.refusal = UNKNOWN_QUERY
            return None
        self.queue = found["queue_name"]
        if cycle.digest is not None and found["last_digest"] == cycle.digest:
            self.repeated = True
            self.pushed = _unpack(found["last_answer"])
            return None
        if cycle.changes:
            await self._change_state(connection, self._keyring if found["encrypted"] else None)
        if cycle.messages:
            verdict = await self._flush.store(connection, may_create=True)
            if isinstance(verdict, str):
                return verdict
            self.woken = verdict
            self.pushed = self._flush.results()[0]
        if cycle.ack is not None:
            await self._acknowledge(connection, cycle.ack)
        if self.refusal is None and cycle.messages and (full := await self._flush.reserve(connection)):
            self.refusal = full[0].detail
        if cycle.digest is not None or found["last_digest"] is not None:
            answer = _pack(self.pushed) if cycle.digest is not None else None
            await connection.execute(_END, *where, cycle.digest, answer)
        return None

    async def _change_state(self, connection: Connection, keyring: Keyring | None) -> None:
        """asyncio flavor. Of several changes of a key the last counts."""
        if keyring is not None and keyring.current is None:
            raise EncryptionUnavailable(self.queue or "")
        last = {change.key: change for change in self._cycle.changes}
        puts: list[tuple[StateChange, Body]] = []
        removed: list[bytes] = []
        for key in sorted(last):  # cycles on one partition wait for each other; the order is for the index alone
            change = last[key]
            if change.value is None:
                removed.append(key.encode())
            else:
                puts.append((change, seal(change.value, self._cycle.partition_id, keyring)))
        await connection.execute(
            _CHANGE,
            self._bucket,
            self._cycle.query_id,
            self._cycle.partition_id,
            [change.key.encode() for change, _ in puts],
            [change.window_end for change, _ in puts],
            [body.codec for _, body in puts],
            [body.key_id for _, body in puts],
            [body.data for _, body in puts],
            removed,
        )

    async def _acknowledge(self, connection: Connection, ack: CycleAck) -> None:
        """asyncio flavor. Move the cursor, or refuse."""
        assert self._acks is not None
        cycle = self._cycle
        partition = self._acks.partitions[str(cycle.partition_id)]
        if partition is None or not partition.exists or ack.transaction_id not in partition.offsets:
            self.refusal = NOT_FOUND
            return
        lease_id: UUID | None = None
        if ack.lease_id:
            try:
                lease_id = UUID(ack.lease_id)
            except ValueError:
                self.refusal = LEASE_LOST
                return
        dead = ack.status is not AckStatus.COMPLETED
        offset = partition.offsets[ack.transaction_id]
        row = await connection.fetchrow(
            _ACK,
            self._bucket,
            connection.epoch,
            cycle.partition_id,
            cycle.group,
            lease_id,
            offset,
            dead or cycle.release_lease,
        )
        if row["lost"]:
            self.refusal = LEASE_LOST
            return
        self.consumed = row["moved"]
        if row["held"]:
            self.released.append(Released(partition.queue, cycle.group, partition.name))
        if dead:
            await bury(
                connection,
                self._bucket,
                cycle.partition_id,
                partition.queue,
                cycle.group,
                offset,
                0,
                ack.error or _NO_REASON,
                self._keyring,
            )


def _pack(pushed: Sequence[PushResult]) -> bytes | None:
    """What is kept of an answer for a repeat."""
    if not pushed:
        return None
    return zstandard.compress(msgspec.msgpack.encode(pushed), 1)


def _unpack(packed: bytes | None) -> list[PushResult]:
    """The sink messages of a cycle that had been applied before: all of them are stored already."""
    if packed is None:
        return []
    results = _PUSHED.decode(zstandard.decompress(packed))
    return [msgspec.structs.replace(result, duplicate=True) for result in results]


def _after_prefix(prefix: bytes) -> bytes:
    """The least bytes that are greater than every text that begins with ``prefix``; no byte of UTF-8 is 0xff."""
    return prefix[:-1] + bytes([prefix[-1] + 1]) if prefix else _AFTER_ANY_KEY


class Streams:
    """Stream queries, their state and their cycles."""

    def __init__(self, bridge: Bridge, catalogue: Catalogue, pushes: Pushes, keyring: Keyring, buckets: int) -> None:
        self._bridge = bridge
        self._catalogue = catalogue
        self._pushes = pushes
        self._keyring = keyring
        self._buckets = buckets
        self.activity = Activity()

    async def register(self, query: StreamQuery) -> tuple[UUID, Registration]:
        """Register a query by its name. With another hash its state is wiped or, without ``reset``, nothing is done."""

        async def work(connection: Connection) -> tuple[UUID, Registration]:
            async with connection.transaction():
                row = await connection.fetchrow(
                    _REGISTER,
                    uuid4(),
                    query.name,
                    query.source_queue,
                    query.sink_queue,
                    query.config_hash,
                    query.reset,
                )
                outcome = Registration(row["outcome"])
                if outcome is Registration.RESET:
                    for bucket in range(self._buckets):
                        await connection.execute("SELECT queen.wipe_stream($1, $2)", bucket, row["query_id"])
                return row["query_id"], outcome

        return await self._bridge.run(work)

    async def state(self, query_id: UUID, partition_id: UUID, wanted: StateFilter) -> list[StateRow]:
        """The state rows that meet the filter, ordered by key. None of a query or partition that does not exist."""
        bucket = bucket_of(partition_id, self._buckets)
        prefix = wanted.prefix.encode()

        async def work(connection: Connection) -> tuple[list[Any], str]:
            rows = await connection.fetch(
                _STATE,
                bucket,
                query_id,
                partition_id,
                None if wanted.keys is None else [key.encode() for key in wanted.keys],
                prefix,
                _after_prefix(prefix),
                wanted.ripe_until,
            )
            queue = ""
            if any(row["key_id"] is not None for row in rows):
                queue = await connection.fetchval(_QUEUE_OF, bucket, partition_id) or ""
            return rows, queue

        rows, queue = await self._bridge.run(work, writes=False)
        return [
            StateRow(
                row["key"].decode(),
                unseal(Body(row["codec"], 0, row["key_id"], row["value"]), partition_id, self._keyring, queue),
                row["updated_at"],
            )
            for row in rows
        ]

    async def cycle(self, cycle: Cycle, producer_sub: str | None) -> tuple[CycleResult, list[Woken], list[Released]]:
        """Apply a cycle in one commit. Returns also the cursors that it woke and the leases that it ended."""
        flush = self._pushes.flush_of([PushRequest(cycle.messages, producer_sub)])
        work = _Work(cycle, flush, self._keyring, self._buckets)
        for _ in range(_STALE_TRIES):
            await self._catalogue.ensure(flush.queue_names)
            if not flush.prepare(self._catalogue):
                continue
            verdict = await self._bridge.run(work)
            if verdict is None:
                work.count(self.activity)
                return work.result(), work.woken, work.released
            self._pushes.recover(flush, verdict)
        return CycleResult(error="queues of this cycle kept changing; nothing was applied"), [], []
