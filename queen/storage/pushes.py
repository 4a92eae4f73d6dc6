"""Storing messages: one flush of many push requests becomes one call a bucket. Exact dedup happens here.

The way of a flush: sort the messages into partitions, build the segments, call ``queen.push``. When ids *may* be stored
already, as they lie in the range of a segment that somebody pushed at the same moment, PostgreSQL stores nothing and
sends what ids such segments hold. What is there is dropped, and the rest is sent again, to be checked with all others.
If that does not come to an end, it is done under the partitions' locks in one transaction: read, decide, store.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec

from queen.errors import EncryptionUnavailable, OutcomeUnknown, QueueFull, StorageUnavailable
from queen.model.message import NewMessage, PushResult
from queen.model.queue import Queue
from queen.observability.activity import Activity
from queen.storage.bridge import Bridge
from queen.storage.catalogue import Catalogue
from queen.storage.connect import Backend, Connection
from queen.storage.ids import (
    CANONICAL_UUID7,
    INDEX_TEXT,
    IdRange,
    SplitIds,
    bucket_of,
    id_prefix_text,
    id_tail,
    partition_id_of,
    ranges_of,
    split_by_form,
    split_ids,
    transaction_key,
    uuid7_bound,
    uuid7_texts,
)
from queen.storage.segments import Body, Keyring, build_lines, json_text, runs_of, seal

MAX_KNOWN_PARTITIONS: Final = 100_000
"""Partitions this worker has pushed to lately: for them the check whether they exist is left out."""

_DOUBT_MS: Final = 120_000
"""How far from our clock the ids of a segment that we sent may lie: clocks, and a statement that waited for a lock."""

_END_BACKEND: Final = """
    SELECT pg_terminate_backend(a.pid, 5000) FROM pg_stat_activity a
    WHERE a.pid = $1 AND a.backend_start = $2 AND a.pid <> pg_backend_pid()
"""
_FIND_TOKEN: Final = """
    SELECT EXISTS (
        SELECT FROM queen.segments s
        WHERE s.bucket = $1 AND s.partition_id = $2 AND s.max_id >= $4 AND s.max_id <= $5
            AND s.minted AND s.transaction_ids = $3)
"""

_STALE_TRIES: Final = 8

_CHECK_TRIES: Final = 4
"""Calls of a flush that are a statement each. Two workers that push UUIDv7 ids into one partition make 1.35 on the
average, and never need more than these (perf.bench push-100-v7, 2026-11)."""

_RESERVE: Final = "SELECT queen.reserve($1, NULL, $2, $3, $4)"
PUSH_ARGUMENTS: Final = 29
_PUSH: Final = f"SELECT * FROM queen.push({', '.join(f'${i}' for i in range(1, PUSH_ARGUMENTS + 1))})"
HOT: Final = (_PUSH,)  # what nearly every push runs
_PUSH_DELAYED: Final = _PUSH.replace("queen.push(", "queen.push_delayed(")


class Woken:
    """Cursors that a flush made ready: (queue, group, partition) and in how many seconds."""

    __slots__ = ("due_seconds", "group", "partition", "queue")

    def __init__(self, queue: Queue, group: str, partition: str, due_seconds: float) -> None:
        self.queue = queue
        self.group = group
        self.partition = partition
        self.due_seconds = due_seconds


class Doubt(NamedTuple):
    """A push whose outcome is unknown, with messages that PostgreSQL was to name: how to find out whether it has.

    The segments that it made carry ``token``. ``ids``: for each message the transaction id it was sent with; None: the
    one that PostgreSQL was to mint.
    """

    token: bytes
    partition_id: UUID  # that holds a segment with it
    sent_ms: int  # by our clock
    backend: Backend  # that may be at it yet
    ids: list[str | None]


class PushRequest:
    """One client's messages, in order. ``payload_bytes``: of all its payloads. ``promised``: they were accepted before,
    and are stored however full their queues are."""

    __slots__ = ("doubt", "messages", "payload_bytes", "payloads", "producer_sub", "promised")

    def __init__(self, messages: Sequence[NewMessage], producer_sub: str | None, *, promised: bool = False) -> None:
        self.promised = promised
        self.doubt: Doubt | None = None
        self.messages = messages
        self.payloads = [message.payload for message in messages]
        self.payload_bytes = sum(map(len, self.payloads))
        self.producer_sub = producer_sub


class _Part:
    """The messages of one partition in a flush, and what becomes of each."""

    def __init__(self, queue_name: str, partition: str) -> None:
        self.queue_name = queue_name
        self.partition = partition
        self.messages: list[NewMessage] = []
        self.payloads: list[bytes] = []
        self.subs: list[bytes] = []
        # set by prepare
        self.queue: Queue
        self.partition_id: UUID
        self.ids: list[str] | None = None  # None: minted
        self.fresh: list[int] = []  # places of the messages to store
        self.repeats: dict[int, int] = {}  # place -> earlier place in this flush with the same id
        self.stored: dict[int, str] = {}  # place -> id of the message stored before this flush
        self.results: list[PushResult] = []

    def prepare(self, queue: Queue) -> None:
        self.queue = queue
        self.partition_id = partition_id_of(queue.queue_id, self.partition)
        given = [message.transaction_id for message in self.messages]
        self.stored = {}
        self.repeats = {}
        self.fresh = list(range(len(given)))
        if not any(given):
            self.ids = None
            return
        if not all(given):
            fill = iter(uuid7_texts(len(given)))
            self.ids = [text or next(fill) for text in given]
        else:
            self.ids = given  # type: ignore[assignment]
        assert self.ids is not None
        if len(set(self.ids)) < len(self.ids):
            first: dict[str, int] = {}
            for place, text in enumerate(self.ids):
                earlier = first.setdefault(text, place)
                if earlier != place:
                    self.repeats[place] = earlier
            self.fresh = [place for place in self.fresh if place not in self.repeats]

    def drop(self, place: int, message_id: str) -> None:
        """The message at ``place`` is stored already."""
        self.stored[place] = message_id


class _Call:
    """The arguments of one call of queen.push: the fresh messages of one bucket's partitions, as segments."""

    def __init__(self, parts: list[_Part], keyring: Keyring, now_ms: int, token: bytes) -> None:
        self.token = token
        self.parts = parts
        self.statement = _PUSH_DELAYED if any(_puts_off(part.queue) for part in parts) else _PUSH
        self.keyring = keyring
        self.now_ms = now_ms
        self._seen: list[tuple[int, UUID]] = []  # segments that were gone through: part number, greatest id
        self.build()

    def build(self) -> None:
        self.segments: list[tuple[int, list[int], Body, SplitIds | None]] = []  # part number, places, body, ids
        self.probes: list[tuple[int, IdRange]] = []
        self.keys: list[tuple[int, bytes, int | None, int | None]] = []  # part, key, segment, place in segment
        self.key_places: list[tuple[_Part, int]] = []
        self.keyed_ranges: list[tuple[UUID | None, UUID | None]] = []
        self._uuid7s: dict[int, dict[bytes, int]] = {}  # by part number, once they were asked for
        for number, part in enumerate(self.parts, start=1):
            self._add_part(number, part)

    def _add_part(self, number: int, part: _Part) -> None:
        keyring = self.keyring if part.queue.options.encryption_enabled else None
        fresh = [place for place in part.fresh if place not in part.stored]
        whole = len(fresh) == len(part.messages)
        messages = part.messages if whole else [part.messages[place] for place in fresh]
        payloads = part.payloads if whole else [part.payloads[place] for place in fresh]
        subs = part.subs if whole else [part.subs[place] for place in fresh]
        ids = part.ids if whole or part.ids is None else [part.ids[place] for place in fresh]
        uuid7s: list[str] = []
        far: list[str] = []
        if messages:
            traces = [message.trace_id for message in messages]
            for start, end in runs_of(list(map(len, payloads))):
                run_ids = None if ids is None else ids[start:end]
                lines = build_lines(part.partition_id, run_ids, traces[start:end], subs[start:end], payloads[start:end])
                split = None if run_ids is None else split_ids(run_ids, self.now_ms)
                self.segments.append((number, fresh[start:end], seal(lines, part.partition_id, keyring), split))
                if split is not None:
                    uuid7s += split.near
                    uuid7s += split.far
                    far += split.far
                    for place, key in split.keyed:
                        self.keys.append((number, key, len(self.segments), place))
                        self.key_places.append((part, fresh[start + place]))
        if uuid7s:
            self.probes += [(number, found) for found in ranges_of(uuid7s)]
        self.keyed_ranges.append((UUID(min(far)), UUID(max(far))) if far else (None, None))

    def probe_keys(self, numbers: set[int]) -> None:
        """Look for every UUIDv7 id of these partitions among the keys too (without inserting them)."""
        for number in numbers:
            part = self.parts[number - 1]
            assert part.ids is not None
            for place in part.fresh:
                if place not in part.stored and CANONICAL_UUID7.fullmatch(part.ids[place]):
                    self.keys.append((number, transaction_key(part.ids[place]), None, None))
                    self.key_places.append((part, place))

    def arguments(self, bucket: int, *, checked: bool, may_create: bool) -> list[Any]:
        queues = {part.queue.queue_id: part.queue.version for part in self.parts}
        segments = self.segments
        probes = self._probes_of_unseen() if self._seen else self.probes
        return [
            bucket,
            None,
            checked,
            may_create,
            list(queues),
            list(queues.values()),
            [part.partition_id for part in self.parts],
            [part.queue.queue_id for part in self.parts],
            [part.partition for part in self.parts],
            [least for least, _ in self.keyed_ranges],
            [greatest for _, greatest in self.keyed_ranges],
            [number for number, *_ in segments],
            [len(places) for _, places, *_ in segments],
            [split is None for *_, split in segments],
            [body.codec for *_, body, _ in segments],
            [body.raw_bytes for *_, body, _ in segments],
            [UUID(min(split.near)) if split and split.near else None for *_, split in segments],
            [UUID(max(split.near)) if split and split.near else None for *_, split in segments],
            [body.key_id for *_, body, _ in segments],
            [split.packed if split else self.token for *_, split in segments],
            [body.data for *_, body, _ in segments],
            [number for number, _ in probes],
            [found.least for _, found in probes],
            [found.greatest for _, found in probes],
            [found.bound for _, found in probes],
            [number for number, *_ in self.keys],
            [key for _, key, *_ in self.keys],
            [segment for *_, segment, _ in self.keys],
            [place for *_, place in self.keys],
        ]

    def _probes_of_unseen(self) -> list[tuple[int, IdRange]]:
        """The probes, around what was seen: a segment is found by its greatest id, and no other has the same."""
        probes: list[tuple[int, IdRange]] = []
        for number, (least, greatest, bound) in self.probes:
            for seen in sorted(end for of, end in self._seen if of == number and least <= end <= bound):
                probes.append((number, IdRange(least, greatest, UUID(int=seen.int - 1))))
                least = UUID(int=seen.int + 1)
            probes.append((number, IdRange(least, greatest, bound)))
        return probes

    def drop_stored(self, rows: Sequence[Any]) -> None:
        """Take out of the call what the rows show to be stored already."""
        dropped = False
        for row in rows:
            if row["verdict"] == "known":
                part, place = self.key_places[row["part"] - 1]
                part.drop(place, _message_id(row["id_prefix"], part.partition_id, row["message_count"]))
                dropped = True
            elif row["verdict"] == "overlap":
                dropped = self._drop_overlapping(row["part"], row) or dropped
        if dropped:
            self.build()

    def _drop_overlapping(self, number: int, row: Any) -> bool:
        """Whether the segment holds any of the ids."""
        part, fresh, count = self.parts[number - 1], self._uuid7s_of(number), row["message_count"]
        prefix, tail = id_prefix_text(row["id_prefix"]), id_tail(part.partition_id)
        held: dict[bytes, int]
        if row["minted"]:
            held = {bytes.fromhex(f"{prefix}{tail}{INDEX_TEXT[at]}".replace("-", "")): at for at in range(count)}
        else:
            packed = row["transaction_ids"]
            held = {packed[at : at + 16]: at // 16 for at in range(0, len(packed), 16)}
        self._seen.append((number, UUID(bytes=max(held))))
        found = held.keys() & fresh.keys()
        for key in found:
            part.drop(fresh[key], f"{prefix}{tail}{INDEX_TEXT[held[key]]}")
        return bool(found)

    def _uuid7s_of(self, number: int) -> dict[bytes, int]:
        """The canonical UUIDv7 ids of the messages that a part is to store, and the places of those."""
        found = self._uuid7s.get(number)
        if found is None:
            part = self.parts[number - 1]
            assert part.ids is not None
            places = {part.ids[place]: place for place in part.fresh if place not in part.stored}
            uuid7s, _ = split_by_form(list(places))
            found = self._uuid7s[number] = {key: places[text] for text, key in uuid7s.items()}
        return found


def _puts_off(queue: Queue) -> bool:
    """Whether a push to the queue may make something ready later than now."""
    return queue.options.delayed_processing_seconds > 0 or queue.options.window_buffer_seconds > 0


def _is_special(queue: Queue) -> bool:
    """Whether more than storing is to be done for a push to the queue."""
    return _puts_off(queue) or queue.options.max_size > 0 or queue.options.encryption_enabled


def _message_id(id_prefix: int, partition_id: UUID, index: int) -> str:
    return f"{id_prefix_text(id_prefix)}{id_tail(partition_id)}{index:05x}"


class Flush:
    """Many push requests, stored as one. Reusable after a stale verdict: :meth:`prepare` starts over."""

    def __init__(self, requests: Sequence[PushRequest], keyring: Keyring, buckets: int) -> None:
        self.requests = requests
        self.token = os.urandom(16)
        self.backend: Backend | None = None  # that it was sent to
        self._keyring = keyring
        self._buckets = buckets
        self._parts: dict[tuple[str, str], _Part] = {}
        self._runs: list[list[tuple[_Part, int, int]]] = []  # per request: its messages as runs (part, start, end)
        for request in requests:
            sub = json_text(request.producer_sub) if request.producer_sub else b"null"
            runs: list[tuple[_Part, int, int]] = []
            messages, payloads = request.messages, request.payloads
            start = 0
            while start < len(messages):
                queue, partition = messages[start].queue, messages[start].partition
                end = start + 1
                while end < len(messages) and messages[end].partition == partition and messages[end].queue == queue:
                    end += 1
                part = self._parts.get((queue, partition))
                if part is None:
                    part = self._parts[queue, partition] = _Part(queue, partition)
                at = len(part.messages)
                part.messages += messages[start:end]
                part.payloads += payloads[start:end]
                part.subs += [sub] * (end - start)
                runs.append((part, at, at + end - start))
                start = end
            self._runs.append(runs)

    @property
    def queue_names(self) -> set[str]:
        return {queue for queue, _ in self._parts}

    @property
    def message_count(self) -> int:
        return sum(len(part.messages) for part in self._parts.values())

    def count(self, activity: Activity) -> None:
        """Say what was stored."""
        requests: dict[str, int] = {}
        for request in self.requests:
            if request.messages:
                queue = request.messages[0].queue
                requests[queue] = requests.get(queue, 0) + 1
        stored: dict[str, int] = {}
        for part in self._parts.values():
            new = len(part.messages) - len(part.stored) - len(part.repeats)
            stored[part.queue_name] = stored.get(part.queue_name, 0) + new
        for queue, messages in stored.items():
            activity.count(queue, push_requests=requests.get(queue, 0), push_messages=messages)

    def prepare(self, catalogue: Catalogue) -> bool:
        """Build what is sent. False: a queue is not known (any more)."""
        calls: dict[int, list[_Part]] = {}
        for part in self._parts.values():
            queue = catalogue.cached(part.queue_name)
            if queue is None:
                return False
            if queue.options.encryption_enabled and self._keyring.current is None:
                raise EncryptionUnavailable(queue.name)
            part.prepare(queue)
            calls.setdefault(bucket_of(part.partition_id, self._buckets), []).append(part)
        now_ms = time.time_ns() // 1_000_000
        self.calls = {
            bucket: _Call(
                sorted(calls[bucket], key=lambda part: part.partition_id.int), self._keyring, now_ms, self.token
            )
            for bucket in sorted(calls)
        }
        return True

    @property
    def partition_ids(self) -> Iterator[UUID]:
        return (part.partition_id for part in self._parts.values())

    @property
    def is_plain(self) -> bool:
        """Whether one statement stores it all: one bucket, no queue with a limit."""
        return len(self.calls) == 1 and all(part.queue.options.max_size <= 0 for part in self._parts.values())

    def _wanted(self) -> list[dict[str, int]]:
        """Per request: the messages that are new to queues with a limit, by queue, of those that have to fit."""
        limited = {part: set(part.fresh) for part in self._parts.values() if part.queue.options.max_size > 0}
        wanted: list[dict[str, int]] = []
        for request, runs in zip(self.requests, self._runs, strict=True):
            of: dict[str, int] = {}
            for part, start, end in runs:
                if part in limited and not request.promised:
                    fresh = limited[part]
                    new = sum(place in fresh and place not in part.stored for place in range(start, end))
                    of[part.queue_name] = of.get(part.queue_name, 0) + new
            wanted.append(of)
        return wanted

    async def reserve(self, connection: Connection) -> dict[int, QueueFull]:
        """asyncio flavor, last in the transaction that has stored it. Take room in the queues with a limit.

        Returns the requests that have to go, by place, when there is not enough for all: those come first get it. The
        caller rolls back.
        """
        wanted = self._wanted()
        totals: dict[str, int] = {}
        for of in wanted:
            for name, new in of.items():
                totals[name] = totals.get(name, 0) + new
        queues = {part.queue_name: part.queue for part in self._parts.values() if part.queue_name in totals}
        homes = {name: bucket_of(queue.queue_id, self._buckets) for name, queue in queues.items()}
        rooms: dict[str, int] = {}
        for name in sorted(totals, key=lambda name: (homes[name], queues[name].queue_id)):
            room = await connection.fetchval(
                _RESERVE, homes[name], list(range(self._buckets)), queues[name].queue_id, totals[name]
            )
            if room is not None:
                rooms[name] = room
        refused: dict[int, QueueFull] = {}
        for at, of in enumerate(wanted):
            short = [name for name, new in of.items() if new > rooms.get(name, new)]
            if short:
                name = short[0]
                limit = queues[name].options.max_size
                refused[at] = QueueFull(name, limit, rooms[name], of[name], short[1:])
            else:
                for name, new in of.items():
                    if name in rooms:
                        rooms[name] -= new
        return refused

    async def store_at_once(self, connection: Connection, *, may_create: bool) -> list[Woken] | str:
        """asyncio flavor. The common way: one bucket, one statement, one commit. Another one after ids were checked.

        Returns the cursors woken, or the verdict that kept everything from being stored.
        """
        (call,) = self.calls.values()
        for _ in range(_CHECK_TRIES):
            rows = await connection.fetch(call.statement, *self.arguments(connection, may_create=may_create))
            verdict = self.take(rows)
            if verdict != "check" or any(row["verdict"] == "keyed" for row in rows):
                break
            call.drop_stored(rows)
        return verdict

    def arguments(self, connection: Connection, *, may_create: bool) -> list[Any]:
        """Of queen.push, for a flush of one bucket that is about to be sent."""
        ((bucket, call),) = self.calls.items()
        self.backend = connection.backend
        return call.arguments(bucket, checked=False, may_create=may_create)

    def take(self, rows: Sequence[Any]) -> list[Woken] | str:
        """Read what queen.push said to those arguments: see :meth:`store_at_once`."""
        (call,) = self.calls.values()
        return self._take(call, rows)

    async def store(self, connection: Connection, *, may_create: bool) -> list[Woken] | str:
        """asyncio flavor, inside a transaction. All buckets; ids are checked under the locks that are then held."""
        self.backend = connection.backend
        woken: list[Woken] = []
        for bucket, call in self.calls.items():
            checked = probed = False
            while True:
                rows = await connection.fetch(
                    call.statement, *call.arguments(bucket, checked=checked, may_create=may_create)
                )
                verdict = self._take(call, rows)
                if not isinstance(verdict, str):
                    woken += verdict
                    break
                if verdict != "check":
                    return verdict
                call.drop_stored(rows)
                # rare: ids from a clock that was far from ours are to be asked for by key, under the same locks;
                # after that everything has been asked
                keyed = {row["part"] for row in rows if row["verdict"] == "keyed"} if not probed else set()
                checked = not keyed
                if keyed:
                    call.probe_keys(keyed)
                    probed = True
        return woken

    def _take(self, call: _Call, rows: Sequence[Any]) -> list[Woken] | str:
        """Read the rows of a call: what was woken, or why nothing was stored (stale, unknown, check)."""
        woken: list[Woken] = []
        stored = []
        for row in rows:
            verdict = row["verdict"]
            if verdict == "stored":
                stored.append(row)
            elif verdict == "woken":
                part = call.parts[row["part"] - 1]
                options = part.queue.options
                due = max(options.delayed_processing_seconds, options.window_buffer_seconds)
                woken.append(Woken(part.queue, row["group_name"], part.partition, due))
            elif verdict in ("stale", "unknown"):
                return str(verdict)
            else:
                return "check"
        stored.sort(key=lambda row: row["part"])
        for row, (number, places, _, _) in zip(stored, call.segments, strict=True):
            self._answer_stored(call.parts[number - 1], places, row["id_prefix"])
        for part in call.parts:
            self._answer_repeats(part)
        return woken

    @staticmethod
    def _answer_stored(part: _Part, places: list[int], id_prefix: int) -> None:
        if not part.results:
            part.results = [None] * len(part.messages)  # type: ignore[list-item]
        head = id_prefix_text(id_prefix) + id_tail(part.partition_id)
        partition_id = str(part.partition_id)
        results, ids = part.results, part.ids
        for place, index in zip(places, INDEX_TEXT, strict=False):
            message_id = head + index
            results[place] = PushResult(ids[place] if ids else message_id, message_id, partition_id, False)

    @staticmethod
    def _answer_repeats(part: _Part) -> None:
        if not part.results:
            part.results = [None] * len(part.messages)  # type: ignore[list-item]
        if not part.stored and not part.repeats:
            return
        partition_id = str(part.partition_id)
        for place, message_id in part.stored.items():
            assert part.ids is not None
            part.results[place] = PushResult(part.ids[place], message_id, partition_id, True)
        for place, earlier in part.repeats.items():
            part.results[place] = msgspec.structs.replace(part.results[earlier], duplicate=True)

    def doubt(self) -> None:
        """The outcome is unknown: leave with each request that PostgreSQL was to name what is needed to find out."""
        if self.backend is None:
            return
        minted = next((part for part in self._parts.values() if part.ids is None), None)
        for request, runs in zip(self.requests, self._runs, strict=True):
            ids: list[str | None] = []
            for part, start, end in runs:
                ids += part.ids[start:end] if part.ids is not None else [None] * (end - start)
            where = minted.partition_id if minted is not None else runs[0][0].partition_id
            request.doubt = Doubt(self.token, where, time.time_ns() // 1_000_000, self.backend, ids)

    def results(self) -> list[list[PushResult]]:
        """What became of each request's messages, in their order."""
        return [[result for part, at, end in runs for result in part.results[at:end]] for runs in self._runs]


class Pushes:
    """Push requests into PostgreSQL."""

    def __init__(self, bridge: Bridge, catalogue: Catalogue, keyring: Keyring, buckets: int) -> None:
        self._bridge = bridge
        self._catalogue = catalogue
        self._keyring = keyring
        self._buckets = buckets
        self._known: OrderedDict[UUID, None] = OrderedDict()
        self.activity = Activity()

    def flush_of(self, requests: Sequence[PushRequest]) -> Flush:
        """A flush, unsent."""
        return Flush(requests, self._keyring, self._buckets)

    async def was_stored(self, doubt: Doubt) -> bool:
        """Whether a push of unknown outcome was. Whoever may be at it yet is ended first, so that it stays so."""
        bucket = bucket_of(doubt.partition_id, self._buckets)
        least = uuid7_bound(doubt.sent_ms - _DOUBT_MS, high=False)
        greatest = uuid7_bound(doubt.sent_ms + _DOUBT_MS, high=True)

        async def ask(connection: Connection) -> bool:
            await connection.execute(_END_BACKEND, *doubt.backend)
            found = await connection.fetchval(_FIND_TOKEN, bucket, doubt.partition_id, doubt.token, least, greatest)
            return bool(found)

        return await self._bridge.run(ask, writes=False)

    def is_common(self, request: PushRequest) -> bool:
        """Whether, as far as is known here, queen.push alone stores it: its partitions exist, and their queues ask for
        nothing special."""
        for place in {(message.queue, message.partition) for message in request.messages}:
            queue = self._catalogue.cached(place[0])
            if queue is None or _is_special(queue) or partition_id_of(queue.queue_id, place[1]) not in self._known:
                return False
        return True

    def common_flush_of(self, requests: Sequence[PushRequest]) -> Flush | None:
        """A flush of requests that are common, ready to be sent; None: they are not (any more)."""
        if not all(map(self.is_common, requests)):
            return None
        flush = self.flush_of(requests)
        return flush if flush.prepare(self._catalogue) else None

    def done(self, flush: Flush) -> None:
        """Its commit was heard of: count it."""
        self._remember(flush)
        flush.count(self.activity)

    async def push(self, requests: Sequence[PushRequest]) -> tuple[list[list[PushResult] | QueueFull], list[Woken]]:
        """Store the messages of all requests in one commit. Atomic: all of them or, with an error, none; but for
        requests that find no room in a queue, of which nothing is stored: they get that error in place of results.

        With OutcomeUnknown each request has its ``doubt``.
        """
        refused: dict[int, QueueFull] = {}
        taken = list(range(len(requests)))
        flush = self.flush_of(requests)
        may_create = False
        tries = 0
        while tries < _STALE_TRIES:
            tries += 1
            await self._catalogue.ensure(flush.queue_names)
            if not flush.prepare(self._catalogue):
                continue
            may_create = may_create or not all(key in self._known for key in flush.partition_ids)
            verdict: list[Woken] | str | dict[int, QueueFull] = "check"
            try:
                if flush.is_plain:
                    verdict = await self._bridge.run(
                        lambda connection: flush.store_at_once(connection, may_create=may_create)  # noqa: B023  awaited here
                    )
                if verdict == "check":
                    verdict = await self._bridge.run(
                        lambda connection: self._store(connection, flush, may_create)  # noqa: B023
                    )
            except OutcomeUnknown:
                flush.doubt()
                raise
            if isinstance(verdict, dict):
                refused.update((taken[at], error) for at, error in verdict.items())
                taken = [at for at in taken if at not in refused]
                if not taken:
                    return [refused[at] for at in range(len(requests))], []
                flush = self.flush_of([requests[at] for at in taken])
                tries = 0  # it is a smaller one each time
                continue
            if not isinstance(verdict, str):
                self.done(flush)
                if not refused:
                    return list(flush.results()), verdict
                results = dict(zip(taken, flush.results(), strict=True))
                return [refused[at] if at in refused else results[at] for at in range(len(requests))], verdict
            self.recover(flush, verdict)
            may_create = True
        raise StorageUnavailable(
            "queues of this push kept changing while it was stored; nothing was applied; try again"
        )

    def recover(self, flush: Flush, verdict: str) -> None:
        """After ``stale`` or ``unknown``: forget what the cache believed."""
        for key in flush.partition_ids:
            self._known.pop(key, None)
        if verdict == "stale":
            for name in flush.queue_names:
                self._catalogue.forget(name)

    async def _store(
        self, connection: Connection, flush: Flush, may_create: bool
    ) -> list[Woken] | str | dict[int, QueueFull]:
        """asyncio flavor."""
        transaction = connection.transaction()
        await transaction.start()
        refused: dict[int, QueueFull] = {}
        try:
            verdict = await flush.store(connection, may_create=may_create)
            if not isinstance(verdict, str):
                refused = await flush.reserve(connection)
        except BaseException:
            await transaction.rollback()
            raise
        if refused:
            await transaction.rollback()
            return refused
        if isinstance(verdict, str):
            await transaction.rollback()
        else:
            await transaction.commit()
        return verdict

    def _remember(self, flush: Flush) -> None:
        for key in flush.partition_ids:
            self._known[key] = None
            self._known.move_to_end(key)
        while len(self._known) > MAX_KNOWN_PARTITIONS:
            self._known.popitem(last=False)
