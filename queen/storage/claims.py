"""Taking messages: claims for many waiting consumers in one call, then the segments of what was claimed.

A claim commits before anything is read: what a consumer is told it has, it has. Segments are immutable, so reading
them afterwards, as slowly as the client drains, gives the same bytes.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec
import structlog

from queen.model.message import ClaimedPartition, SegmentSlice
from queen.model.queue import Queue
from queen.observability.activity import Activity
from queen.storage.bridge import Bridge
from queen.storage.connect import Connection
from queen.storage.delivered import Delivered
from queen.storage.ids import bucket_of, id_prefix_text
from queen.storage.segments import Body, Keyring, unseal

READ_BYTES: Final = 512 * 1024
"""Raw envelopes of a later read, per streaming client: with the 64 KiB chunks in flight this bounds what one slow
reader holds in memory to a few segments (one segment is at most 1 MiB, or one message)."""

READ_SEGMENTS: Final = 2000
_CLAIM: Final = "SELECT * FROM queen.claim_v3($1, NULL, $2, $3, $4, $5, $6, $7, $8, $9)"
CLAIM_ARGUMENTS: Final = 7  # of those above, the last: ClaimFlush.arguments
_READY: Final = "SELECT * FROM queen.ready($1, NULL, $2, $3)"
_READ: Final = "SELECT * FROM queen.read_segments($1, $2, $3, $4, $5, $6, $7)"
_GIVE_BACK: Final = "SELECT queen.give_back($1, NULL, $2, $3, $4, $5, $6)"
HOT: Final = (_CLAIM, _READY, _READ)  # what nearly every pop runs

log = structlog.get_logger("queen.storage")


class ClaimRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What one waiting pop wants. ``queues`` in order of preference; ``partition_id`` only with exactly one queue."""

    queues: tuple[Queue, ...]
    group: str
    partition_id: UUID | None
    batch: int
    partitions: int
    lease_id: UUID | None  # None: autoAck


class Segment(msgspec.Struct, frozen=True):
    """A segment as read, decompressed."""

    base_offset: int
    message_count: int
    created_at: Any
    id_prefix: str
    minted: bool
    lines: bytes
    erased: tuple[int, ...]  # places of deleted messages: their lines are empty

    def slice(self, claim: ClaimedPartition, from_offset: int) -> SegmentSlice:
        """The part of it that the claim covers, from ``from_offset`` on."""
        first = max(from_offset - self.base_offset, 0)
        end = min(claim.end - self.base_offset, self.message_count)
        lines, count = self.lines, end - first
        if self.erased or claim.skipped:  # the cache may hold a line that was deleted since: claim.skipped knows
            skipped = {*self.erased, *(offset - self.base_offset for offset in claim.skipped)}
            places = enumerate(lines.split(b"\n")[first:end], start=first)
            kept = [line for place, line in places if place not in skipped]
            lines, count = b"\n".join(kept), len(kept)
        elif first > 0 or end < self.message_count:
            lines = b"\n".join(lines.split(b"\n", end)[first:end])
        return SegmentSlice(
            claim=claim,
            created_at=self.created_at,
            id_prefix=self.id_prefix,
            minted=self.minted,
            first=self.base_offset + first,
            count=count,
            lines=lines,
        )


class Surplus(NamedTuple):
    """What claims have left: in ``due_seconds`` something may be ready for pops of (queue, group) that name this
    partition, or none. ``pops``: how many like those that were served could be served at once, as far as is known."""

    queue: Queue
    group: str
    partition: str | None
    due_seconds: float
    pops: int


class ClaimOutcome:
    """What one request got: claims and the first of their segments, or when to look again."""

    __slots__ = ("claims", "due_seconds", "lease_id", "rows", "unregistered")

    def __init__(self, lease_id: UUID | None) -> None:
        self.lease_id = lease_id  # None: autoAck
        self.claims: list[ClaimedPartition] = []
        self.rows: list[tuple[ClaimedPartition, Any]] = []  # segments that came with the claims
        self.due_seconds: float | None = None
        self.unregistered: list[Queue] = []

    def fills(self, request: ClaimRequest) -> bool:
        """Whether it is all that was asked for."""
        messages = sum(claim.end - claim.first for claim in self.claims)
        return messages >= request.batch or len(self.claims) >= request.partitions

    def due(self, seconds: float | None) -> None:
        if seconds is not None and (self.due_seconds is None or seconds < self.due_seconds):
            self.due_seconds = seconds


class _Left:
    """What a call of claims has left, as its rows tell."""

    def __init__(self) -> None:
        self.expired = False  # messages were passed that are to become dead letters
        self._more: dict[tuple[str, str, str], Surplus] = {}  # by queue, group, partition: the last claim there counts
        self._dues: dict[tuple[str, str, str | None], Surplus] = {}

    def more(self, queue: Queue, group: str, partition: str, messages: int, batch: int) -> None:
        """After a claim: so many messages can be had from its partition at once."""
        self._more[queue.name, group, partition] = Surplus(queue, group, partition, 0.0, -(-messages // batch))

    def due(self, queue: Queue, group: str, partition: str | None, seconds: float) -> None:
        """After all claims: when something may be ready in the queue, or in the one partition asked for."""
        key = (queue.name, group, partition)
        found = self._dues.get(key)
        if found is None or seconds < found.due_seconds:
            self._dues[key] = Surplus(queue, group, partition, seconds, 1)

    def surpluses(self) -> list[Surplus]:
        """All of it; where the number of pops is known, that alone."""
        more = [surplus for surplus in self._more.values() if surplus.pops > 0]
        known = {(surplus.queue.name, surplus.group) for surplus in more}
        dues = self._dues.values()
        return more + [due for due in dues if due.due_seconds > 0 or (due.queue.name, due.group) not in known]


class ClaimFlush:
    """The claims of many requests, made as one. ``left``: what they have left, as the rows tell."""

    def __init__(self, requests: Sequence[ClaimRequest], buckets: int) -> None:
        self.requests = requests
        self._buckets = buckets
        self.reset()

    def reset(self) -> None:
        """Nothing is claimed: what was has been rolled back."""
        self.outcomes = [ClaimOutcome(request.lease_id) for request in self.requests]
        self.left = _Left()

    def arguments(self, bucket: int, rank: int | None = None) -> list[Any] | None:
        """Of queen.claim_v3, from the fourth on: what the requests still lack; None: nothing.

        ``rank``: of each request only the queue in that place; None: all queues of the requests that have nothing.
        """
        requests = self.requests
        rows: list[tuple[int, Queue]] = []
        batches: list[int] = []
        partitions: list[int] = []
        for at, request in sorted(
            enumerate(requests), key=lambda pair: (pair[1].queues[0].queue_id.int, pair[1].group)
        ):
            outcome = self.outcomes[at]
            batch = request.batch - sum(claim.end - claim.first for claim in outcome.claims)
            limit = request.partitions - len(outcome.claims)
            elsewhere = request.partition_id is not None and bucket_of(request.partition_id, self._buckets) != bucket
            if batch <= 0 or limit <= 0 or elsewhere or (rank is None and outcome.claims):
                continue
            for queue in request.queues if rank is None else request.queues[rank : rank + 1]:
                rows.append((at, queue))
                batches.append(batch)
                partitions.append(limit)
        if not rows:
            return None
        return [
            [at for at, _ in rows],
            [queue.queue_id for _, queue in rows],
            [requests[at].group for at, _ in rows],
            [requests[at].partition_id for at, _ in rows],
            batches,
            partitions,
            [requests[at].lease_id for at, _ in rows],
        ]

    def take(self, answer: Iterable[Any]) -> None:
        """Read what queen.claim_v3 says."""
        left = self.left
        for row in answer:
            request, outcome = self.requests[row["request"]], self.outcomes[row["request"]]
            verdict = row["verdict"]
            if verdict == "segment":
                outcome.rows.append((outcome.claims[-1], row))
                continue
            queue = next(q for q in request.queues if q.queue_id == row["queue_id"])
            left.expired = left.expired or bool(row["raw_bytes"])
            if verdict == "nothing":
                outcome.due(row["due_seconds"])
                if outcome.claims and row["due_seconds"] is not None:
                    partition = outcome.claims[0].partition if request.partition_id else None
                    left.due(queue, request.group, partition, row["due_seconds"])
                continue
            if verdict == "unregistered":
                if queue not in outcome.unregistered:
                    outcome.unregistered.append(queue)
                continue
            left.more(queue, request.group, row["partition_name"], row["message_count"], request.batch)
            outcome.claims.append(
                ClaimedPartition(
                    queue=queue.name,
                    partition=row["partition_name"],
                    partition_id=row["partition_id"],
                    first=row["first_offset"],
                    end=row["end_offset"],
                    retry_count=row["retry_count"],
                    attempt=row["attempt"],
                    skipped=tuple(row["skipped"] or ()),
                    born_at=row["created_at"],
                )
            )


_ENTRY_BYTES: Final = 600
"""What a segment takes in the cache besides its lines (measured): of one small message, most of it."""


class _Cache:
    """The last segment read of each partition, least recently used dropped first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._segments: OrderedDict[tuple[UUID, datetime | None], Segment] = OrderedDict()
        self._bytes = 0

    def get(self, claim: ClaimedPartition, offset: int) -> Segment | None:
        key = (claim.partition_id, claim.born_at)
        segment = self._segments.get(key)
        if segment is None or not segment.base_offset <= offset < segment.base_offset + segment.message_count:
            return None
        self._segments.move_to_end(key)
        return segment

    def put(self, claim: ClaimedPartition, segment: Segment) -> None:
        key = (claim.partition_id, claim.born_at)
        old = self._segments.pop(key, None)
        self._bytes += len(segment.lines) + _ENTRY_BYTES - (len(old.lines) + _ENTRY_BYTES if old else 0)
        self._segments[key] = segment
        while self._bytes > self._max_bytes:
            _, dropped = self._segments.popitem(last=False)
            self._bytes -= len(dropped.lines) + _ENTRY_BYTES


class Claims:
    """Pops into PostgreSQL."""

    def __init__(self, bridge: Bridge, keyring: Keyring, buckets: int, cache_bytes: int) -> None:
        self._bridge = bridge
        self._keyring = keyring
        self._buckets = buckets
        self._cache = _Cache(cache_bytes)
        self.delivered = Delivered(cache_bytes)
        self.activity = Activity()
        self.on_expired: Callable[[], None] = lambda: None  # told when there is something for expiry.bury to do

    async def claim(self, requests: Sequence[ClaimRequest]) -> tuple[list[ClaimOutcome], list[Surplus]]:
        """Claim for all requests in one commit (per bucket the requests are served in order), and read the beginning.

        Small segments come with the claim. A first segment that did not is taken from the cache, or read here, so
        that a pop within one segment needs nothing more. What the keyring lacks is found out when slices are read.
        Beside the outcomes: what others could have now, or later.
        """
        flush = self.flush_of(requests)
        several = False  # buckets had something

        async def work(connection: Connection) -> None:
            nonlocal several
            if self._buckets == 1:
                await self._claim_bucket(connection, 0, flush)
                return
            flush.reset()
            places = await self._promising(connection, flush)
            several = len(places) > 1
            async with connection.transaction():
                for rank, bucket in places:
                    await self._claim_bucket(connection, bucket, flush, rank=rank)
                # who got nothing is asked for somewhere, to be told that a group is not registered any more
                for bucket in sorted(self._homes(flush)):
                    await self._claim_bucket(connection, bucket, flush)

        await self._bridge.run(work)
        return await self.done(flush, several=several)

    def flush_of(self, requests: Sequence[ClaimRequest]) -> ClaimFlush:
        """A flush, unsent."""
        return ClaimFlush(requests, self._buckets)

    async def done(self, flush: ClaimFlush, *, several: bool = False) -> tuple[list[ClaimOutcome], list[Surplus]]:
        """Its commit was heard of: read the beginning. ``several`` buckets had something."""
        await self._read_first(flush.outcomes)
        if flush.left.expired:
            self.on_expired()
        for request, outcome in zip(flush.requests, flush.outcomes, strict=True):
            if outcome.claims and (several or len(request.queues) > 1) and outcome.fills(request):
                # it did not look everywhere
                queue = next(queue for queue in request.queues if queue.name == outcome.claims[0].queue)
                flush.left.due(queue, request.group, None, 0.0)
        return flush.outcomes, flush.left.surpluses()

    async def _promising(self, connection: Connection, flush: ClaimFlush) -> list[tuple[int, int]]:
        """asyncio flavor. Where there may be something: (rank, bucket), the rank being the place of a queue in its
        request. All buckets of a better rank come first; those of one in random order, so that none is favoured. The
        dues found are noted."""
        requests, outcomes = flush.requests, flush.outcomes
        asked = [(at, rank) for at, request in enumerate(requests) for rank in range(len(request.queues))]
        queue_ids = [requests[at].queues[rank].queue_id for at, rank in asked]
        groups = [requests[at].group for at, _ in asked]
        places: set[tuple[int, int]] = set()
        for bucket in range(self._buckets):
            for row in await connection.fetch(_READY, bucket, queue_ids, groups):
                at, rank = asked[row["place"] - 1]
                if row["due_seconds"] <= 0:
                    places.add((rank, bucket))
                else:
                    outcomes[at].due(row["due_seconds"])
        ordered = list(places)
        random.shuffle(ordered)
        return sorted(ordered, key=lambda place: place[0])

    def _homes(self, flush: ClaimFlush) -> set[int]:
        """A bucket for each request that has nothing: its partition's, or any."""
        return {
            0 if request.partition_id is None else bucket_of(request.partition_id, self._buckets)
            for request, outcome in zip(flush.requests, flush.outcomes, strict=True)
            if not outcome.claims
        }

    async def _claim_bucket(
        self, connection: Connection, bucket: int, flush: ClaimFlush, *, rank: int | None = None
    ) -> None:
        """asyncio flavor. One call for what the requests still lack, those of one queue and group side by side."""
        wanted = flush.arguments(bucket, rank)
        if wanted is not None:
            flush.take(await connection.fetch(_CLAIM, bucket, connection.epoch, *wanted))

    async def _read_first(self, outcomes: Sequence[ClaimOutcome]) -> None:
        """The first segment of those outcomes whose claim came without it, and that the cache has not."""
        wanted: dict[int, list[ClaimOutcome]] = {}
        for outcome in outcomes:
            if outcome.claims and not outcome.rows:
                claim = outcome.claims[0]
                if self._cache.get(claim, claim.first) is None:
                    wanted.setdefault(bucket_of(claim.partition_id, self._buckets), []).append(outcome)
        if not wanted:
            return

        async def read(connection: Connection) -> list[tuple[ClaimOutcome, Any]]:
            found: list[tuple[ClaimOutcome, Any]] = []
            for asking in wanted.values():
                rows = await self._read_rows(connection, [outcome.claims[0] for outcome in asking], 1, each=True)
                found += [(asking[row["part"] - 1], row) for row in rows]
            return found

        try:
            for outcome, row in await self._bridge.run(read, writes=False):
                outcome.rows.append((outcome.claims[0], row))
        except Exception as error:  # noqa: BLE001  what is written stays so; each pop meets the reason when it reads
            log.warning("claimed, and not read yet", error=repr(error))

    async def _read_rows(
        self,
        connection: Connection,
        claims: Sequence[ClaimedPartition],
        max_bytes: int,
        *,
        firsts: Sequence[int] = (),
        each: bool = False,
    ) -> Sequence[Any]:
        """asyncio flavor. Segments of claims of one bucket, from ``firsts`` on; ``each``: the bound is per claim."""
        rows: Sequence[Any] = await connection.fetch(
            _READ,
            bucket_of(claims[0].partition_id, self._buckets),
            [claim.partition_id for claim in claims],
            list(firsts) or [claim.first for claim in claims],
            [claim.end for claim in claims],
            max_bytes,
            READ_SEGMENTS,
            each,
        )
        return rows

    def _segment(self, row: Any, claim: ClaimedPartition) -> Segment:
        body = Body(row["codec"], row["raw_bytes"], row["key_id"], row["body"])
        if body.key_id is not None and body.key_id not in self._keyring:
            self._keyring.refuse(claim.queue, body.key_id)
        segment = Segment(
            base_offset=row["base_offset"],
            message_count=row["message_count"],
            created_at=row["created_at"],
            id_prefix=id_prefix_text(row["id_prefix"]),
            minted=row["minted"],
            lines=unseal(body, claim.partition_id, self._keyring, claim.queue),
            erased=tuple(row["erased"] or ()),
        )
        if claim.end < segment.base_offset + segment.message_count:
            self._cache.put(claim, segment)  # the next pop of this partition begins in it
        return segment

    async def slices(self, outcome: ClaimOutcome) -> AsyncIterator[SegmentSlice]:
        """The messages of an outcome in order, partition by partition, read as they are asked for."""
        came: dict[UUID, list[Any]] = {}
        for claim, row in outcome.rows:
            came.setdefault(claim.partition_id, []).append(row)
        outcome.rows = []  # what is sent is not held
        lease_id = None if outcome.lease_id is None else str(outcome.lease_id)
        at = 0  # the claim that is being served
        first = outcome.claims[0].first if outcome.claims else 0  # its next offset
        while at < len(outcome.claims):
            claim = outcome.claims[at]
            rows = came.pop(claim.partition_id, None)
            pieces = None if rows is None else [(claim, self._segment(row, claim)) for row in rows]
            if pieces is None:
                cached = self._cache.get(claim, first)
                pieces = [(claim, cached)] if cached is not None else await self._read(outcome.claims[at:], first, came)
            for owner, segment in pieces:
                if owner is not claim:
                    at = outcome.claims.index(owner, at)
                    claim, first = owner, owner.first
                piece = segment.slice(claim, first)
                self.activity.delivered(claim.queue, piece.count, time.time() - segment.created_at.timestamp())
                if piece.count:
                    if lease_id is not None:
                        self.delivered.note(
                            lease_id,
                            claim,
                            base_offset=segment.base_offset,
                            message_count=segment.message_count,
                            id_prefix=segment.id_prefix,
                            lines=b"" if segment.minted else piece.lines,
                            erased=segment.erased,
                        )
                    yield piece
                first = min(segment.base_offset + segment.message_count, claim.end)
            if not pieces or first >= claim.end:  # done, or retention or a deletion took what was left
                at += 1
                first = outcome.claims[at].first if at < len(outcome.claims) else 0

    async def _read(
        self, claims: Sequence[ClaimedPartition], first: int, came: dict[UUID, list[Any]]
    ) -> list[tuple[ClaimedPartition, Segment]]:
        """The next segments of the first claim from ``first`` on, and of those after it that one call can serve:
        neighbours in the same bucket of which nothing is at hand."""
        bucket = bucket_of(claims[0].partition_id, self._buckets)
        together = [claims[0]]
        for claim in claims[1:]:
            if bucket_of(claim.partition_id, self._buckets) != bucket or claim.partition_id in came:
                break
            together.append(claim)
        firsts = [first, *(claim.first for claim in together[1:])]
        rows = await self._bridge.run(
            lambda connection: self._read_rows(connection, together, READ_BYTES, firsts=firsts), writes=False
        )
        return [(together[row["part"] - 1], self._segment(row, together[row["part"] - 1])) for row in rows]

    async def give_back(self, outcome: ClaimOutcome, group: str, lease_id: UUID | None) -> None:
        """Undo a claim of which nothing reached its consumer; its attempt does not count."""
        by_bucket: dict[int, list[ClaimedPartition]] = {}
        for claim in sorted(outcome.claims, key=lambda claim: claim.partition_id.int):
            by_bucket.setdefault(bucket_of(claim.partition_id, self._buckets), []).append(claim)

        async def work(connection: Connection) -> None:
            async with connection.transaction():
                for bucket in sorted(by_bucket):
                    claims = by_bucket[bucket]
                    await connection.fetchval(
                        _GIVE_BACK,
                        bucket,
                        [claim.partition_id for claim in claims],
                        [group] * len(claims),
                        [lease_id] * len(claims),
                        [claim.first for claim in claims],
                        [claim.end for claim in claims],
                    )

        await self._bridge.run(work)

    async def ready(self, pairs: Sequence[tuple[UUID, str]]) -> dict[int, float]:
        """For each (queue id, group): in how many seconds something may be ready (absent: nothing is pending)."""

        async def work(connection: Connection) -> dict[int, float]:
            dues: dict[int, float] = {}
            for bucket in range(self._buckets):
                rows = await connection.fetch(
                    _READY, bucket, [queue for queue, _ in pairs], [group for _, group in pairs]
                )
                for row in rows:
                    place = row["place"] - 1
                    dues[place] = min(row["due_seconds"], dues.get(place, row["due_seconds"]))
            return dues

        return await self._bridge.run(work, writes=False)
