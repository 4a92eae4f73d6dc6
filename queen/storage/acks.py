"""Acknowledgements, dead letters and transactions. The decisions about cursors and leases are made in ``queen.ack_v2``.

A consumer names a message by its transaction id; ``queen.locate`` finds its offset. Acknowledged messages that go to
the dead letter queue are copied there, payload and all, in the transaction that passes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Final, NamedTuple
from uuid import UUID, uuid4

import structlog

from queen.model.message import Ack, AckResult, AckStatus, LeaseExtension, PushResult
from queen.observability.activity import Activity
from queen.storage.bridge import Bridge
from queen.storage.catalogue import Catalogue
from queen.storage.connect import Connection
from queen.storage.delivered import Delivered, Delivery
from queen.storage.ids import (
    IdRange,
    bucket_of,
    id_prefix_text,
    id_tail,
    minted_index,
    ranges_of,
    split_by_form,
    transaction_key,
)
from queen.storage.pushes import Flush, Pushes, Woken
from queen.storage.segments import Body, Keyring, seal, unseal

NOT_FOUND: Final = "Message not found"
LEASE_LOST: Final = "Invalid or expired lease"

_STATUS_CODES: Final = {AckStatus.COMPLETED: 0, AckStatus.FAILED: 1, AckStatus.DLQ: 2, AckStatus.RETRY: 3}
_LOCATE: Final = "SELECT * FROM queen.locate($1, $2, $3, $4, $5, $6, $7, $8)"
_ACK: Final = "SELECT * FROM queen.ack_v2($1, NULL, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)"
ACK_ARGUMENTS: Final = 9  # of those above, the last: AckFlush.arguments
HOT: Final = (_LOCATE, _ACK)  # what nearly every ack runs
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
_BACK_OFF: Final = "SELECT queen.back_off($1, NULL, $2, $3)"
_EXTEND: Final = "SELECT * FROM queen.extend_lease($1, NULL, $2, $3, $4)"
_STALE_TRIES: Final = 8

log = structlog.get_logger("queen.storage")


class Released:
    """A lease that ended with something left: it may be ready for (queue, group)."""

    __slots__ = ("group", "partition", "queue")

    def __init__(self, queue: str, group: str, partition: str) -> None:
        self.queue = queue
        self.group = group
        self.partition = partition


class _Partition:
    """A partition that acks name: what exists, and where the messages lie."""

    def __init__(self, partition_id: UUID) -> None:
        self.partition_id = partition_id
        self.ids: dict[str, None] = {}  # in the order of the acks: mostly that of the messages
        self.exists = False
        self.located = False  # in PostgreSQL: what is said of it is not from memory
        self.queue = ""
        self.name = ""
        self.first_offset = 0
        self.keyed: tuple[UUID, UUID] | None = None
        self.wanted: dict[str, bytes] = {}  # the UUIDv7 texts among the ids, with their 16 bytes
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


class _Entry(NamedTuple):
    """A run and the cursor and request it belongs to."""

    partition: _Partition
    group: str
    request: int
    lease_id: UUID | None
    run: _Run


_PENDING: Final = AckResult(transaction_id="", success=False)
"""Stands for the result of an ack until its run is answered; none is left when a flush is done."""


class AckFlush:
    """The acks of many requests, applied as one."""

    def __init__(
        self,
        requests: Sequence[Sequence[Ack]],
        buckets: int,
        delivered: Delivered | None = None,
        *,
        straight: bool = False,
    ) -> None:
        self.requests = requests
        self._buckets = buckets
        self._straight = straight
        self.partitions: dict[str, _Partition | None] = {}  # by the text the client sent
        for request in requests:
            last: str | None = None
            lease: str | None = None
            partition: _Partition | None = None
            delivery: Delivery | None = None
            for ack in request:
                if ack.partition_id != last or ack.lease_id != lease:
                    last, lease = ack.partition_id, ack.lease_id
                    if last not in self.partitions:
                        partition_id = _uuid(last)
                        self.partitions[last] = None if partition_id is None else _Partition(partition_id)
                    partition = self.partitions[last]
                    delivery = delivered.find(lease, last) if lease and delivered else None
                    if delivery is not None and partition is not None:
                        partition.exists = True
                        partition.queue, partition.name = delivery.queue, delivery.partition
                if partition is not None:
                    offset = -1 if delivery is None else delivery.offset_of(ack.transaction_id)
                    if offset >= 0:
                        partition.offsets[ack.transaction_id] = offset
                    else:
                        partition.ids[ack.transaction_id] = None
        self.results: list[list[AckResult]] = []
        self.released: list[Released] = []
        self.ended: list[tuple[str, str]] = []  # leases that ended, with their partition, as clients write them
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

    async def locate(self, connection: Connection) -> None:
        """asyncio flavor. Find every message named that was not delivered here."""
        by_bucket: dict[int, list[_Partition]] = {}
        for partition in self.partitions.values():
            if partition is not None and partition.ids:
                partition.exists = False
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
        self, connection: Connection, bucket: int, partitions: Sequence[_Partition], *, by_key: bool = False
    ) -> None:
        probes: list[tuple[int, IdRange]] = []
        keys: list[tuple[int, str, bytes]] = []
        for number, partition in enumerate(partitions, start=1):
            missing = [text for text in partition.ids if text not in partition.offsets]
            if by_key:
                keys += [(number, text, transaction_key(text)) for text in missing]
                continue
            uuid7s, keyed = split_by_form(missing)
            keys += [(number, text, key) for text, key in keyed]
            if uuid7s:
                partition.wanted = uuid7s
                probes += [(number, found) for found in ranges_of(list(uuid7s))]
        rows = await connection.fetch(
            _LOCATE,
            bucket,
            [partition.partition_id for partition in partitions],
            [number for number, _ in probes],
            [found.least for _, found in probes],
            [found.greatest for _, found in probes],
            [found.bound for _, found in probes],
            [number for number, *_ in keys],
            [key for *_, key in keys],
        )
        for row in rows:
            partition = partitions[row["part"] - 1]
            if row["kind"] == "partition":
                partition.exists = partition.located = True
                partition.queue, partition.name = row["queue_name"], row["partition_name"]
                partition.first_offset = row["first_offset"]
                partition.keyed = (row["low_id"], row["high_id"]) if row["low_id"] else None
            elif row["kind"] == "key":
                _, text, _ = keys[row["key_number"] - 1]
                if row["message_offset"] >= partition.first_offset:
                    partition.offsets[text] = row["message_offset"]
            else:
                self._search(partition, row)

    @staticmethod
    def _search(partition: _Partition, row: Any) -> None:
        """Find the ids asked for in one segment."""
        base, count, packed, wanted = (
            row["message_offset"],
            row["message_count"],
            row["transaction_ids"],
            partition.wanted,
        )
        if row["minted"]:
            prefix, tail = id_prefix_text(row["id_prefix"]), id_tail(partition.partition_id)
            erased = row["erased"] or ()
            for text in wanted:
                index = minted_index(text, prefix, tail, count)
                if index >= 0 and index not in erased:
                    partition.offsets[text] = base + index
        elif packed:
            run = b"".join(wanted.values())
            at = packed.find(run)
            if at >= 0 and at % 16 == 0:  # the common case: what was delivered together is acked together, in order
                partition.offsets.update(zip(wanted, range(base + at // 16, base + count), strict=False))
                return
            held = {packed[at : at + 16]: at // 16 for at in range(0, len(packed), 16)}
            for text, key in wanted.items():
                index = held.get(key, -1)
                if index >= 0:
                    partition.offsets[text] = base + index

    def _runs(self) -> dict[int, list[_Entry]]:
        """By bucket, ordered by (partition, group, request, place): the runs that queen.ack_v2 gets."""
        cursors: dict[tuple[int, str], list[_Entry]] = {}
        for number, request in enumerate(self.requests):
            results: list[AckResult] = [_PENDING] * len(request)
            self.results.append(results)
            open_run: _Run | None = None  # a completed run that the next ack may prolong
            of: Ack | None = None  # the ack that began it
            offsets: dict[str, int] = {}
            for place, ack in enumerate(request):
                if (
                    open_run is not None
                    and of is not None
                    and ack.status is AckStatus.COMPLETED
                    and offsets.get(ack.transaction_id) == open_run.end
                    and ack.partition_id == of.partition_id
                    and ack.lease_id == of.lease_id
                    and ack.group == of.group
                ):
                    open_run.end += 1
                    open_run.places.append(place)
                    continue
                open_run = None
                partition = self.partitions[ack.partition_id]
                if partition is None or not partition.exists:
                    results[place] = AckResult(transaction_id=ack.transaction_id, success=False, error=NOT_FOUND)
                    continue
                offset = partition.offsets.get(ack.transaction_id)
                lease_id = _uuid(ack.lease_id) if ack.lease_id else None
                if offset is None:
                    results[place] = _refusal(ack, partition, NOT_FOUND)
                elif ack.status is None:
                    results[place] = _refusal(ack, partition, None)
                elif ack.lease_id and lease_id is None:
                    results[place] = _refusal(ack, partition, LEASE_LOST)
                else:
                    run = _Run(offset, ack.status, place, ack.error)
                    cursors.setdefault((partition.partition_id.int, ack.group), []).append(
                        _Entry(partition, ack.group, number, lease_id, run)
                    )
                    if ack.status is AckStatus.COMPLETED:
                        open_run, of, offsets = run, ack, partition.offsets
        by_bucket: dict[int, list[_Entry]] = {}
        for key in sorted(cursors):
            entries = cursors[key]
            by_bucket.setdefault(bucket_of(entries[0].partition.partition_id, self._buckets), []).extend(entries)
        return by_bucket

    def prepare(self) -> dict[int, list[_Entry]]:
        """The runs to apply, by bucket. Those named by nothing that is known have their results now."""
        self.results = []
        self.released = []
        self.ended = []
        self._tallies = {}
        return self._runs()

    def arguments(self, runs: Sequence[_Entry]) -> list[Any]:
        """Of queen.ack_v2, from the fourth on: of runs of one bucket."""
        return [
            self._straight,
            [entry.partition.partition_id for entry in runs],
            [entry.group for entry in runs],
            [entry.request for entry in runs],
            [entry.lease_id for entry in runs],
            [_STATUS_CODES[entry.run.status] for entry in runs],
            [entry.run.first for entry in runs],
            [entry.run.end for entry in runs],
            _whole(runs),
        ]

    async def apply(self, connection: Connection, keyring: Keyring) -> None:
        """asyncio flavor, inside a transaction. Move the cursors, and set the results."""
        by_bucket = self.prepare()
        for bucket in sorted(by_bucket):
            runs = by_bucket[bucket]
            rows = await connection.fetch(_ACK, bucket, connection.epoch, *self.arguments(runs))
            await self.take(connection, bucket, runs, rows, keyring)

    async def take(
        self, connection: Connection, bucket: int, runs: Sequence[_Entry], rows: list[Any], keyring: Keyring
    ) -> None:
        """asyncio flavor. Read what queen.ack_v2 says of the runs, and see to what is dead or comes again."""
        self.hear(runs, rows)
        await self.find_again(connection, bucket, self.unsure(runs))
        again: dict[tuple[UUID, str], None] = {}  # what was given back
        for partition, group, _, _, run in runs:
            if run.released and not run.dead and run.status in (AckStatus.FAILED, AckStatus.RETRY):
                again[partition.partition_id, group] = None
            if run.dead:
                # false: retention took the message since it was found; it is passed all the same
                run.dead = await bury(
                    connection,
                    bucket,
                    partition.partition_id,
                    partition.queue,
                    group,
                    run.first,
                    run.retry_count,
                    run.error or "Retries exhausted",
                    keyring,
                )
        self.answer(runs)
        if again:
            where, groups = zip(*again, strict=True)
            await connection.execute(_BACK_OFF, bucket, list(where), list(groups))

    def hear(self, runs: Sequence[_Entry], rows: list[Any]) -> None:
        """Note what queen.ack_v2 says of the runs."""
        rows.sort(key=itemgetter("run"))
        for row, (partition, group, _, _, run) in zip(rows, runs, strict=True):
            run.lost, run.released, run.dead = row["lost"], row["released"], row["dead"]
            run.retry_count = row["retry_count"]
            if row["pending"]:
                self.released.append(Released(partition.queue, group, partition.name))

    @staticmethod
    def unsure(runs: Sequence[_Entry]) -> list[_Partition]:
        """Of messages that were delivered here and whose leases are gone: perhaps the messages are, too."""
        return list({entry.partition: None for entry in runs if entry.run.lost and not entry.partition.located})

    async def find_again(self, connection: Connection, bucket: int, unsure: Sequence[_Partition]) -> None:
        """asyncio flavor. Look for them where they are stored. With an error all is as it was."""
        remembered = [partition.offsets for partition in unsure]
        for partition in unsure:
            partition.exists = False
            partition.ids.update(dict.fromkeys(partition.offsets))
            partition.offsets = {}
        try:
            if unsure:
                await self._locate(connection, bucket, unsure)
        except BaseException:
            for partition, offsets in zip(unsure, remembered, strict=True):
                partition.exists, partition.located, partition.offsets = True, False, offsets
            raise

    def answer(self, runs: Sequence[_Entry]) -> None:
        """The results of runs of which all is known."""
        for partition, _, request, _, run in runs:
            if not run.lost:
                tally = self._tallies.setdefault(partition.queue, [0, 0])
                tally[0] += len(run.places)
                tally[1] += run.dead
            if run.released:
                ack = self.requests[request][run.places[0]]
                self.ended.append((ack.lease_id or "", ack.partition_id))
            self._answer(self.requests[request], self.results[request], partition, run)

    @staticmethod
    def _answer(request: Sequence[Ack], results: list[AckResult], partition: _Partition, run: _Run) -> None:
        success, error, dead = not run.lost, LEASE_LOST if run.lost else None, run.dead
        queue, name, last = partition.queue, partition.name, run.places[-1]
        for place in run.places:
            if run.lost and not (partition.exists and request[place].transaction_id in partition.offsets):
                error = NOT_FOUND
            results[place] = AckResult(
                transaction_id=request[place].transaction_id,
                success=success,
                error=error,
                queue=queue,
                partition=name,
                lease_released=run.released and place == last,
                dead_lettered=dead,
            )


def _refusal(ack: Ack, partition: _Partition, error: str | None) -> AckResult:
    return AckResult(
        transaction_id=ack.transaction_id, success=False, error=error, queue=partition.queue, partition=partition.name
    )


def _whole(runs: Sequence[_Entry]) -> list[bool]:
    """Which of these runs may be all of a lease: completed, and the only one of its cursor."""
    cursors = [(entry.partition, entry.group) for entry in runs]
    return [
        entry.lease_id is not None
        and entry.run.status is AckStatus.COMPLETED
        and (at == 0 or cursors[at] != cursors[at - 1])
        and (at + 1 == len(cursors) or cursors[at] != cursors[at + 1])
        for at, entry in enumerate(runs)
    ]


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


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
) -> bool:
    """asyncio flavor, inside a transaction. Write the dead letter with its payload, or fail with the transaction.

    False: the message was removed since it was found; there is nothing to keep.
    """
    row = await connection.fetchrow(_READ, bucket, [partition_id], [offset], [offset + 1])
    if row is None or row["base_offset"] > offset:
        return False
    body = Body(row["codec"], row["raw_bytes"], row["key_id"], row["body"])
    lines = unseal(body, partition_id, keyring, queue)
    index = offset - row["base_offset"]
    line = lines.split(b"\n", index + 1)[index]
    if not line:
        return False
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
    return True


class Acks:
    """Acknowledgements, lease extensions, transactions and dead letters in PostgreSQL."""

    def __init__(
        self,
        bridge: Bridge,
        catalogue: Catalogue,
        pushes: Pushes,
        delivered: Delivered,
        keyring: Keyring,
        buckets: int,
    ) -> None:
        self._bridge = bridge
        self._catalogue = catalogue
        self._pushes = pushes
        self._delivered = delivered
        self._keyring = keyring
        self._buckets = buckets
        self.activity = Activity()

    def flush_of(self, requests: Sequence[Sequence[Ack]]) -> AckFlush:
        """A flush, unsent."""
        return AckFlush(requests, self._buckets, self._delivered)

    async def ack(self, requests: Sequence[Sequence[Ack]]) -> tuple[list[list[AckResult]], list[Released]]:
        """Apply the acks of all requests in one commit; results per request, in input order."""
        flush = self.flush_of(requests)

        async def work(connection: Connection) -> None:
            await flush.locate(connection)
            async with connection.transaction():
                await flush.apply(connection, self._keyring)

        await self._bridge.run(work)
        self._done(flush)
        return flush.results, flush.released

    async def settle(self, flush: AckFlush, runs: Sequence[_Entry]) -> None:
        """The commit of these runs of bucket 0, all completed, was heard of: whatever happens now, it stands.

        Looks again for messages of lost leases. Where that cannot be had, what is known is told: the lease is lost.
        """
        if unsure := flush.unsure(runs):
            try:
                await self._bridge.run(lambda connection: flush.find_again(connection, 0, unsure), writes=False)
            except Exception as error:  # noqa: BLE001  raised, it would tell the others of this write that it failed
                log.warning("leases are lost, and whether their messages are is not known", error=repr(error))
        flush.answer(runs)
        self._done(flush)

    def _done(self, flush: AckFlush) -> None:
        """Count it, and forget the leases that have ended."""
        flush.count(self.activity)
        self._delivered.forget(flush.ended)

    async def transact(
        self, flush: Flush, acks: Sequence[Ack], required_leases: Sequence[str]
    ) -> tuple[str | None, list[PushResult], list[AckResult], list[Woken], list[Released]]:
        """Push and ack in one commit, or nothing: then the first member says why, in the words of the contract.

        ``flush`` holds one push request with all messages of the transaction, in order.
        """
        woken: list[Woken] = []
        ack_flush = AckFlush([acks], self._buckets, self._delivered, straight=True)

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
            if flush.message_count and (full := await flush.reserve(connection)):
                return full[0].detail
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
            self._delivered.forget(ack_flush.ended)
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
