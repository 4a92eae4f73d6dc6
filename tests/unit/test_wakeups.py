"""Who waits for what: no hint is lost, none wakes more than it should, and timers wake in time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from queen.engine.wakeups import Topic, Wakeups, hint, hints_of
from queen.model.queue import QUEUE_MODE, Queue, QueueOptions


def queue_named(name: str, namespace: str = "", task: str = "") -> Queue:
    return Queue(queue_id=uuid4(), name=name, namespace=namespace, task=task, options=QueueOptions(), version=1)


class Waiter:
    """Pops that look, find nothing and park, and are woken for one look each."""

    def __init__(self, wakeups: Wakeups) -> None:
        self.wakeups = wakeups
        self.woken: list[str] = []

    async def park(self, name: str, topic: Topic) -> None:
        with self.wakeups.visit(topic) as lot:
            await lot.park()
            self.woken.append(name)


@pytest.fixture
def wakeups() -> Wakeups:
    return Wakeups()


@asynccontextmanager
async def parked(waiter: Waiter, *places: tuple[str, Topic]) -> AsyncIterator[None]:
    """Parked in that order; whoever is not woken is cancelled at the end."""
    async with trio.open_nursery() as pops:
        for name, topic in places:
            pops.start_soon(waiter.park, name, topic)
            await wait_all_tasks_blocked()
        assert waiter.wakeups.parked_count == len(places)
        yield
        await wait_all_tasks_blocked()
        pops.cancel_scope.cancel()
    assert waiter.wakeups.parked_count == 0


def at(queue: str = "q", partition: str | None = None, group: str = QUEUE_MODE) -> Topic:
    return Topic(group, queue, partition)


async def test_a_hint_wakes_as_many_as_it_has_news_for_first_come_first_served(wakeups: Wakeups) -> None:
    waiter = Waiter(wakeups)
    async with parked(waiter, *[(name, at()) for name in "abcd"]):
        assert wakeups.tell(hints_of(queue_named("q"), QUEUE_MODE), 2) == 2
        assert wakeups.parked_count == 2

    assert sorted(waiter.woken) == ["a", "b"]


async def test_early_news_wakes_one_of_each_topic_that_names_the_queue_and_is_no_news_yet(wakeups: Wakeups) -> None:
    early: list[str] = []

    async def park(name: str, topic: Topic) -> None:
        with wakeups.visit(topic) as lot:
            if await lot.park():
                early.append(name)
            assert lot.signals == 0

    places = [
        ("first", at()),
        ("second", at()),
        ("of a group", at(group="g")),
        ("the partition", at(partition="p")),
        ("another partition", at(partition="o")),
        ("another queue", at("r")),
        ("a label", Topic(QUEUE_MODE, namespace="n")),
    ]
    async with trio.open_nursery() as pops:
        for name, topic in places:
            pops.start_soon(park, name, topic)
            await wait_all_tasks_blocked()
        assert wakeups.tell_early("q", {"p"}) == 3
        assert wakeups.parked_count == 4
        await wait_all_tasks_blocked()
        pops.cancel_scope.cancel()

    assert sorted(early) == ["first", "of a group", "the partition"]


async def test_a_hint_reaches_its_queue_its_group_and_its_partition_alone(wakeups: Wakeups) -> None:
    waiter = Waiter(wakeups)
    places = [
        ("any partition", at()),
        ("the partition", at(partition="p")),
        ("another partition", at(partition="o")),
        ("another group", at(group="g")),
        ("another queue", at("r")),
        ("the namespace", Topic(QUEUE_MODE, namespace="n")),
        ("another namespace", Topic(QUEUE_MODE, namespace="m")),
        ("the task", Topic(QUEUE_MODE, task="t")),
        ("both labels", Topic(QUEUE_MODE, namespace="n", task="t")),
    ]
    async with parked(waiter, *places):
        assert wakeups.tell(hints_of(queue_named("q", "n", "t"), QUEUE_MODE), 1, "p") == 5

    assert sorted(waiter.woken) == ["any partition", "both labels", "the namespace", "the partition", "the task"]


async def test_the_birth_of_a_queue_reaches_every_group(wakeups: Wakeups) -> None:
    waiter = Waiter(wakeups)
    async with parked(waiter, ("a", at()), ("b", at(group="g")), ("c", at(partition="p", group="h")), ("d", at("r"))):
        wakeups.tell(hints_of(queue_named("q"), ""), 100)

    assert sorted(waiter.woken) == ["a", "b", "c"]


async def test_a_hint_that_finds_nobody_says_so(wakeups: Wakeups) -> None:
    assert wakeups.tell(hints_of(queue_named("q"), QUEUE_MODE), 1) == 0
    with wakeups.visit(at()) as lot:
        assert wakeups.tell(hints_of(queue_named("q"), QUEUE_MODE), 1) == 0
        assert lot.signals == 1, "whoever is just looking has to look again"


async def test_whoever_looks_for_it_is_known_until_he_leaves(wakeups: Wakeups) -> None:
    news = hints_of(queue_named("q"), QUEUE_MODE)
    assert not wakeups.is_looking(news, "a")
    with wakeups.visit(at(partition="b")):
        assert not wakeups.is_looking(news, "a")
        with wakeups.visit(at()):
            assert wakeups.is_looking(news, "a")
    assert not wakeups.is_looking(news, "b")


async def test_a_hint_between_look_and_park_is_not_lost(wakeups: Wakeups) -> None:
    """The pop notes the count before it looks, and parks only if it has not moved."""
    looks = 0

    async def pop() -> None:
        nonlocal looks
        with wakeups.visit(at()) as lot:
            while True:
                seen = lot.signals
                looks += 1
                if looks == 1:
                    wakeups.tell(hints_of(queue_named("q"), QUEUE_MODE), 1)  # while it looks
                if lot.signals != seen:
                    continue
                await lot.park()

    async with trio.open_nursery() as pops:
        pops.start_soon(pop)
        await wait_all_tasks_blocked()
        assert looks == 2
        pops.cancel_scope.cancel()


async def test_a_cancelled_waiter_passes_its_wake_up_to_the_next(wakeups: Wakeups) -> None:
    waiter = Waiter(wakeups)
    impatience = trio.CancelScope()

    async def impatient() -> None:
        with impatience:
            await waiter.park("impatient", at())

    async with trio.open_nursery() as pops:
        pops.start_soon(impatient)
        await wait_all_tasks_blocked()
        pops.start_soon(waiter.park, "patient", at())
        await wait_all_tasks_blocked()
        impatience.cancel()
        wakeups.tell(hints_of(queue_named("q"), QUEUE_MODE), 1)  # before the cancelled one has run
        await wait_all_tasks_blocked()
        pops.cancel_scope.cancel()

    assert waiter.woken == ["patient"]


async def test_a_waiter_cancelled_before_any_news_leaves_no_trace(wakeups: Wakeups) -> None:
    waiter = Waiter(wakeups)
    with trio.move_on_after(0):
        await waiter.park("a", at())

    assert waiter.woken == []
    assert wakeups.parked_count == 0
    assert wakeups.tell([hint("queue", "q", QUEUE_MODE)], 1) == 0
    assert not wakeups.parked()


async def test_everybody_is_told_when_anything_may_have_happened(wakeups: Wakeups) -> None:
    waiter = Waiter(wakeups)
    async with parked(waiter, ("a", at()), ("b", at()), ("c", at("r", "p", "g")), ("d", Topic("g", task="t"))):
        wakeups.tell_all()

    assert sorted(waiter.woken) == ["a", "b", "c", "d"]


async def test_those_parked_are_named_for_the_sweep(wakeups: Wakeups) -> None:
    waiter = Waiter(wakeups)
    async with parked(waiter, ("a", at()), ("b", at()), ("c", at(partition="p"))):
        with wakeups.visit(at("looking")):
            assert {lot.topic for lot in wakeups.parked()} == {at(), at(partition="p")}


# -- timers -------------------------------------------------------------------------------------------------------


class Log:
    """When whom."""

    def __init__(self) -> None:
        self.entries: list[tuple[float, str]] = []

    async def pop(self, wakeups: Wakeups, name: str, topic: Topic, seconds: float | None) -> None:
        with wakeups.visit(topic) as lot:
            if seconds is not None:
                wakeups.set_timer(lot, seconds)
            await lot.park()
            self.entries.append((trio.current_time(), name))


async def test_a_timer_wakes_its_lot_when_it_is_due_and_no_other(wakeups: Wakeups, autojump_clock: MockClock) -> None:
    log = Log()
    async with trio.open_nursery() as tasks:
        tasks.start_soon(wakeups.run_timers)
        with trio.move_on_after(100):
            async with trio.open_nursery() as pops:
                for name, seconds in (("late", 30.0), ("early", 5.0), ("middle", 10.0), ("never", None)):
                    pops.start_soon(log.pop, wakeups, name, at(name), seconds)
        tasks.cancel_scope.cancel()

    assert log.entries == [(5.0, "early"), (10.0, "middle"), (30.0, "late")]


async def test_the_earliest_timer_of_a_lot_counts_and_wakes_one(wakeups: Wakeups, autojump_clock: MockClock) -> None:
    log = Log()
    async with trio.open_nursery() as tasks:
        tasks.start_soon(wakeups.run_timers)
        with trio.move_on_after(100):
            async with trio.open_nursery() as pops:
                for name, seconds in (("a", 20.0), ("b", 7.0), ("c", 50.0)):
                    pops.start_soon(log.pop, wakeups, name, at(), seconds)
                    await wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()

    assert log.entries == [(7.0, "a")], "whoever is woken looks, and sets the next timer itself"


async def test_news_for_later_is_a_timer_of_those_it_concerns(wakeups: Wakeups, autojump_clock: MockClock) -> None:
    log = Log()
    async with trio.open_nursery() as tasks:
        tasks.start_soon(wakeups.run_timers)
        with trio.move_on_after(100):
            async with trio.open_nursery() as pops:
                for name, topic in (("p", at(partition="p")), ("o", at(partition="o")), ("any", at())):
                    pops.start_soon(log.pop, wakeups, name, topic, None)
                await wait_all_tasks_blocked()
                wakeups.tell_at(hints_of(queue_named("q"), QUEUE_MODE), 12.0, "p")
        tasks.cancel_scope.cancel()

    assert sorted(log.entries) == [(12.0, "any"), (12.0, "p")]


async def test_a_timer_outlives_those_who_set_it_without_harm(wakeups: Wakeups, autojump_clock: MockClock) -> None:
    log = Log()
    async with trio.open_nursery() as tasks:
        tasks.start_soon(wakeups.run_timers)
        with trio.move_on_after(1):
            await log.pop(wakeups, "gone", at(), 5.0)
        with trio.move_on_after(100):
            await log.pop(wakeups, "next", at(), 20.0)
        tasks.cancel_scope.cancel()

    # a spurious wake-up by the timer of one who left is allowed, a late one is not
    assert len(log.entries) == 1
    assert log.entries[0][0] in (5.0, 21.0)


def test_hints_differ_by_kind_name_and_group_and_are_short() -> None:
    hints = {hint(*each) for each in (("queue", "a", "b"), ("task", "a", "b"), ("queue", "b", "a"), ("queue", "a", ""))}

    assert len(hints) == 4
    assert all(len(text) == 16 and "," not in text for text in hints)
    assert hint("queue", "x" * 10_000, "☃") == hint("queue", "x" * 10_000, "☃")
