"""The broker: one method per verb. What it decides is when to write, whom to wake and how long to wait.

What must hold about messages, cursors and leases is decided in storage, under its locks; HTTP is not known here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from typing import Final, NamedTuple, cast
from uuid import UUID, uuid4

import msgspec
import structlog
import trio

from queen.beat import next_beat
from queen.config.settings import Settings
from queen.engine.admin import POP_MAINTENANCE, Admin
from queen.engine.batcher import Batcher, Tally
from queen.engine.housekeeping import run_housekeeping
from queen.engine.monitor import Monitor
from queen.engine.spooling import PUSH_MAINTENANCE, Spooling
from queen.engine.switches import REPORT, SWITCHES, Followers
from queen.engine.turns import Turns
from queen.engine.wakeups import UNNAMED, Lot, Topic, Wakeups, hint, hints_of
from queen.errors import (
    EncryptionUnavailable,
    OutcomeUnknown,
    QueenError,
    QueueFull,
    SpoolForeign,
    StartupError,
    StorageUnavailable,
)
from queen.model.message import (
    Ack,
    AckResult,
    AckStatus,
    Buffered,
    ClaimedPartition,
    LeaseExtension,
    NewMessage,
    PopRequest,
    PushResult,
    SegmentSlice,
    TransactionResult,
)
from queen.model.metrics import Waiting
from queen.model.queue import DEFAULT_PARTITION, QUEUE_MODE, Queue, QueueOptions, StartFrom, StartMode
from queen.model.stream import Cycle, CycleResult, Registration, StateFilter, StateRow, StreamQuery
from queen.observability.doing import BatchWrite
from queen.storage.acks import Released
from queen.storage.claims import ClaimOutcome, ClaimRequest, Surplus
from queen.storage.dead_letters import DeadLetter
from queen.storage.ids import partition_id_of
from queen.storage.pushes import PushRequest, Woken
from queen.storage.spool import Spool, open_spool
from queen.storage.store import Store, keyring_of, open_store

PUSH_WEIGHT: Final = 16 * 1024 * 1024
"""Bytes of one write of pushes: bounds its memory and how long its partitions stay locked."""

MESSAGE_WEIGHT: Final = 256
"""What a message counts beside its payload: at most 65,536 in one write."""

TURNOVER_WEIGHT: Final = 20_000
CLAIM_WEIGHT: Final = 312
SMALL_PUSH_WEIGHT: Final = 20
"""Of one write of claims, acks and small pushes: at most 64 claims, 20,000 acks or 1,000 pushes."""

SMALL_PUSH: Final = 16 * MESSAGE_WEIGHT
SMALL_POP: Final = 100
"""What a push may weigh, and how many messages a pop may ask for, to be written with the others. Larger ones are worth
writes of their own, for which small ones need not wait."""

MOST_WRITERS: Final = 1
"""Writes of one kind in flight. Two make more and smaller flushes: 0.107 commits and 377 CPU-µs a message instead of
0.080 and 241, pushing one at a time (perf.bench push-1, 50 connections, 2 workers, a third of the machine taken by
others, 2026-11)."""

MAX_WAITING: Final = 20_000
"""Requests that may wait for one kind of write. Each is a client's open connection; more than that cannot be served
before its client gives up."""

_SWEEP_SECONDS: Final = 1.0
"""How often lost hints are looked for: the contract's worst case for a wake-up."""

_LOOK_AGAIN_SECONDS: Final = 0.02
"""When something is ready but another call holds it: about the time of a commit."""

_HELD_TRIES: Final = 5
"""Looks that a pop which does not wait repeats because what is ready is held: it must see what was answered before."""

_GONE_TRIES: Final = 5
"""Looks that a pop may have to repeat because queues were deleted under it."""

_NOTIFY_PAUSE_SECONDS: Final = 0.002
"""Least time between two notifications of this worker: under load they are folded, an idle one goes at once."""

_SURPLUS_PAUSE_SECONDS: Final = 0.1
"""The same for what is left over while consumers here are at work: a notification costs a commit, and under load nobody
elsewhere waits for it most of the time."""

_GIVE_BACK_SECONDS: Final = 5.0

_SETTLE_SECONDS: Final = 2.0
"""For claims in flight at the end. A claim takes milliseconds; where PostgreSQL is away, none of them will be known."""

_SWITCHES_SECONDS: Final = 0.75
"""Between two looks at the switches: they are to be obeyed within a second."""

_PAUSED_SECONDS: Final = 0.5
"""How long a pop that would wait is held while pops are switched off."""

_SWITCHED: Final = hint("switch", "", "")

_FOLLOW_SECONDS: Final = 1.0
"""Who turns a switch waits so long for the other workers at most; by then they have looked by themselves. So does who
wants to know what they did."""

log = structlog.get_logger("queen.engine")


class LeasedBatch:
    """What a pop took; see :class:`queen.model.message.Batch`."""

    def __init__(self, engine: Engine, outcome: ClaimOutcome, group: str, lease_id: UUID | None) -> None:
        self._engine = engine
        self._outcome = outcome
        self.group = group
        self.lease_id = lease_id

    @property
    def claims(self) -> tuple[ClaimedPartition, ...]:
        return tuple(self._outcome.claims)

    @property
    def message_count(self) -> int:
        return sum(claim.end - claim.first - len(claim.skipped) for claim in self._outcome.claims)

    def slices(self) -> AsyncIterator[SegmentSlice]:
        return self._engine.store.claims.slices(self._outcome)

    async def give_back(self) -> None:
        await self._engine.give_back(self._outcome, self.group, self.lease_id)


_Turning = PushRequest | ClaimRequest | Sequence[Ack]
_Turned = list[PushResult] | QueenError | ClaimOutcome | list[AckResult] | None
"""None: a push that is not to be had with the others."""


class _Look(NamedTuple):
    """What a look at storage found. ``gone``: a queue or group that this worker believed in is not there any more."""

    batch: LeasedBatch | None = None
    due_seconds: float | None = None
    gone: bool = False


class Engine:
    """The verbs. Open it with :func:`open_engine`."""

    def __init__(self, store: Store, settings: Settings, spool: Spool | None = None) -> None:
        self.store = store
        self._settings = settings
        self._wakeups = Wakeups()
        self._turns = Turns()
        self._draining = False
        self._drained = trio.Event()
        self.pops_paused = False
        self._to_tell: set[str] = set()
        self._news = trio.Event()
        self._surplus_to_tell: set[str] = set()
        self._surplus = trio.Event()
        self._returns: list[tuple[ClaimOutcome, str, UUID | None]] = []
        self._returned = trio.Event()
        self._switched = trio.Event()
        self._pushes: Batcher[PushRequest, list[PushResult]] = Batcher(
            "push", self._write_pushes, most_writers=MOST_WRITERS, max_weight=PUSH_WEIGHT, max_waiting=MAX_WAITING
        )
        self._acks: Batcher[Sequence[Ack], list[AckResult]] = Batcher(
            "ack", self._write_acks, most_writers=MOST_WRITERS, max_weight=20_000, max_waiting=MAX_WAITING
        )
        self._pops: Batcher[ClaimRequest, ClaimOutcome] = Batcher(
            "pop",
            self._write_claims,
            most_writers=MOST_WRITERS,
            max_weight=TURNOVER_WEIGHT,
            max_waiting=MAX_WAITING,
            abandoned=self._abandon,
        )
        self._turnover: Batcher[_Turning, _Turned] = Batcher(
            "turnover",
            self._write_turnover,
            most_writers=MOST_WRITERS,
            max_weight=TURNOVER_WEIGHT,
            max_waiting=MAX_WAITING,
            abandoned=self._abandon,
        )
        self._batchers = (self._pushes, self._acks, self._pops, self._turnover)
        self.spooling = Spooling(spool, store, settings, self._store_push, self._write_pushes, self.read_switches)
        store.on_back = self._storage_is_back
        store.catalogue.changed = self._queue_changed
        store.notifications.on_keys = lambda hints: self._heard(hints)
        store.notifications.on_gap = self._wakeups.tell_all
        self.monitor = Monitor(store, settings, store.activity, self._gauges, self._waiting, self._writes)
        self._followers = Followers(self.monitor.process_id.hex, SWITCHES)
        self._reporters = Followers(self.monitor.process_id.hex, REPORT)
        self._report = trio.Event()
        self.admin = Admin(store, self.monitor, self._tell_group, self._tell_woken, self._tell_switched)

    # -- queues ---------------------------------------------------------------------------------------------------

    async def configure(self, name: str, namespace: str, task: str, options: QueueOptions) -> tuple[Queue, UUID]:
        """Create a queue or replace all its options. Returns it and the id of its Default partition."""
        queue = await self.store.catalogue.configure(name, namespace, task, options)
        return queue, partition_id_of(queue.queue_id, DEFAULT_PARTITION)

    async def delete_queue(self, name: str) -> bool:
        """Delete a queue and all that is in it. True if it existed."""
        existed = await self.store.catalogue.delete(name)
        await self.spooling.queue_deleted(name)
        return existed

    # -- push -----------------------------------------------------------------------------------------------------

    async def push(self, messages: Sequence[NewMessage], producer_sub: str | None) -> list[PushResult] | Buffered:
        """Store the messages, all or none; durable when this returns. Duplicates are told, not stored.

        Buffered: PostgreSQL is away, or push maintenance is on; they will be stored when it is over.
        """
        if not messages:
            return []
        return await self.spooling.push(PushRequest(messages, producer_sub))

    async def _store_push(self, request: PushRequest) -> list[PushResult]:
        weight = MESSAGE_WEIGHT * len(request.messages) + request.payload_bytes
        if (
            weight <= SMALL_PUSH
            and self.store.buckets == 1
            and self._turnover.fits(SMALL_PUSH_WEIGHT)  # not behind a crowd of pops
            and self.store.pushes.is_common(request)
        ):
            if self._turnover.is_idle and self._tell_early(request):
                await trio.lowlevel.checkpoint()  # whoever was woken asks before this is written
            results = await self._turnover.submit(request, SMALL_PUSH_WEIGHT, "push")
            if results is not None:
                return cast(list[PushResult], results)
        return await self._pushes.submit(request, weight)

    def _tell_early(self, request: PushRequest) -> int:
        """Wake those who wait for it now: their claims go into its own write, in place of one after it. A claim that
        gets nothing, as somebody holds a lease there, was no write more. Returns how many there are."""
        partitions: dict[str, set[str]] = {}
        for message in request.messages:
            partitions.setdefault(message.queue, set()).add(message.partition)
        return sum(self._wakeups.tell_early(queue, names) for queue, names in partitions.items())

    async def _write_pushes(self, requests: Sequence[PushRequest]) -> list[list[PushResult] | QueueFull]:
        results, woken = await self.store.pushes.push(requests)
        self._tell_woken(woken)
        return results

    # -- pop ------------------------------------------------------------------------------------------------------

    async def pop(self, request: PopRequest) -> LeasedBatch | None:
        """Take messages, waiting for some until the timeout. None: there are none.

        A caller that is cancelled owns nothing: what was claimed for it goes back.
        """
        batch: LeasedBatch | None = None
        if self.pops_paused:
            await self._hold(request)
        else:
            batch = await self._outlast(request)
        messages = 0 if batch is None else batch.message_count
        queue = request.queue if batch is None else batch.claims[0].queue
        self.store.activity.popped(queue, request.group, messages)
        if request.auto_ack and messages:
            self.store.activity.count(queue, ack_success=messages)
        return batch

    async def _hold(self, request: PopRequest) -> None:
        """Pops are switched off. One that would wait is held a little: answered at once, it would be back at once."""
        with trio.move_on_after(min(request.timeout_seconds or 0, _PAUSED_SECONDS)):
            await self._drained.wait()

    def _readable(self, queues: Sequence[Queue]) -> list[Queue]:
        """The queues of a pop but for those whose messages cannot be read here. None of them can: says why."""
        refusals = [self.store.keyring.refusal(queue) for queue in queues]
        readable = [queue for queue, refusal in zip(queues, refusals, strict=True) if refusal is None]
        if not readable:
            for refusal in refusals:
                if refusal is not None:
                    raise refusal
        return readable

    async def _outlast(self, request: PopRequest) -> LeasedBatch | None:
        """Wait for messages; a pop that may wait does so while PostgreSQL is away, too."""
        deadline = trio.current_time() + (request.timeout_seconds or 0)
        while True:
            try:
                return await self._wait_for_batch(request)
            except (StorageUnavailable, OutcomeUnknown):
                if trio.current_time() >= deadline or self._draining:
                    raise
                with trio.move_on_at(deadline):
                    await self._wait_storage()
                rest_seconds = max(0.0, deadline - trio.current_time())
                request = msgspec.structs.replace(request, timeout_seconds=rest_seconds)

    async def _wait_storage(self) -> None:
        """Until PostgreSQL may answer again, or the server drains."""
        if not self.store.away:
            with trio.move_on_after(_LOOK_AGAIN_SECONDS):
                await self._drained.wait()
            return
        async with trio.open_nursery() as either:

            async def wait_back() -> None:
                await self.store.wait_back()
                either.cancel_scope.cancel()

            either.start_soon(wait_back)
            await self._drained.wait()
            either.cancel_scope.cancel()

    async def _wait_for_batch(self, request: PopRequest) -> LeasedBatch | None:
        """Look, and look again whenever there is news."""
        deadline = trio.current_time() + (request.timeout_seconds or 0)
        topic = Topic(request.group, request.queue, request.partition, request.namespace, request.task)
        since: datetime | None = None
        gone = held = 0
        early = False
        with self._wakeups.visit(topic) as lot:
            while True:
                seen = lot.signals
                queues = self._readable(await self._queues_for(request))
                if not queues and since is None and request.start.mode is StartMode.NEW:
                    since = await self.store.now()
                look = await self._look(request, queues, since, early=early)
                if look.batch is not None:
                    return look.batch
                if look.gone and gone < _GONE_TRIES:
                    gone += 1  # deleted, perhaps created anew, by another worker: what is there now counts
                    continue
                if self._draining:
                    return None
                if trio.current_time() >= deadline:
                    if look.due_seconds != 0 or held >= _HELD_TRIES:
                        return None
                    held += 1  # for the time of a commit; it may be a look that finds nothing
                    with trio.move_on_after(_LOOK_AGAIN_SECONDS):
                        await lot.park()
                    continue
                if lot.signals != seen:
                    continue
                if look.due_seconds is not None:
                    self._wakeups.set_timer(lot, max(look.due_seconds, _LOOK_AGAIN_SECONDS))
                early = False
                with trio.move_on_at(deadline):
                    early = await lot.park()
                if self._draining or self.pops_paused:
                    return None

    async def _queues_for(self, request: PopRequest) -> list[Queue]:
        if request.queue is None:
            return await self.store.catalogue.labelled(request.namespace, request.task)
        queue = self.store.catalogue.cached(request.queue) or await self.store.catalogue.find(request.queue)
        return [queue] if queue else []

    async def _look(self, request: PopRequest, queues: list[Queue], since: datetime | None, *, early: bool) -> _Look:
        """One look: a batch, or when another look is worth it. ``early``: for a push that is written now."""
        group = request.group
        start = StartFrom() if group == QUEUE_MODE else request.start
        catalogue = self.store.catalogue
        known = [
            queue
            for queue in queues
            if catalogue.is_registered(queue.queue_id, group) or await catalogue.register(queue, group, start, since)
        ]
        if not known:
            return _Look(gone=bool(queues))
        if len(known) > 1:
            dues = await self.store.claims.ready([(queue.queue_id, group) for queue in known])
            known = self._turns.order(request, known, dues)
        lease_id = None if request.auto_ack else uuid4()
        claim = ClaimRequest(
            queues=tuple(known),
            group=group,
            partition_id=None if request.partition is None else partition_id_of(known[0].queue_id, request.partition),
            batch=request.batch,
            partitions=request.partitions if request.partition is None else 1,
            lease_id=lease_id,
        )
        small = early or request.batch <= SMALL_POP
        outcome = await (self._turnover if small else self._pops).submit(claim, CLAIM_WEIGHT, "pop")
        assert isinstance(outcome, ClaimOutcome)
        if outcome.claims:
            if len(known) > 1:
                self._turns.served(request)
            return _Look(batch=LeasedBatch(self, outcome, group, lease_id))
        for queue in outcome.unregistered:
            catalogue.forget(queue.name)
            catalogue.forget_group(queue.queue_id, group)
        return _Look(due_seconds=outcome.due_seconds, gone=bool(outcome.unregistered))

    async def _write_claims(self, requests: Sequence[ClaimRequest]) -> list[ClaimOutcome]:
        outcomes, surpluses = await self.store.claims.claim(requests)
        self._tell_surpluses(surpluses)
        return outcomes

    async def _write_turnover(self, items: Sequence[_Turning]) -> list[_Turned]:
        """Small pushes, acks that cannot fail, and claims, in one commit."""
        pushes = [item for item in items if isinstance(item, PushRequest)]
        requests = [item for item in items if isinstance(item, ClaimRequest)]
        acks = [item for item in items if not isinstance(item, ClaimRequest | PushRequest)]
        if len(pushes) == len(items):
            return list(await self._write_pushes(pushes))
        if len(requests) == len(items):
            return list(await self._write_claims(requests))
        turned = await self.store.turnover.write(pushes, acks, requests)
        self._tell_woken(turned.woken)
        self._tell_released(turned.released)
        self._tell_surpluses(turned.surpluses)
        pushed = iter(turned.pushed if turned.pushed is not None else [None] * len(pushes))
        acked, claimed = iter(turned.acked), iter(turned.claimed)
        return [
            next(claimed)
            if isinstance(item, ClaimRequest)
            else next(pushed)
            if isinstance(item, PushRequest)
            else next(acked)
            for item in items
        ]

    def _abandon(self, item: _Turning, result: _Turned) -> None:
        """The pop that asked is gone: its claims go back. Pushes and acks are done all the same."""
        if isinstance(item, ClaimRequest) and isinstance(result, ClaimOutcome) and result.claims:
            self._returns.append((result, item.group, item.lease_id))
            self._returned.set()

    async def give_back(self, outcome: ClaimOutcome, group: str, lease_id: UUID | None) -> None:
        """Undo a claim of which nothing reached its consumer, and tell who waits."""
        await self.store.claims.give_back(outcome, group, lease_id)
        self._tell_released([Released(claim.queue, group, claim.partition) for claim in outcome.claims])

    async def _run_returns(self) -> None:
        while True:
            while not self._returns:
                self._returned = trio.Event()
                await self._returned.wait()
            outcome, group, lease_id = self._returns.pop()
            with trio.move_on_after(_GIVE_BACK_SECONDS, shield=True):  # drain must not keep the lease from its owner
                try:
                    await self.give_back(outcome, group, lease_id)
                except QueenError as error:
                    log.warning("undelivered batch not given back, its lease will expire", error=str(error))

    async def settle(self) -> None:
        """Until what is being claimed for callers who are gone is known, and with it what is to go back."""
        await self._pops.wait_idle()
        await self._turnover.wait_idle()

    # -- ack ------------------------------------------------------------------------------------------------------

    async def ack(self, acks: Sequence[Ack]) -> list[AckResult]:
        """Apply one request's acks in order; a verdict for each."""
        if not acks:
            return []
        if self.store.buckets == 1 and all(ack.status is AckStatus.COMPLETED for ack in acks):
            results = await self._turnover.submit(acks, len(acks), "ack")
            return cast(list[AckResult], results)
        return await self._acks.submit(acks, len(acks))

    async def _write_acks(self, requests: Sequence[Sequence[Ack]]) -> list[list[AckResult]]:
        results, released = await self.store.acks.ack(requests)
        self._tell_released(released)
        return results

    async def extend_lease(self, lease_id: str, seconds: int) -> LeaseExtension:
        """Give a live lease at least ``seconds`` from now."""
        return await self.store.acks.extend(lease_id, seconds)

    async def transact(
        self,
        operations: Sequence[Sequence[NewMessage] | Ack],
        required_leases: Sequence[str],
        producer_sub: str | None,
    ) -> TransactionResult:
        """Pushes and acks in one commit, or nothing and the reason."""
        transaction_id = str(uuid4())
        lent = required_leases[0] if len(required_leases) == 1 else None
        acks = [
            _with_lease(operation, lent) if operation.lease_id is None and lent else operation
            for operation in operations
            if isinstance(operation, Ack)
        ]
        messages = [message for operation in operations if not isinstance(operation, Ack) for message in operation]
        await self.spooling.wait_turn({message.queue for message in messages})
        flush = self.store.pushes.flush_of([PushRequest(messages, producer_sub)])
        error, pushed, acked, woken, released = await self.store.acks.transact(flush, acks, required_leases)
        if error is not None:
            return TransactionResult(transaction_id=transaction_id, error=error)
        self._tell_woken(woken)
        self._tell_released(released)
        pushed_results, ack_results = iter(pushed), iter(acked)
        results: list[PushResult | AckResult] = []
        for operation in operations:
            if isinstance(operation, Ack):
                results.append(next(ack_results))
            else:
                results.extend(next(pushed_results) for _ in operation)
        return TransactionResult(transaction_id=transaction_id, results=tuple(results))

    async def dead_letters(
        self,
        *,
        queue: str | None = None,
        partition: str | None = None,
        group: str | None = None,
        failed_from: datetime | None = None,
        failed_to: datetime | None = None,
        limit: int = 100,
        offset: int = 0,
    ) -> tuple[int, list[DeadLetter]]:
        """How many dead letters match, and a page of them, newest failure first."""
        return await self.store.dead_letters.find(
            queue=queue,
            partition=partition,
            group=group,
            failed_from=failed_from,
            failed_to=failed_to,
            limit=limit,
            offset=offset,
        )

    # -- streams --------------------------------------------------------------------------------------------------

    async def register_stream(self, query: StreamQuery) -> tuple[UUID, Registration]:
        """Register a query by its name, or find it again. Returns its id."""
        return await self.store.streams.register(query)

    async def stream_state(self, query_id: UUID, partition_id: UUID, wanted: StateFilter) -> list[StateRow]:
        """What a query remembers of a source partition, ordered by key."""
        return await self.store.streams.state(query_id, partition_id, wanted)

    async def cycle_stream(self, cycle: Cycle, producer_sub: str | None) -> CycleResult:
        """State, sink messages and acknowledgement in one commit, or nothing and the reason."""
        try:
            await self.spooling.wait_turn({message.queue for message in cycle.messages})
            result, woken, released = await self.store.streams.cycle(cycle, producer_sub)
        except EncryptionUnavailable as error:
            return CycleResult(error=error.detail)
        self._tell_woken(woken)
        self._tell_released(released)
        return result

    # -- news -----------------------------------------------------------------------------------------------------

    def _tell_woken(self, woken: Iterable[Woken]) -> None:
        for news in woken:
            hints = hints_of(news.queue, news.group)
            if news.due_seconds > 0:
                self._wakeups.tell_at(hints, news.due_seconds, news.partition)
                self._tell_others(hints)
            elif not self._wakeups.tell(hints, 1, news.partition):
                if self._wakeups.is_looking(hints, news.partition):
                    self._tell_others_of_surplus(hints)  # those who look here will find it, if they are quick enough
                else:
                    self._tell_others(hints)

    def _tell_released(self, released: Iterable[Released]) -> None:
        for news in released:
            queue = self.store.catalogue.cached(news.queue)
            if queue is not None:
                hints = hints_of(queue, news.group)
                if not self._wakeups.tell(hints, 1, news.partition):
                    self._tell_others_of_surplus(hints)

    def _tell_surpluses(self, surpluses: Iterable[Surplus]) -> None:
        """Consumers were served, and more could be."""
        for surplus in surpluses:
            hints = hints_of(surplus.queue, surplus.group)
            partition = UNNAMED if surplus.partition is None else surplus.partition
            if surplus.due_seconds > 0:
                self._wakeups.tell_at(hints, surplus.due_seconds, partition)
            else:
                # those who wait to look already will find it; but one of them may leave, so one at least is woken
                pops = max(surplus.pops - self._waiting_for("pop"), 1)
                if not self._wakeups.tell(hints, pops, partition):
                    self._tell_others_of_surplus(hints)

    def _tallies(self, verb: str) -> list[Tally]:
        """Of a verb, of all batchers."""
        return [batcher.tally(verb) for batcher in self._batchers]

    def _waiting_for(self, verb: str) -> int:
        """Requests of a verb that wait for a write."""
        return sum(tally.waiting for tally in self._tallies(verb))

    def _waiting_requests(self) -> dict[str, int]:
        """By verb: requests that wait for a write."""
        verbs = {"waiting_pushes": "push", "waiting_pops": "pop", "waiting_acks": "ack"}
        return {gauge: self._waiting_for(verb) for gauge, verb in verbs.items()}

    def _queue_changed(self, queue: Queue) -> None:
        """Born or configured: everybody who waits for it looks again."""
        hints = hints_of(queue, "")
        self._wakeups.tell(hints, MAX_WAITING)
        self._tell_others(hints)

    def _tell_group(self, queue: Queue, group: str) -> None:
        """Moved or forgotten: everybody of the group looks again."""
        hints = hints_of(queue, group)
        self._wakeups.tell(hints, MAX_WAITING)
        self._tell_others(hints)

    def _tell_others(self, hints: Iterable[str]) -> None:
        self._to_tell.update(hints)
        self._news.set()

    def _tell_others_of_surplus(self, hints: Iterable[str]) -> None:
        """What consumers here are busy with and others might help with: it has less of a hurry."""
        self._surplus_to_tell.update(hints)
        self._surplus.set()

    def _heard(self, hints: Sequence[str]) -> None:
        """Another worker tells: one pop a topic looks, and goes on waking while it finds something."""
        if self._followers.heard(hints) or _SWITCHED in hints:
            self._switched.set()
        if self._reporters.heard(hints):
            self._report.set()
        self._wakeups.tell(hints, 1)

    def _tell_switched(self) -> None:
        """A switch was turned here: look at them now, on every worker."""
        self._switched.set()
        self._tell_others([_SWITCHED])

    async def read_switches(self) -> None:
        """Do as the switches of the cluster say."""
        switches = await self.store.metrics.switches()
        spooling = PUSH_MAINTENANCE in switches
        if spooling != self.spooling.maintenance:
            self.spooling.maintenance = spooling
            log.warning("pushes go to the spool by order" if spooling else "pushes are stored again")
            self.spooling.kick()
        paused = POP_MAINTENANCE in switches
        if paused != self.pops_paused:
            self.pops_paused = paused
            log.warning("pops are switched off" if paused else "pops are switched on again")
            self._wakeups.tell_all()

    async def pause_pushes(self, *, paused: bool) -> None:
        """Send pushes to the spool, or store them again: everywhere when this returns."""
        await self.admin.pause_pushes(paused=paused)
        await self._follow_switches()

    async def pause_pops(self, *, paused: bool) -> None:
        """Switch pops off, or on again: everywhere when this returns."""
        await self.admin.pause_pops(paused=paused)
        await self._follow_switches()

    async def _follow_switches(self) -> None:
        """Do as the switches say, and wait until every live worker does."""
        await self.read_switches()
        await self._ask(self._followers)

    async def refresh(self) -> int:
        """Write what every live worker did until now, and fold it. Returns how many counted changes were folded."""
        await self._ask(self._reporters)
        return await self.admin.refresh()

    async def _ask(self, followers: Followers) -> None:
        """Have the other live workers do it, and wait until they have."""
        names = {process.process_id.hex for process in await self.monitor.live_processes()}
        with followers.question() as (question, asking):
            self._tell_others([asking])
            await followers.wait(question, names, _FOLLOW_SECONDS)

    def _storage_is_back(self) -> None:
        """PostgreSQL answers again: switches may have been turned meanwhile, and there may be something to drain."""
        self._switched.set()
        self.spooling.kick()
        self._wakeups.tell_all()

    async def _run_switches(self) -> None:
        """Follow the switches. A hint tells of most changes at once; the look in between is for one that is lost."""
        while True:
            with trio.move_on_at(next_beat(_SWITCHES_SECONDS)):
                await self._switched.wait()
            self._switched = trio.Event()
            questions = self._followers.take_questions()
            try:
                await self.read_switches()
                if questions:
                    self._tell_others(self._followers.replies(questions))
            except QueenError as error:
                self._followers.put_back(questions)
                log.debug("switches not read, will try again", error=error.detail)

    async def _run_reports(self) -> None:
        """Write what this worker did when another one asks."""
        while True:
            await self._report.wait()
            self._report = trio.Event()
            questions = self._reporters.take_questions()
            try:
                await self.monitor.refresh()
                self._tell_others(self._reporters.replies(questions))
            except QueenError as error:
                log.debug("not reported, will do by itself", error=error.detail)

    async def _run_notifier(self) -> None:
        while True:
            await self._news.wait()
            self._news = trio.Event()
            hints, self._to_tell = self._to_tell, set()
            try:
                await self.store.notifications.send(sorted(hints))
            except QueenError as error:
                log.debug("hints not sent, the others will find out by themselves", error=str(error))
            await trio.sleep(_NOTIFY_PAUSE_SECONDS)

    async def _run_surplus(self) -> None:
        while True:
            await self._surplus.wait()
            self._surplus = trio.Event()
            hints, self._surplus_to_tell = self._surplus_to_tell, set()
            self._tell_others(hints)
            await trio.sleep(_SURPLUS_PAUSE_SECONDS)

    async def _run_sweep(self) -> None:
        """Find what lost hints would have told. One query for all topics in which somebody waits."""
        while True:
            await trio.sleep_until(next_beat(_SWEEP_SECONDS))
            lots = self._wakeups.parked()
            if lots:
                try:
                    await self._sweep(lots)
                except QueenError as error:
                    log.debug("sweep failed, will try again", error=str(error))

    async def _sweep(self, lots: Sequence[Lot]) -> None:
        pairs: list[tuple[UUID, str]] = []
        asked: list[Lot] = []
        for lot in lots:
            queue = self.store.catalogue.cached(lot.topic.queue) if lot.topic.queue is not None else None
            if queue is None:
                lot.wake(1)  # a queue that was not there, or one of several: only a look can tell
            else:
                pairs.append((queue.queue_id, lot.topic.group))
                asked.append(lot)
        if not pairs:
            return
        dues = await self.store.claims.ready(pairs)
        for place, due in dues.items():
            if due <= 0:
                asked[place].wake(1)
            else:
                self._wakeups.set_timer(asked[place], due)

    # -- life -----------------------------------------------------------------------------------------------------

    async def health(self) -> bool:
        """Whether PostgreSQL answers."""
        return await self.store.is_healthy()

    def begin_drain(self) -> None:
        """Parked pops end now, with nothing; nobody parks any more. May be called again."""
        self._draining = True
        self._drained.set()
        self._wakeups.tell_all()

    def doing(self) -> list[BatchWrite]:
        """The writes of requests at hand."""
        return [write for batcher in self._batchers for write in batcher.doing()]

    def _gauges(self) -> dict[str, int]:
        """The gauges of the monitor that are the engine's."""
        storage = self.store.statistics()
        return {
            "pool_size": storage["size"],
            "pool_idle": storage["idle"],
            "pool_active": storage["size"] - storage["idle"],
            "pool_waiting": storage["waiting"],
            **self._waiting_requests(),
            "parked": self._wakeups.parked_count,
        }

    def _writes(self) -> dict[str, int]:
        """What the batchers have done since the start."""
        counts: dict[str, int] = {}
        for verb in ("push", "pop", "ack"):
            tallies = self._tallies(verb)
            counts[f"{verb}_writes"] = sum(tally.writes for tally in tallies)
            counts[f"{verb}_written"] = sum(tally.requests for tally in tallies)
            counts[f"{verb}_write_us"] = round(sum(tally.busy_seconds for tally in tallies) * 1e6)
        return counts

    def _waiting(self) -> list[Waiting]:
        """Who waits on which queue. Pops that name no queue wait on none."""
        return [
            Waiting(lot.topic.queue, lot.topic.group, len(lot.waiting))
            for lot in self._wakeups.parked()
            if lot.topic.queue is not None
        ]

    def statistics(self) -> dict[str, int]:
        """Gauges: parked pops, requests waiting per verb, connections."""
        return {
            "parked": self._wakeups.parked_count,
            **self._waiting_requests(),
            **{f"connections_{name}": value for name, value in self.store.statistics().items()},
        }

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Everything that runs in the background, until cancelled."""
        async with trio.open_nursery() as tasks:
            for batcher in self._batchers:
                await tasks.start(batcher.run)
            await tasks.start(self.admin.run)
            await tasks.start(self.spooling.run)
            tasks.start_soon(self._wakeups.run_timers)
            tasks.start_soon(self._run_notifier)
            tasks.start_soon(self._run_surplus)
            tasks.start_soon(self._run_sweep)
            tasks.start_soon(self._run_returns)
            tasks.start_soon(self._run_switches)
            tasks.start_soon(self._run_reports)
            tasks.start_soon(self.monitor.run)
            tasks.start_soon(run_housekeeping, self.store, self._settings)
            task_status.started()


def _with_lease(ack: Ack, lease_id: str) -> Ack:
    return Ack(
        transaction_id=ack.transaction_id,
        partition_id=ack.partition_id,
        status=ack.status,
        group=ack.group,
        lease_id=lease_id,
        error=ack.error,
    )


@asynccontextmanager
async def open_engine(settings: Settings) -> AsyncIterator[Engine]:
    """Open storage and the engine's tasks; close them in reverse. Raises StartupError with one sentence."""
    refusal: StartupError | None = None
    async with AsyncExitStack() as stack:
        spool: Spool | None = None
        known_buckets: int | None = None
        if settings.spool_dir is not None:
            spool = await stack.enter_async_context(
                open_spool(settings.spool_dir, settings.spool_max_bytes, keyring_of(settings))
            )
            known_buckets = spool.buckets
        store = await stack.enter_async_context(open_store(settings, known_buckets=known_buckets))
        tasks = await stack.enter_async_context(trio.open_nursery())
        engine = Engine(store, settings, spool)
        if not store.away:
            await engine.read_switches()
            try:
                await engine.spooling.check_home()
            except SpoolForeign as error:
                refusal = StartupError(error.detail)  # raised below, where there is no nursery to make a group of it
        if refusal is None:
            await tasks.start(engine.run)
            try:
                yield engine
            finally:
                engine.begin_drain()
                with trio.move_on_after(_SETTLE_SECONDS, shield=True):  # a lease for nobody would keep others waiting
                    await engine.settle()
                tasks.cancel_scope.cancel()
    if refusal is not None:
        raise refusal
