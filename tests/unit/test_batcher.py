"""The batcher: who arrives while a write is in flight makes up the next one, and nobody pays for a neighbour."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from random import Random

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from queen.engine.batcher import Batcher
from queen.errors import Overloaded, StorageUnavailable


class Writes:
    """Writes that take a second each and remember what they were given. What is poisonous fails its whole write."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.error: Exception | None = None

    async def __call__(self, items: Sequence[str]) -> list[str]:
        self.batches.append(list(items))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await trio.sleep(1)
        finally:
            self.in_flight -= 1
        if self.error is not None:
            raise self.error
        if any(item.startswith("poison") for item in items):
            raise ValueError(f"cannot write {items}")
        return [item.upper() for item in items]


@pytest.fixture
def writes() -> Writes:
    return Writes()


@asynccontextmanager
async def running(batcher: Batcher[str, str]) -> AsyncIterator[None]:
    async with trio.open_nursery() as tasks:
        await tasks.start(batcher.run)
        yield
        tasks.cancel_scope.cancel()


def batcher_of(
    writes: Writes,
    *,
    most_writers: int = 1,
    max_weight: int = 100,
    max_waiting: int = 100,
    left: list[tuple[str, str]] | None = None,
) -> Batcher[str, str]:
    return Batcher(
        "test",
        writes,
        most_writers=most_writers,
        max_weight=max_weight,
        max_waiting=max_waiting,
        abandoned=None if left is None else lambda item, result: left.append((item, result)),
    )


async def submit_all(batcher: Batcher[str, str], items: Sequence[str], weight: int = 1) -> dict[str, object]:
    """The result or error of each, submitted in order."""
    outcomes: dict[str, object] = {}

    async def submit(item: str) -> None:
        try:
            outcomes[item] = await batcher.submit(item, weight)
        except (ValueError, Overloaded, StorageUnavailable) as error:
            outcomes[item] = error

    async with trio.open_nursery() as callers:
        for item in items:
            callers.start_soon(submit, item)
            await wait_all_tasks_blocked()
    return outcomes


async def test_an_idle_batcher_writes_the_first_at_once_and_folds_the_rest(
    writes: Writes, autojump_clock: MockClock
) -> None:
    batcher = batcher_of(writes)
    async with running(batcher):
        outcomes = await submit_all(batcher, list("abcde"))

    assert writes.batches == [["a"], ["b", "c", "d", "e"]]
    assert outcomes == {item: item.upper() for item in "abcde"}
    assert trio.current_time() == 2.0
    assert (batcher.tally().waiting, batcher.tally().requests, batcher.tally().writes) == (0, 5, 2)


async def crowd(batcher: Batcher[str, str], clients: int, rounds: int, think_seconds: float, weight: int = 1) -> None:
    """Clients that ask, are answered, think and ask again."""

    async def client(number: int) -> None:
        for turn in range(rounds):
            await batcher.submit(f"{number} {turn}", weight)
            await trio.sleep(think_seconds)

    async with trio.open_nursery() as clients_:
        for number in range(clients):
            clients_.start_soon(client, number)


async def test_a_crowd_that_returns_at_once_is_written_together(writes: Writes, autojump_clock: MockClock) -> None:
    """Without a pause it falls into two halves, each in the other's way, for ever."""
    batcher = batcher_of(writes)
    async with running(batcher):
        await crowd(batcher, 20, 30, 0.1)

    assert {len(batch) for batch in writes.batches[10:]} == {20}
    assert trio.current_time() < 30 * 1.2 + 5


async def test_a_crowd_that_returns_late_is_not_waited_for(writes: Writes, autojump_clock: MockClock) -> None:
    batcher = batcher_of(writes)
    async with running(batcher), trio.open_nursery() as crowds:
        for think_seconds in (0.6, 0.7, 0.8, 0.9):
            crowds.start_soon(crowd, batcher, 5, 30, think_seconds)

    busy = batcher.tally().busy_seconds
    assert trio.current_time() - busy < 3  # it stood still for some first moments only


async def test_nobody_waits_for_a_client_that_is_alone(writes: Writes, autojump_clock: MockClock) -> None:
    batcher = batcher_of(writes)
    async with running(batcher):
        await crowd(batcher, 1, 50, 0.1)

    assert trio.current_time() == pytest.approx(50 * 1.1)


async def test_the_first_after_a_silence_is_written_at_once(writes: Writes, autojump_clock: MockClock) -> None:
    batcher = batcher_of(writes)
    async with running(batcher):
        await crowd(batcher, 20, 30, 0.1)
        await trio.sleep(10)
        started = trio.current_time()
        await batcher.submit("late")

    assert trio.current_time() - started == 1.0


async def test_requests_that_come_whenever_they_like_are_not_put_off(writes: Writes, autojump_clock: MockClock) -> None:
    batcher = batcher_of(writes)
    random = Random(1)
    waited: list[float] = []

    async def request(number: int) -> None:
        started = trio.current_time()
        await batcher.submit(f"{number}")
        waited.append(trio.current_time() - started)

    async with running(batcher), trio.open_nursery() as requests:
        for number in range(2000):
            requests.start_soon(request, number)
            await trio.sleep(random.expovariate(10))

    assert max(waited) < 2.6  # the write under way, a moment, its own write
    assert sum(waited) / len(waited) < 1.7


async def test_where_writes_mostly_wait_there_are_more_of_them(writes: Writes, autojump_clock: MockClock) -> None:
    batcher = batcher_of(writes, most_writers=4, max_weight=5)
    async with running(batcher):
        await crowd(batcher, 40, 60, 0.01)

    assert writes.most_in_flight == 4


async def test_where_writes_take_turns_anyway_there_is_one(writes: Writes, autojump_clock: MockClock) -> None:
    turn = trio.Lock()

    async def write(items: Sequence[str]) -> list[str]:
        async with turn:
            return await writes(items)

    batcher = Batcher("test", write, most_writers=4, max_weight=5, max_waiting=100)
    async with running(batcher):
        await crowd(batcher, 40, 60, 0.01)

    concurrent = batcher.tally().busy_seconds / trio.current_time()
    assert concurrent < 1.3


async def test_a_write_holds_no_more_than_its_weight_but_at_least_one(
    writes: Writes, autojump_clock: MockClock
) -> None:
    batcher = batcher_of(writes, max_weight=10)
    async with running(batcher):
        await submit_all(batcher, list("abcdefg"), weight=4)
        await submit_all(batcher, list("xy"), weight=400)

    assert writes.batches == [["a"], ["b", "c"], ["d", "e"], ["f", "g"], ["x"], ["y"]]


async def test_one_poisoned_request_does_not_fail_its_neighbours(writes: Writes, autojump_clock: MockClock) -> None:
    batcher = batcher_of(writes)
    async with running(batcher):
        outcomes = await submit_all(batcher, ["first", "a", "poison", "b"])

    assert writes.batches == [["first"], ["a", "poison", "b"], ["a"], ["poison"], ["b"]]
    assert isinstance(outcomes.pop("poison"), ValueError)
    assert outcomes == {"first": "FIRST", "a": "A", "b": "B"}


async def test_an_outage_is_told_to_all_at_once_and_ends_with_itself(writes: Writes, autojump_clock: MockClock) -> None:
    """Writing one by one what cannot be written at all would only make the outage longer."""
    batcher = batcher_of(writes)
    writes.error = StorageUnavailable("away")
    async with running(batcher):
        outcomes = await submit_all(batcher, list("abc"))
        writes.error = None
        again = await submit_all(batcher, ["d"])

    assert [type(outcome) for outcome in outcomes.values()] == [StorageUnavailable] * 3
    assert writes.batches == [["a"], ["b", "c"], ["d"]]
    assert again == {"d": "D"}


async def test_a_caller_that_leaves_before_its_write_began_is_not_written(
    writes: Writes, autojump_clock: MockClock
) -> None:
    left: list[tuple[str, str]] = []
    batcher = batcher_of(writes, left=left)
    async with running(batcher), trio.open_nursery() as callers:
        callers.start_soon(batcher.submit, "a")
        await wait_all_tasks_blocked()
        with trio.move_on_after(0.5):
            await batcher.submit("impatient")
        callers.start_soon(batcher.submit, "b")

    assert writes.batches == [["a"], ["b"]]
    assert left == []


async def test_a_caller_that_leaves_during_its_write_loses_its_answer_and_not_the_batch(
    writes: Writes, autojump_clock: MockClock
) -> None:
    left: list[tuple[str, str]] = []
    batcher = batcher_of(writes, left=left)
    async with running(batcher), trio.open_nursery() as callers:
        callers.start_soon(batcher.submit, "a")
        await wait_all_tasks_blocked()
        callers.start_soon(batcher.submit, "b")
        await wait_all_tasks_blocked()
        with trio.move_on_after(1.5):
            await batcher.submit("impatient")
        assert left == []
        assert await batcher.submit("c") == "C"

    assert writes.batches == [["a"], ["b", "impatient"], ["c"]]
    assert left == [("impatient", "IMPATIENT")]


async def test_a_caller_that_leaves_in_the_moment_of_its_answer_is_told_as_abandoned(
    writes: Writes, autojump_clock: MockClock
) -> None:
    left: list[tuple[str, str]] = []
    batcher = batcher_of(writes, left=left)
    answered: list[str] = []

    async def submit(scope: trio.CancelScope) -> None:
        with scope:
            answered.append(await batcher.submit("a"))

    async with running(batcher):
        scope = trio.CancelScope(deadline=trio.current_time() + 1.0)  # exactly when the write ends
        await submit(scope)
        await wait_all_tasks_blocked()

    assert (answered, left) in ((["A"], []), ([], [("a", "A")]))
    assert writes.batches == [["a"]]


async def test_an_error_has_nobody_to_tell_when_its_caller_has_left(writes: Writes, autojump_clock: MockClock) -> None:
    left: list[tuple[str, str]] = []
    batcher = batcher_of(writes, left=left)
    async with running(batcher):
        with trio.move_on_after(0.5):
            await batcher.submit("poison")
        assert await batcher.submit("a") == "A"

    assert left == []


async def test_past_its_bound_it_refuses_at_once(writes: Writes, autojump_clock: MockClock) -> None:
    batcher = batcher_of(writes, max_waiting=2)
    async with running(batcher):
        outcomes = await submit_all(batcher, list("abcd"))
        later = await submit_all(batcher, ["e"])

    assert isinstance(outcomes.pop("d"), Overloaded)
    assert outcomes == {item: item.upper() for item in "abc"}
    assert later == {"e": "E"}
    assert writes.batches == [["a"], ["b", "c"], ["e"]]
