"""Acknowledgements, dead letters and transactions. The decisions about cursors and leases are made in ``queen.ack``.

A consumer names a message by its transaction id; ``queen.locate`` finds its offset. Acknowledged messages that go to
the dead letter queue are copied there, payload and all, in the transaction that passes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID, uuid4

import msgspec

from queen.model.message import Ack, AckResult, AckStatus, LeaseExtension, PushResult
from queen.observability.activity import Activity
from queen.storage.bridge import Bridge
from queen.storage.catalogue import Catalogue
from queen.storage.connect import Connection
from queen.storage.ids import (
    CANONICAL_UUID7,
    bucket_of,
    id_prefix_text,
    id_tail,
    minted_index,
    ranges_of,
    transaction_key,
)
from queen.storage.pushes import Flush, Pushes, Woken
from queen.storage.segments import Body, Keyring, seal, unseal

NOT_FOUND: Final = "Message not found"
LEASE_LOST: Final = "Invalid or expired lease"

_STATUS_CODES: Final = {AckStatus.COMPLETED: 0, AckStatus.FAILED: 1, AckStatus.DLQ: 2, AckStatus.RETRY: 3}
_LOCATE: Final = "SELECT * FROM queen.locate($1, $2, $3, $4, $5, $6, $7, $8)"
_ACK: Final = "SELECT * FROM queen.ack($1, NULL, $2, $3, $4, $5, $6, $7, $8, $9, $10)"
_READ: Final = "SELECT * FROM queen.read_segments($1, $2, $3, $4, 1, 1, true)"
_DEAD: Final = """
    WITH buried AS (
        INSERT INTO queen.dead_letters AS d (bucket, partition_id, message_offset, group_name, queue_id, message_id,
            retry_count, created_at, failed_at, codec, minted, key_id, error, body)
        SELECT $1, p.partition_id, $3, $4, p.queue_id, $5, $6, $7, clock_timestamp(), $8, $9, $10, $11, $12
        FROM queen.partitions p WHERE p.bucket = $1 AND p.partition_id = $2
        ON CONFLICT ON CONSTRAINT dead_letters_once_per_group DO NOTHING
        RETURNING d.queue_id
    )
    INSERT INTO queen.count_changes (bucket, kind, queue_id, amount, group_name)
    SELECT $1, 6, buried.queue_id, 1, $4 FROM buried
"""
_EXTEND: Final = "SELECT * FROM queen.extend_lease($1, NULL, $2, $3, $4)"
_STALE_TRIES: Final = 8


class Released:
    """A lease that ended: something may be ready for (queue, group)."""

    __slots__ = ("group", "partition", "queue")

    def __init__(self, queue: str, group: str, partition: str) -> None:
        self.queue = queue
        self.group = group
        self.partition = partition


class _Partition:
    """A partition that acks name: what exists, and where the messages lie."""

    def __init__(self, partition_id: UUID) -> None:
        self.partition_id = partition_id
        self.ids: set[str] = set()
        self.exists = False
        self.queue = ""
        self.name = ""
        self.first_offset = 0
        self.keyed: tuple[UUID, UUID] | None = None
        self.offsets: dict[str, int] = {}


class _Run:
    """Consecutive offsets acknowledged alike; ``places`` are the positions of its acks in their request."""

    __slots__ = ("dead", "end", "error", "first", "lost", "places", "released", "retry_count", "status")

    def __init__(self, offset: int, status: AckStatus, place: int, error: str | None) -> None:
        self.first = offset
        self.end = offset + 1
        self.status = status
        self.places = [place]
        self.error = error
        self.lost = self.released = self.dead = False
        self.retry_count = 0


class AckFlush:
    """The acks of many requests, applied as one."""

    def __init__(self, requests: Sequence[Sequence[Ack]], buckets: int, *, straight: bool = False) -> None:
        self.requests = requests
        self._buckets = buckets
        self._straight = straight
        self.partitions: dict[str, _Partition | None] = {}  # by the text the client sent
        for request in requests:
            for ack in request:
                partition = self.partitions.get(ack.partition_id)
                if partition is None:
                    if ack.partition_id in self.partitions:
                        continue
                    try:
                        partition = _Partition(UUID(ack.partition_id))
                    except ValueError:
                        self.partitions[ack.partition_id] = None
                        continue
                    self.partitions[ack.partition_id] = partition
                partition.ids.add(ack.transaction_id)
        self.results: list[list[AckResult]] = []
        self.released: list[Released] = []
        self._tallies: dict[str, list[int]] = {}  # by queue: succeeded, dead-lettered

    def count(self, activity: Activity) -> None:
        """Say what became of the acks."""
        requests: dict[str | None, int] = {}
        total: dict[str | None, int] = {}
        for request in self.requests:
            last: str | None = None
            for ack in request:
                partition = self.partitions[ack.partition_id]
                last = partition.queue if partition is not None and partition.exists else None
                total[last] = total.get(last, 0) + 1
            if request:
                requests[last] = requests.get(last, 0) + 1
        for queue, acks in total.items():
            succeeded, dead = self._tallies.get(queue, (0, 0)) if queue is not None else (0, 0)
            activity.count(
                queue,
                ack_requests=requests.get(queue, 0),
                ack_success=succeeded,
                ack_failed=acks - succeeded,
                dead_letters=dead,
            )

    @property
    def may_kill(self) -> bool:
        """Whether a message may go to the dead letter queue, so that the flush needs a transaction."""
        return any(ack.status in (AckStatus.FAILED, AckStatus.DLQ) for request in self.requests for ack in request)

    async def locate(self, connection: Connection) -> None:
        """asyncio flavor. Find every message named."""
        by_bucket: dict[int, list[_Partition]] = {}
        for partition in self.partitions.values():
            if partition is not None:
                by_bucket.setdefault(bucket_of(partition.partition_id, self._buckets), []).append(partition)
        for bucket, partitions in by_bucket.items():
            await self._locate(connection, bucket, partitions)
            # ids of a clock that was far from ours when they were pushed are among the keys
            again = [
                partition
                for partition in partitions
                if partition.keyed and any(text not in partition.offsets for text in partition.ids)
            ]
            if again:
                await self._locate(connection, bucket, again, by_key=True)

    async def _locate(
        self, connection: Connection, bucket: int, partitions: list[_Partition], *, by_key: bool = False
    ) -> None:
        probes: list[tuple[int, Any]] = []
        keys: list[tuple[int, str]] = []
        for number, partition in enumerate(partitions, start=1):
            uuid7s = []
            for text in partition.ids:
                if text in partition.offsets:
                    continue
                if not by_key and len(text) == 36 and CANONICAL_UUID7.fullmatch(text):
                    uuid7s.append(text)
                else:
                    keys.append((number, text))
            if uuid7s:
                probes += [(number, found) for found in ranges_of(uuid7s)]
        rows = await connection.fetch(
            _LOCATE,
            bucket,
            [partition.partition_id for partition in partitions],
            [number for number, _ in probes],
            [found.least for _, found in probes],
            [found.greatest for _, found in probes],
            [found.bound for _, found in probes],
            [number for number, _ in keys],
            [transaction_key(text) for _, text in keys],
        )
        for row in rows:
            partition = partitions[row["part"] - 1]
            if row["kind"] == "partition":
                partition.exists = True
                partition.queue, partition.name = row["queue_name"], row["partition_name"]
                partition.first_offset = row["first_offset"]
                partition.keyed = (row["low_id"], row["high_id"]) if row["low_id"] else None
            elif row["kind"] == "key":
                _, text = keys[row["key_number"] - 1]
                if row["message_offset"] >= partition.first_offset:
                    partition.offsets[text] = row["message_offset"]
            else:
                self._search(partition, row)

    @staticmethod
    def _search(partition: _Partition, row: Any) -> None:
        base, count, packed = row["message_offset"], row["message_count"], row["transaction_ids"]
        if row["minted"]:
            prefix, tail = id_prefix_text(row["id_prefix"]), id_tail(partition.partition_id)
            head = prefix + tail
            for text in partition.ids:
                if text.startswith(head) and (index := minted_index(text, prefix, tail, count)) >= 0:
                    if index in (row["erased"] or ()):
                        continue
                    partition.offsets[text] = base + index
        elif packed:
            held = {packed[at : at + 16]: at // 16 for at in range(0, len(packed), 16)}
            for text in partition.ids:
                if len(text) == 36 and CANONICAL_UUID7.fullmatch(text):
                    index = held.get(bytes.fromhex(text.replace("-", "")), -1)
                    if index >= 0:
                        partition.offsets[text] = base + index

    def _runs(self) -> dict[int, list[tuple[_Partition, str, int, UUID | None, _Run]]]:
        """By bucket, ordered by (partition, group, request, place): the runs that queen.ack gets."""
        cursors: dict[tuple[int, str], list[tuple[_Partition, str, int, UUID | None, _Run]]] = {}
        for number, request in enumerate(self.requests):
            results: list[AckResult] = []
            self.results.append(results)
            for place, ack in enumerate(request):
                partition = self.partitions[ack.partition_id]
                names: dict[str, Any] = {}
                if partition is not None and partition.exists:
                    names = {"queue": partition.queue, "partition": partition.name}
                refused = AckResult(transaction_id=ack.transaction_id, success=False, error=NOT_FOUND, **names)
                results.append(refused)
                if partition is None or not partition.exists or ack.transaction_id not in partition.offsets:
                    continue
                if ack.status is None:
                    results[place] = msgspec.structs.replace(refused, error=None)
                    continue
                lease_id: UUID | None = None
                if ack.lease_id:
                    try:
                        lease_id = UUID(ack.lease_id)
                    except ValueError:
                        results[place] = msgspec.structs.replace(refused, error=LEASE_LOST)
                        continue
                offset = partition.offsets[ack.transaction_id]
                runs = cursors.setdefault((partition.partition_id.int, ack.group), [])
                if runs and ack.status is AckStatus.COMPLETED:
                    _, _, last_request, last_lease, run = runs[-1]
                    if (
                        last_request == number
                        and last_lease == lease_id
                        and run.status is AckStatus.COMPLETED
                        and run.end == offset
                    ):
                        run.end = offset + 1
                        run.places.append(place)
                        continue
                runs.append((partition, ack.group, number, lease_id, _Run(offset, ack.status, place, ack.error)))
        by_bucket: dict[int, list[tuple[_Partition, str, int, UUID | None, _Run]]] = {}
        for key in sorted(cursors):
            runs = cursors[key]
            by_bucket.setdefault(bucket_of(runs[0][0].partition_id, self._buckets), []).extend(runs)
        return by_bucket

    async def apply(self, connection: Connection, keyring: Keyring) -> None:
        """asyncio flavor. Move the cursors; where :attr:`may_kill`, inside a transaction. Sets the results."""
        self.results = []
        self.released = []
        self._tallies = {}
        by_bucket = self._runs()
        for bucket in sorted(by_bucket):
            runs = by_bucket[bucket]
            rows = await connection.fetch(
                _ACK,
                bucket,
                connection.epoch,
                self._straight,
                [partition.partition_id for partition, *_ in runs],
                [group for _, group, *_ in runs],
                [request for _, _, request, *_ in runs],
                [lease_id for *_, lease_id, _ in runs],
                [_STATUS_CODES[run.status] for *_, run in runs],
                [run.first for *_, run in runs],
                [run.end for *_, run in runs],
            )
            for row, (partition, group, request, _, run) in zip(rows, runs, strict=True):
                run.lost, run.released, run.dead = row["lost"], row["released"], row["dead"]
                run.retry_count = row["retry_count"]
                if run.released:
                    self.released.append(Released(partition.queue, group, partition.name))
                if not run.lost:
                    tally = self._tallies.setdefault(partition.queue, [0, 0])
                    tally[0] += len(run.places)
                    tally[1] += run.dead
                if run.dead:
                    error = run.error or "Retries exhausted"
                    await bury(
                        connection,
                        bucket,
                        partition.partition_id,
                        partition.queue,
                        group,
                        run.first,
                        run.retry_count,
                        error,
                        keyring,
                    )
                self._answer(self.results[request], run)

    @staticmethod
    def _answer(results: list[AckResult], run: _Run) -> None:
        last = run.places[-1]
        for place in run.places:
            results[place] = msgspec.structs.replace(
                results[place],
                success=not run.lost,
                error=LEASE_LOST if run.lost else None,
                lease_released=run.released and place == last,
                dead_lettered=run.dead,
            )


async def bury(
    connection: Connection,
    bucket: int,
    partition_id: UUID,
    queue: str,
    group: str,
    offset: int,
    retry_count: int,
    error: str,
    keyring: Keyring,
) -> None:
    """asyncio flavor, inside a transaction. Write the dead letter with its payload, or fail with the transaction."""
    row = await connection.fetchrow(_READ, bucket, [partition_id], [offset], [offset + 1])
    body = Body(row["codec"], row["raw_bytes"], row["key_id"], row["body"])
    lines = unseal(body, partition_id, keyring, queue)
    index = offset - row["base_offset"]
    line = lines.split(b"\n", index + 1)[index]
    if not line:
        return  # deleted since it was found: there is nothing to keep
    sealed = seal(line, partition_id, keyring if body.key_id else None)
    message_id = id_prefix_text(row["id_prefix"]) + line[:12].decode()
    await connection.execute(
        _DEAD,
        bucket,
        partition_id,
        offset,
        group,
        UUID(message_id),
        retry_count,
        row["created_at"],
        sealed.codec,
        row["minted"],
        sealed.key_id,
        error,
        sealed.data,
    )


class Acks:
    """Acknowledgements, lease extensions, transactions and dead letters in PostgreSQL."""

    def __init__(self, bridge: Bridge, catalogue: Catalogue, pushes: Pushes, keyring: Keyring, buckets: int) -> None:
        self._bridge = bridge
        self._catalogue = catalogue
        self._pushes = pushes
        self._keyring = keyring
        self._buckets = buckets
        self.activity = Activity()

    async def ack(self, requests: Sequence[Sequence[Ack]]) -> tuple[list[list[AckResult]], list[Released]]:
        """Apply the acks of all requests in one commit; results per request, in input order."""
        flush = AckFlush(requests, self._buckets)

        async def work(connection: Connection) -> None:
            await flush.locate(connection)
            if flush.may_kill or self._buckets > 1:
                async with connection.transaction():
                    await flush.apply(connection, self._keyring)
            else:
                await flush.apply(connection, self._keyring)

        await self._bridge.run(work)
        flush.count(self.activity)
        return flush.results, flush.released

    async def transact(
        self, flush: Flush, acks: Sequence[Ack], required_leases: Sequence[str]
    ) -> tuple[str | None, list[PushResult], list[AckResult], list[Woken], list[Released]]:
        """Push and ack in one commit, or nothing: then the first member says why, in the words of the contract.

        ``flush`` holds one push request with all messages of the transaction, in order.
        """
        woken: list[Woken] = []
        ack_flush = AckFlush([acks], self._buckets, straight=True)

        async def work(connection: Connection) -> str | None:
            await ack_flush.locate(connection)
            transaction = connection.transaction()
            await transaction.start()
            try:
                error = await attempt(connection)
            except BaseException:
                await transaction.rollback()
                raise
            if error is None:
                await transaction.commit()
            else:
                await transaction.rollback()
            return error

        async def attempt(connection: Connection) -> str | None:
            woken.clear()
            for lease in required_leases:
                if not await self._is_live(connection, lease):
                    return f"ACK operation failed: {LEASE_LOST}"
            if flush.message_count:
                verdict = await flush.store(connection, may_create=True)
                if isinstance(verdict, str):
                    return verdict
                woken.extend(verdict)
            await ack_flush.apply(connection, self._keyring)
            for result in ack_flush.results[0]:
                if not result.success:
                    return f"ACK operation failed: {result.error or 'unknown status'}"
            return None

        for _ in range(_STALE_TRIES):
            await self._catalogue.ensure(flush.queue_names)
            if not flush.prepare(self._catalogue):
                continue
            error = await self._bridge.run(work)
            if error in ("stale", "unknown"):
                self._pushes.recover(flush, error)
                continue
            if error is not None:
                return error, [], [], [], []
            flush.count(self.activity)
            ack_flush.count(self.activity)
            self.activity.count(next(iter(flush.queue_names), None), transactions=1)
            return None, flush.results()[0], ack_flush.results[0], woken, ack_flush.released
        return "queues of this transaction kept changing; nothing was applied", [], [], [], []

    async def _is_live(self, connection: Connection, lease: str) -> bool:
        """asyncio flavor."""
        try:
            lease_id = UUID(lease)
        except ValueError:
            return False
        for bucket in range(self._buckets):
            if await connection.fetchval(
                "SELECT EXISTS (SELECT FROM queen.cursors c WHERE c.bucket = $1 AND c.lease_id = $2"
                " AND c.lease_expires_at > clock_timestamp() AND c.lease_epoch = $3)",
                bucket,
                lease_id,
                connection.epoch,
            ):
                return True
        return False

    async def extend(self, lease: str, seconds: int) -> LeaseExtension:
        """Extend every partition leased under ``lease`` to at least ``seconds`` from now; an ended one stays ended."""
        try:
            lease_id = UUID(lease)
        except ValueError:
            return LeaseExtension(lease_id=lease, renewed=0, error="Lease not found")

        async def work(connection: Connection) -> list[Any]:
            async with connection.transaction():
                return [
                    await connection.fetchrow(_EXTEND, bucket, connection.epoch, lease_id, seconds)
                    for bucket in range(self._buckets)
                ]

        rows = await self._bridge.run(work)
        renewed = sum(row["renewed"] for row in rows)
        if renewed:
            expires_at = min(row["expires_at"] for row in rows if row["renewed"])
            return LeaseExtension(lease_id=lease, renewed=renewed, expires_at=expires_at)
        known = any(row["known"] for row in rows)
        return LeaseExtension(lease_id=lease, renewed=0, error="Lease already expired" if known else "Lease not found")


def new_lease_id() -> UUID:
    """A lease id nobody can guess."""
    return uuid4()
