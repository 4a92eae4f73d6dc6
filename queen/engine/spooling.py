"""When pushes go to the spool instead of to PostgreSQL, and how they come out of it. The file is in storage/spool.py.

A push goes to the spool while PostgreSQL is away, while push maintenance is on, and for as long as anything is left in
the spool: what was pushed before is stored before. One worker of a server drains, whichever comes first; when it dies
the kernel gives its turn to the next.

              PostgreSQL away, or maintenance on
     direct ──────────────────────────────────────▶ spooling ◀─┐
        ▲                                               │      │ away again, or maintenance on again
        │   the last portion: held, stored, removed     ▼      │
        └──────────────────────────────────────────── draining ┘

The last portion is stored while nobody can append (for the time of a commit), so that draining ends however many
producers there are. Whoever waited to append meanwhile finds nothing to wait for and goes to PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, Final, NamedTuple

import structlog
import trio

from queen.beat import next_beat
from queen.config.settings import Settings
from queen.engine.batcher import Batcher
from queen.errors import (
    EncryptionUnavailable,
    OutcomeUnknown,
    Overloaded,
    QueenError,
    SpoolForeign,
    SpoolFull,
    SpoolUnavailable,
    StorageUnavailable,
)
from queen.model.message import Buffered, PushResult
from queen.model.spool import SpoolFigures
from queen.storage.pushes import PushRequest
from queen.storage.spool import Entry, Spool
from queen.storage.store import Store

PUSH_MAINTENANCE: Final = "push_maintenance"
"""The switch that sends every push to the spool."""

PORTION_BYTES: Final = 8 * 1024 * 1024
"""Of one write of the drain, and of one append: half of what a write of pushes may be; others are to get their turn."""

MAX_WAITING: Final = 20_000
"""Pushes that may wait to be appended; see MAX_WAITING of engine.py."""

QUIET_SECONDS: Final = 0.5
"""Between two looks whether another worker, gone by now, has left something in an empty spool."""

RETRY_SECONDS: Final = 1.0
"""Until the drain tries again after PostgreSQL has refused it."""

FOREIGN_SECONDS: Final = 60.0
"""Until it is said again that the spool is not for this database."""

TURN_SECONDS: Final = 5.0
"""How long a transaction that pushes waits for the spooled messages of its queues before it is refused."""

_TURN_LOOK_SECONDS: Final = 0.05

log = structlog.get_logger("queen.engine")

Write = Callable[[Sequence[PushRequest]], Awaitable[Sequence[Any]]]
"""One write to PostgreSQL: a result for each request, or its error."""


class _Append(NamedTuple):
    """A push for the spool. ``must``: PostgreSQL was asked first, and did not take it."""

    request: PushRequest
    must: bool


class Spooling:
    """See the module.

    Args:
        spool: None: this process has none, and a push that PostgreSQL does not take fails.
        store_one: the common way of a push, with whatever others wait to be written.
        write: the drain's way to PostgreSQL; all or nothing but for requests with an error of their own.
        look_at_switches: brings ``maintenance`` up to date.
    """

    def __init__(
        self,
        spool: Spool | None,
        store: Store,
        settings: Settings,
        store_one: Callable[[PushRequest], Awaitable[list[PushResult]]],
        write: Write,
        look_at_switches: Callable[[], Awaitable[None]],
    ) -> None:
        self.spool = spool
        self.maintenance = False
        self._store = store
        self._settings = settings
        self._store_one = store_one
        self._write = write
        self._look_at_switches = look_at_switches
        self._kick = trio.Event()
        self._appends: Batcher[_Append, list[str | None] | SpoolFull | None] = Batcher(
            "spool", self._append, max_weight=PORTION_BYTES, max_waiting=MAX_WAITING
        )

    @property
    def active(self) -> bool:
        """Whether pushes go to the spool now."""
        return self.spool is not None and (self.maintenance or self._store.away or self.spool.backlog)

    @property
    def figures(self) -> SpoolFigures:
        """What waits in the spool, and what was set aside."""
        return SpoolFigures() if self.spool is None else self.spool.figures

    @property
    def takes_pushes(self) -> bool:
        """Whether a push can be kept while PostgreSQL is away."""
        return self.spool is not None and self.spool.has_room

    # -- pushing --------------------------------------------------------------------------------------------------

    async def push(self, request: PushRequest) -> list[PushResult] | Buffered:
        """Store a push, or keep it in the spool; durable when this returns."""
        if self.spool is None:
            if self.maintenance:
                raise StorageUnavailable("push maintenance is on and this process has no spool; nothing was applied")
            return await self._store_one(request)
        while True:
            if not self.active:
                try:
                    return await self._store_one(request)
                except StorageUnavailable as error:
                    kept = await self._keep(request, error)
                except OutcomeUnknown as error:
                    if request.doubt is None and not all(message.transaction_id for message in request.messages):
                        raise  # what PostgreSQL may have named cannot be recognised: the client has to decide
                    kept = await self._keep(request, error)
            else:
                kept = await self._keep(request, None)
            if kept is not None:
                return kept

    async def _keep(self, request: PushRequest, why: QueenError | None) -> Buffered | None:
        """Append. None: there is no reason to any more. ``why``: what PostgreSQL said; it was asked first."""
        assert self.spool is not None
        if not self.spool.seals:
            for queue in {message.queue for message in request.messages}:
                known = self._store.catalogue.cached(queue)
                if known is not None and known.options.encryption_enabled:
                    raise EncryptionUnavailable(queue)
        append = _Append(request, must=why is not None)
        try:
            result = await self._appends.submit(append, 256 * len(request.messages) + request.payload_bytes)
            if isinstance(result, SpoolFull):
                raise result
        except (SpoolFull, SpoolUnavailable, Overloaded) as error:
            if isinstance(why, OutcomeUnknown):
                raise why from error  # it may be stored: "nothing was applied" would be a lie
            raise
        return None if result is None else Buffered(result)

    async def _append(self, appends: Sequence[_Append]) -> list[list[str | None] | SpoolFull | None]:
        assert self.spool is not None
        forced = self.maintenance or self._store.away or any(append.must for append in appends)
        before = self.spool.backlog
        results = await self.spool.keep([append.request for append in appends], if_backlog=not forced)
        if not before and self.spool.backlog:
            self._kick.set()
            log.warning("pushes go to the spool", reason="maintenance" if self.maintenance else "PostgreSQL is away")
        return results

    async def wait_turn(self, queues: Collection[str]) -> None:
        """Until the spool holds nothing of these queues: for a push that cannot be spooled because more hangs on it.

        Raises:
            Overloaded: it still does after a while, or will for as long as maintenance is on.
        """
        spool = self.spool
        if spool is None or not queues or not spool.backlog:
            return
        deadline = trio.current_time() + TURN_SECONDS
        while spool.backlog and await spool.holds(queues):
            if self.maintenance or trio.current_time() >= deadline:
                raise Overloaded(
                    "earlier messages of these queues are in the spool yet; nothing was applied; try again"
                )
            self._kick.set()
            await trio.sleep(_TURN_LOOK_SECONDS)  # the worker that drains may be another process

    async def queue_deleted(self, queue: str) -> None:
        """What waits for a queue that was deleted is not for the one that may be made under its name."""
        if self.spool is not None and self.spool.backlog:
            messages = await self.spool.set_aside_queue(queue, "the queue was deleted")
            if messages:
                log.error("spooled messages set aside: their queue was deleted", queue=queue, messages=messages)

    # -- draining -------------------------------------------------------------------------------------------------

    async def check_home(self) -> None:
        """Refuse to have what was accepted for one database stored in another. Raises SpoolForeign."""
        spool = self.spool
        if spool is not None and not await spool.belongs_to(await self._store.born(), self._store.buckets):
            raise SpoolForeign(str(spool.directory), spool.figures.pending_messages)

    def kick(self) -> None:
        """Look now whether there is anything to drain."""
        self._kick.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Append and drain until cancelled."""
        if self.spool is None:
            task_status.started()
            return
        async with trio.open_nursery() as tasks:
            await tasks.start(self._appends.run)
            tasks.start_soon(self._run_drain, self.spool)
            task_status.started()

    async def _run_drain(self, spool: Spool) -> None:
        while True:
            interval_seconds = self._settings.spool_interval_seconds
            with trio.move_on_at(
                next_beat(interval_seconds if spool.backlog else max(interval_seconds, QUIET_SECONDS))
            ):
                await self._kick.wait()
            self._kick = trio.Event()
            if not spool.backlog or self.maintenance or self._store.away or not spool.lead():
                continue
            try:
                await self._drain(spool)
            except SpoolForeign as error:
                log.error("the spool is not drained", error=error.detail)
                await trio.sleep(FOREIGN_SECONDS)
            except QueenError as error:
                log.warning("the spool is not drained, will try again", error=error.detail)
                with trio.move_on_after(RETRY_SECONDS):
                    await self._kick.wait()
            finally:
                spool.follow()

    async def _drain(self, spool: Spool) -> None:
        """Until nothing is left, or PostgreSQL or an operator says stop."""
        await self._look_at_switches()
        if self.maintenance:
            return
        await self.check_home()
        began_at, messages = trio.current_time(), 0
        log.info("draining the spool", messages=spool.figures.pending_messages)
        try:
            while spool.backlog and not self.maintenance:
                messages += await self._drain_portion(spool)
        finally:
            log.info(
                "spool drained" if not spool.backlog else "draining stopped",
                messages=messages,
                left=spool.figures.pending_messages,
                seconds=round(trio.current_time() - began_at, 3),
            )

    async def _drain_portion(self, spool: Spool) -> int:
        portion = await spool.read(self._settings.spool_batch, PORTION_BYTES)
        if not portion.whole:
            return await self._move(spool, portion.entries)
        async with spool.held():
            portion = await spool.read(self._settings.spool_batch, PORTION_BYTES)
            return await self._move(spool, portion.entries)

    async def _move(self, spool: Spool, entries: Sequence[Entry]) -> int:
        """Store entries, set aside what cannot be, remove both. Returns how many messages were stored.

        A crash between the commit in PostgreSQL and the one here stores them a second time: as duplicates, for every
        spooled message has a transaction id.
        """
        set_aside = await self._store_entries(entries)
        with trio.CancelScope(shield=True):  # milliseconds in a thread, which is not cancelled anyway
            await spool.remove(entries, set_aside)
        for entry, reason in set_aside:
            log.error(
                "spooled messages set aside: they cannot be stored",
                number=entry.number,
                queue=entry.queue,
                messages=entry.messages,
                reason=reason,
            )
        return sum(entry.messages for entry in entries) - sum(entry.messages for entry, _ in set_aside)

    async def _store_entries(self, entries: Sequence[Entry]) -> list[tuple[Entry, str]]:
        """Returns the entries that can never be stored, and why. Raises what will pass."""
        bad = [(entry, entry.trouble) for entry in entries if entry.trouble is not None]
        good: list[Entry] = []
        requests: list[PushRequest] = []
        for entry in entries:
            request = await self._left_of(entry)
            if request is not None:
                good.append(entry)
                requests.append(request)
        if not good:
            return bad
        try:
            results = await self._write(requests)
        except Exception as error:  # noqa: BLE001  judged below: nothing may keep the rest from being drained
            _raise_if_passing(error)
            if len(good) == 1:
                return [*bad, (good[0], _sentence(error))]
            log.warning("draining one by one", error=_sentence(error))
            for entry in good:
                bad += await self._store_entries([entry])
            return bad
        refused = zip(good, results, strict=True)
        return bad + [(entry, _sentence(result)) for entry, result in refused if isinstance(result, Exception)]

    async def _left_of(self, entry: Entry) -> PushRequest | None:
        """What is to be stored of an entry."""
        if entry.doubt is not None and await self._store.pushes.was_stored(entry.doubt):
            return entry.rest
        return entry.request


def _raise_if_passing(error: Exception) -> None:
    """Raise what says nothing about the messages: PostgreSQL is away, busy or full."""
    if isinstance(error, QueenError) and error.status == 503:
        raise error


def _sentence(error: Exception) -> str:
    return error.detail if isinstance(error, QueenError) else repr(error)
