"""Random pushes, pops, acks and expiries against a model of a screenful: what the engine does is what the model says.

Order in a partition, nothing lost, nothing delivered after its ack, one lease at a time, retries counted to the limit
and not beyond, dead letters exactly then, every id stored once. Time passes by moving everything stored back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from queen.model.message import AckStatus
from queen.storage.ids import uuid7_texts

if TYPE_CHECKING:
    from tests.conftest import Broker, DatabaseClock, Got, OpenBroker, Popped

LEASE_SECONDS = 30
PARTITIONS = ("a", "b", "c")
GROUPS = ("g", "h")


@dataclass
class Cursor:
    """A group's place in a partition, as the contract describes it (http-core.md §3.2 and §4)."""

    log: list[str]  # transaction ids, by offset; shared by all groups
    limit: int
    committed: int = 0
    retries: int = 0
    attempt: int = 0
    lease: str | None = None
    completed: str | None = None
    expires: float = 0.0
    batch: range = range(0)
    acked: set[int] = field(default_factory=set)
    dead: set[int] = field(default_factory=set)

    def is_live(self, now: float) -> bool:
        return self.lease is not None and self.expires > now

    def take(self, now: float, most: int, lease: str | None) -> range:
        taken = range(self.committed, min(self.committed + most, len(self.log)))
        if self.is_live(now) or not taken:
            return range(0)
        self.release()
        if lease is None:
            self.committed, self.retries, self.attempt = taken.stop, 0, 0
        else:
            self.lease, self.expires, self.batch = lease, now + LEASE_SECONDS, taken
            self.attempt += 1
        return taken

    def release(self) -> None:
        self.lease, self.batch, self.acked = None, range(0), set()

    def ack(self, now: float, lease: str | None, items: list[tuple[int, AckStatus]]) -> list[bool]:
        """One request, judged against the state before it."""
        live, retries, failed, cap = self.lease if self.is_live(now) else None, self.retries, False, len(self.log)
        verdicts = []
        for at, status in items:
            if lease is not None and lease != live:
                repeated = lease == self.completed and status is AckStatus.COMPLETED and at < self.committed
                verdicts.append(repeated)
                continue
            verdicts.append(True)
            if status is AckStatus.RETRY or (status is AckStatus.FAILED and retries < self.limit):
                if status is AckStatus.FAILED and at < self.committed:
                    self.dead.add(at)  # docs/decisions/0009
                else:
                    cap = min(cap, at)
                if status is AckStatus.FAILED and at >= self.committed:
                    self.retries, failed = self.retries + (not failed), True
                self.release()
                continue
            if status is not AckStatus.COMPLETED:
                self.dead.add(at)
            if min(at + 1, cap) > self.committed:
                self.committed, self.attempt = min(at + 1, cap), 0
            if self.is_live(now) and at in self.batch:
                self.acked.add(at)
                if len(self.acked) == len(self.batch):
                    self.retries, self.completed = 0, self.lease
                    self.release()
        return verdicts


class Machine:
    """The engine and the model side by side."""

    def __init__(self, broker: Broker, clock: DatabaseClock, draw: Any) -> None:
        self.broker = broker
        self.clock = clock
        self.draw = draw
        self.queue = str(uuid4())
        self.now = 0.0
        self.limit = draw(st.integers(0, 2))
        self.logs: dict[str, list[str]] = {name: [] for name in PARTITIONS}
        self.cursors = {
            (partition, group): Cursor(self.logs[partition], self.limit) for partition in PARTITIONS for group in GROUPS
        }
        self.held: list[tuple[str, Popped]] = []  # group, batch

    async def push(self) -> None:
        partition = self.draw(st.sampled_from(PARTITIONS))
        kinds = {"uuid7": lambda: uuid7_texts(1)[0], "uuid4": lambda: str(uuid4()), "text": lambda: uuid4().hex[:6]}
        known = self.logs[partition] or ["first"]
        ids = [kinds[kind]() for kind in self.draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=4))]
        ids += [known[at % len(known)] for at in self.draw(st.lists(st.integers(0, 50), max_size=2))]
        await self.store(partition, ids)

    async def store(self, partition: str, ids: list[str]) -> None:
        results = await self.broker.push(self.queue, ids=ids, partition=partition)
        for text, result in zip(ids, results, strict=True):
            assert result.duplicate == (text in self.logs[partition])
            if not result.duplicate:
                self.logs[partition].append(text)

    async def pop(self) -> None:
        group = self.draw(st.sampled_from(GROUPS))
        partition = self.draw(st.none() | st.sampled_from(PARTITIONS))
        batch, partitions = self.draw(st.integers(1, 6)), self.draw(st.integers(1, 3))
        auto_ack = self.draw(st.integers(0, 3)) == 3
        await self.take(group, partition, batch, partitions, auto_ack)

    async def take(self, group: str, partition: str | None, batch: int, partitions: int, auto_ack: bool) -> None:
        popped = await self.broker.pop(
            self.queue, group=group, partition=partition, batch=batch, partitions=partitions, auto_ack=auto_ack
        )
        self.check_taken(popped, group, batch, auto_ack)
        if len(popped) < batch and len(popped.claims) < (1 if partition else partitions):
            for name in [partition] if partition else set(PARTITIONS) - set(popped.partitions):
                assert not self.cursors[name, group].take(self.now, 1, "none"), "something was there and not taken"
        if popped:
            self.held.append((group, popped))

    def check_taken(self, popped: Popped, group: str, batch: int, auto_ack: bool) -> None:
        at = 0
        for claim in popped.claims:
            cursor = self.cursors[claim.partition, group]
            retries = cursor.retries
            taken = cursor.take(self.now, batch - at, None if auto_ack else popped.lease)
            assert (claim.first, claim.end) == (taken.start, taken.stop)
            assert claim.retry_count == retries
            assert auto_ack or claim.attempt == cursor.attempt
            assert popped.data[at : at + len(taken)] == cursor.log[taken.start : taken.stop]
            at += len(taken)
        assert at == len(popped)

    async def held_batch(self) -> tuple[str, Popped] | None:
        """One of those taken, mostly the latest that is still leased.

        Draws are alike whatever is held, for PostgreSQL chooses among partitions.
        """
        any_of_them, place, group = (
            self.draw(st.integers(0, 4)) == 4,
            self.draw(st.integers(0, 3)),
            self.draw(st.sampled_from(GROUPS)),
        )
        leased = [
            (group, popped)
            for group, popped in self.held
            if any(
                (cursor := self.cursors[claim.partition, group]).is_live(self.now)
                and cursor.lease == popped.lease_or_none
                for claim in popped.claims
            )
        ]
        if not leased and not any_of_them:
            await self.take(group, None, 3, 2, auto_ack=False)
            leased = self.held[-1:]
        held = self.held if any_of_them else leased
        return held[-1 - place % len(held)] if held else None

    async def ack(self) -> None:
        held = await self.held_batch()
        statuses = st.sampled_from(self.draw(st.sampled_from([[AckStatus.COMPLETED], list(AckStatus)])))
        drawn = self.draw(st.lists(st.tuples(st.integers(0, 9), statuses), min_size=1, max_size=6))
        checked = self.draw(st.integers(0, 2)) > 0
        if held is None:
            return
        group, popped = held
        items: list[tuple[Got, AckStatus]] = [(popped[at % len(popped)], status) for at, status in drawn]
        lease = popped.lease_or_none if checked else None
        acks = [self.broker.acks_of([each], status, lease=lease, group=group)[0] for each, status in items]

        results = await self.broker.engine.ack(acks)

        for name in PARTITIONS:
            mine = [(each.offset, status) for each, status in items if each.partition == name]
            verdicts = [
                result.success for result, (each, _) in zip(results, items, strict=True) if each.partition == name
            ]
            assert verdicts == self.cursors[name, group].ack(self.now, lease, mine)

    async def ack_all(self) -> None:
        if not (held := await self.held_batch()):
            return
        group, popped = held
        lease = popped.lease_or_none
        results = await self.broker.ack(popped.messages, lease=lease, group=group)
        expected = []
        for claim in popped.claims:
            items = [(at, AckStatus.COMPLETED) for at in range(claim.first, claim.end)]
            expected += self.cursors[claim.partition, group].ack(self.now, lease, items)
        assert [result.success for result in results] == expected

    async def give_back(self) -> None:
        if not (held := await self.held_batch()):
            return
        group, popped = held
        self.held.remove(held)
        await popped.give_back()
        for claim in popped.claims:
            cursor = self.cursors[claim.partition, group]
            if popped.lease_or_none is None:
                if cursor.committed == claim.end and cursor.lease is None:
                    cursor.committed = claim.first
            elif cursor.lease == popped.lease:
                cursor.attempt = max(cursor.attempt - 1, 0)
                cursor.release()

    async def extend(self) -> None:
        if not (held := await self.held_batch()) or held[1].lease_or_none is None:
            return
        group, popped = held
        live = [
            cursor
            for claim in popped.claims
            if (cursor := self.cursors[claim.partition, group]).lease == popped.lease and cursor.is_live(self.now)
        ]
        extension = await self.broker.engine.extend_lease(popped.lease, 40)
        assert extension.renewed == len(live)
        for cursor in live:
            cursor.expires = max(cursor.expires, self.now + 40)

    async def pass_time(self) -> None:
        seconds = self.draw(st.sampled_from([10, 31]))
        await self.clock.advance(seconds)
        self.now += seconds

    async def check_the_end(self) -> None:
        """All that was not acked is still there, in order; the dead letters are those that had to die."""
        await self.clock.advance(100)
        for (partition, group), cursor in self.cursors.items():
            left = await self.broker.drain(self.queue, group=group, partition=partition)
            assert left == cursor.log[cursor.committed :]
            _, letters = await self.broker.engine.dead_letters(queue=self.queue, partition=partition, group=group)
            assert len(letters) == len(cursor.dead)


STEPS = ("push", "pop", "pop", "ack", "ack", "ack", "ack_all", "give_back", "extend", "pass_time")


@pytest.mark.timeout(600)  # a failure takes minutes to be made small
@given(data=st.data())
@settings(
    max_examples=25,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_the_engine_does_what_the_model_says(
    open_broker: OpenBroker, database_clock: DatabaseClock, data: st.DataObject
) -> None:
    async with open_broker() as broker:
        machine = Machine(broker, database_clock, data.draw)
        await broker.configure(machine.queue, lease_seconds=LEASE_SECONDS, retry_limit=machine.limit)
        for group in GROUPS:
            await broker.pop(machine.queue, group=group)
        for partition in PARTITIONS:
            await machine.store(partition, [f"first {at}" for at in range(4)])

        for step in data.draw(st.lists(st.sampled_from(STEPS), min_size=15, max_size=40)):
            await getattr(machine, step)()

        await machine.check_the_end()
