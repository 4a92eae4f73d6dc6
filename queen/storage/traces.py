"""Recording traces and finding them by message or by name. A trace lies in the bucket of its message's partition."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID, uuid4

from queen.model.message import Ack
from queen.model.trace import NamedTrace, NewTrace, Trace, TraceName
from queen.storage.acks import AckFlush
from queen.storage.bridge import Bridge
from queen.storage.connect import Connection
from queen.storage.ids import bucket_of, id_prefix_text
from queen.storage.segments import Body, Keyring, unseal

PAYLOAD_BYTES: Final = 16 * 1024 * 1024
"""Payloads that one page of traces carries; past it they are left out."""

MAX_OF_MESSAGE: Final = 1000
"""Traces of one message that a page shows, the first ones."""

DROP_STEP: Final = 1000
"""Old traces removed in one transaction."""

_RECORD: Final = "SELECT queen.record_traces($1, NULL, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)"
_OF_MESSAGE: Final = """
    SELECT t.* FROM queen.traces t WHERE t.bucket = $1 AND t.partition_id = $2 AND t.message_offset = $3
    ORDER BY t.created_at, t.trace_id LIMIT $4
"""
_BY_NAME: Final = """
    SELECT t.*, p.name AS partition, q.name AS queue
    FROM (
        SELECT n.* FROM queen.trace_names n WHERE n.bucket = $1 AND n.name = $2
        ORDER BY n.created_at, n.trace_id LIMIT $3
    ) n
    CROSS JOIN LATERAL (
        SELECT tr.* FROM queen.traces tr
        WHERE tr.bucket = $1 AND tr.partition_id = n.partition_id AND tr.message_offset = n.message_offset
            AND tr.trace_id = n.trace_id LIMIT 1
    ) t
    CROSS JOIN LATERAL (
        SELECT pa.name, pa.queue_id FROM queen.partitions pa
        WHERE pa.bucket = $1 AND pa.partition_id = n.partition_id LIMIT 1
    ) p
    CROSS JOIN LATERAL (SELECT qu.name FROM queen.queues qu WHERE qu.queue_id = p.queue_id LIMIT 1) q
    ORDER BY t.created_at, t.trace_id
"""
_NAMES: Final = "SELECT t.* FROM queen.trace_totals t WHERE t.bucket = $1 ORDER BY t.last_seen DESC, t.name LIMIT $2"
_TOTALS: Final = "SELECT t.* FROM queen.trace_totals t WHERE t.bucket = $1 AND t.name = ANY ($2)"
_SEGMENTS: Final = "SELECT * FROM queen.read_segments($1, $2, $3, $4, 1, 1, true)"


class Traces:
    """Traces in PostgreSQL."""

    def __init__(self, bridge: Bridge, keyring: Keyring, buckets: int) -> None:
        self._bridge = bridge
        self._keyring = keyring
        self._buckets = buckets

    async def record(self, traces: Sequence[NewTrace]) -> list[UUID | None]:
        """Record traces in one commit. Their ids in order; None where there is no such message."""
        ids: list[UUID | None] = [None] * len(traces)
        flush = AckFlush(
            [[Ack(transaction_id=trace.transaction_id, partition_id=trace.partition_id) for trace in traces]],
            self._buckets,
        )

        async def write(connection: Connection) -> None:
            await flush.locate(connection)
            found: dict[int, list[tuple[int, NewTrace, UUID, int]]] = {}
            for place, trace in enumerate(traces):
                partition = flush.partitions[trace.partition_id]
                if partition is not None and trace.transaction_id in partition.offsets:
                    bucket = bucket_of(partition.partition_id, self._buckets)
                    offset = partition.offsets[trace.transaction_id]
                    found.setdefault(bucket, []).append((place, trace, partition.partition_id, offset))
            async with connection.transaction():
                for bucket in sorted(found):
                    await self._record(connection, bucket, found[bucket], ids)

        await self._bridge.run(write)
        return ids

    async def _record(
        self,
        connection: Connection,
        bucket: int,
        found: Sequence[tuple[int, NewTrace, UUID, int]],
        ids: list[UUID | None],
    ) -> None:
        """asyncio flavor."""
        minted = [uuid4() for _ in found]
        names = [(number, name) for number, (_, trace, *_) in enumerate(found, start=1) for name in trace.names]
        await connection.execute(
            _RECORD,
            bucket,
            minted,
            [partition_id for _, _, partition_id, _ in found],
            [offset for *_, offset in found],
            [trace.transaction_id for _, trace, *_ in found],
            [trace.event_type for _, trace, *_ in found],
            [trace.group for _, trace, *_ in found],
            [trace.worker_id for _, trace, *_ in found],
            [trace.data for _, trace, *_ in found],
            [number for number, _ in names],
            [name for _, name in names],
        )
        for (place, *_), trace_id in zip(found, minted, strict=True):
            ids[place] = trace_id

    async def of_message(self, partition_id: str, transaction_id: str) -> list[Trace]:
        """The traces of a message, oldest first; none where there is no such message."""

        async def read(connection: Connection) -> list[Any]:
            flush = AckFlush([[Ack(transaction_id=transaction_id, partition_id=partition_id)]], self._buckets)
            await flush.locate(connection)
            partition = flush.partitions[partition_id]
            if partition is None or transaction_id not in partition.offsets:
                return []
            bucket = bucket_of(partition.partition_id, self._buckets)
            rows: list[Any] = await connection.fetch(
                _OF_MESSAGE, bucket, partition.partition_id, partition.offsets[transaction_id], MAX_OF_MESSAGE
            )
            return rows

        return [_trace(row) for row in await self._bridge.run(read, writes=False)]

    async def by_name(self, name: str, limit: int, offset: int) -> tuple[int, list[NamedTrace]]:
        """How many traces have a name, and a page of them, oldest first, with their messages while these are stored."""

        async def read(connection: Connection) -> tuple[int, list[NamedTrace]]:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                total = 0
                pages = []
                for bucket in range(self._buckets):
                    total += sum(row["traces"] for row in await connection.fetch(_TOTALS, bucket, [name]))
                    pages.append(await connection.fetch(_BY_NAME, bucket, name, offset + limit))
                merged = heapq.merge(*pages, key=lambda row: (row["created_at"], row["trace_id"]))
                rows = list(merged)[offset : offset + limit]
                return total, await self._with_messages(connection, rows)

        return await self._bridge.run(read, writes=False)

    async def _with_messages(self, connection: Connection, rows: Sequence[Any]) -> list[NamedTrace]:
        """asyncio flavor. One message at a time: a page may be of large ones."""
        found = []
        lines: dict[tuple[UUID, int], tuple[str, bytes] | None] = {}
        left = PAYLOAD_BYTES
        for row in rows:
            key = (row["partition_id"], row["message_offset"])
            if key not in lines and left > 0:
                lines[key] = await self._line(connection, *key, row["queue"])
                line = lines[key]
                left -= 0 if line is None else len(line[1])
            prefix, text = lines.get(key) or ("", None)
            found.append(
                NamedTrace(
                    trace=_trace(row), queue=row["queue"], partition=row["partition"], line=text, id_prefix=prefix
                )
            )
        return found

    async def _line(
        self, connection: Connection, partition_id: UUID, offset: int, queue: str
    ) -> tuple[str, bytes] | None:
        """asyncio flavor. A stored line and the id prefix that it lacks; None when it is gone."""
        bucket = bucket_of(partition_id, self._buckets)
        row = await connection.fetchrow(_SEGMENTS, bucket, [partition_id], [offset], [offset + 1])
        if row is None or not row["base_offset"] <= offset < row["base_offset"] + row["message_count"]:
            return None
        body = Body(row["codec"], row["raw_bytes"], row["key_id"], row["body"])
        place = offset - row["base_offset"]
        line = unseal(body, partition_id, self._keyring, queue).split(b"\n", place + 1)[place]
        return (id_prefix_text(row["id_prefix"]), line) if line else None

    async def names(self, limit: int, offset: int) -> tuple[int, list[TraceName]]:
        """How many names there are, and a page of them, the latest first."""

        async def read(connection: Connection) -> tuple[int, list[TraceName]]:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                latest: dict[str, datetime] = {}
                count = await connection.fetchval(
                    "SELECT count(DISTINCT t.name) FROM (SELECT name FROM queen.trace_totals LIMIT 100000) t"
                )
                for bucket in range(self._buckets):
                    for row in await connection.fetch(_NAMES, bucket, offset + limit):
                        seen = latest.get(row["name"])
                        if seen is None or row["last_seen"] > seen:
                            latest[row["name"]] = row["last_seen"]
                page = sorted(latest, key=lambda name: (-latest[name].timestamp(), name))[offset : offset + limit]
                traces = dict.fromkeys(page, 0)
                messages = dict.fromkeys(page, 0)
                for bucket in range(self._buckets):
                    for row in await connection.fetch(_TOTALS, bucket, page):
                        traces[row["name"]] += row["traces"]
                        messages[row["name"]] += row["messages"]
                return count, [
                    TraceName(name=name, traces=traces[name], messages=messages[name], last_seen=latest[name])
                    for name in page
                ]

        return await self._bridge.run(read, writes=False)

    async def expire(self, days: int) -> int:
        """Remove traces older than that, in steps. Returns how many."""
        removed = 0
        for bucket in range(self._buckets):

            async def step(connection: Connection) -> int:
                return await connection.fetchval(  # type: ignore[no-any-return]
                    "SELECT queen.drop_traces($1, NULL, NULL, clock_timestamp() - make_interval(days => $2), $3)",
                    bucket,  # noqa: B023  awaited here
                    days,
                    DROP_STEP,
                )

            gone = DROP_STEP
            while gone == DROP_STEP:
                gone = await self._bridge.run(step)
                removed += gone
        return removed


def _trace(row: Any) -> Trace:
    return Trace(
        trace_id=row["trace_id"],
        transaction_id=row["transaction_id"],
        partition_id=row["partition_id"],
        event_type=row["event_type"],
        data=row["data"],
        group=row["group_name"],
        worker_id=row["worker_id"],
        created_at=row["created_at"],
        names=tuple(row["names"]),
    )
