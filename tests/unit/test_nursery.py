"""Keeping children running, by the rules and in virtual time: no process, no socket, no waiting."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from queen.supervision.nursery import TICK_SECONDS, Life, Place, RestartPolicy, Restarts, Vigil

POLICY = RestartPolicy(jitter=0.0)


class Child(Life):
    """A child that does what a test tells it."""

    def __init__(self, name: str = "", boot_seconds: float = 0.0, drain_seconds: float = 0.0) -> None:
        super().__init__()
        self.name = name
        self.die = trio.Event()
        self._boot_seconds = boot_seconds
        self._drain_seconds = drain_seconds

    async def live(self) -> str:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._boot)
            nursery.start_soon(self._drain)
            await self.die.wait()
            nursery.cancel_scope.cancel()
        return "died"

    async def _boot(self) -> None:
        await trio.sleep(self._boot_seconds)
        self.note_ready()

    async def _drain(self) -> None:
        await self.draining.wait()
        await trio.sleep(self._drain_seconds)
        self.die.set()


class Kindergarten:
    """A place and the children it has made."""

    def __init__(self, lives: trio.Nursery, make: Callable[[], Child], policy: RestartPolicy) -> None:
        self.children: list[Child] = []
        self.deaths: list[tuple[str, float]] = []
        self._make = make
        self.place = Place(lives, self._made, policy, after_death=self._note_death, draw=lambda: 0.0)

    def _made(self) -> Child:
        self.children.append(self._make())
        return self.children[-1]

    def _note_death(self, child: Child, wait_seconds: float) -> None:
        self.deaths.append((child.how, wait_seconds))


@asynccontextmanager
async def open_place(make: Callable[[], Child] = Child, policy: RestartPolicy = POLICY) -> AsyncIterator[Kindergarten]:
    async with trio.open_nursery() as lives, trio.open_nursery() as places:
        garden = Kindergarten(lives, make, policy)
        places.start_soon(garden.place.run)
        await trio.testing.wait_all_tasks_blocked()
        yield garden
        garden.place.close(0.0)


# -- when a child is started again -----------------------------------------------------------------------------------


def waits(restarts: Restarts, times: int, served_seconds: float = 0.0, boot_seconds: float = 0.0) -> list[float]:
    """What it says to deaths that follow each other as fast as it lets them."""
    now, said = 0.0, []
    for _ in range(times):
        said.append(restarts.after_death(now, served_seconds))
        now += said[-1] + boot_seconds
    return said


def test_a_child_that_dies_is_started_again_at_once_then_later_and_later_then_now_and_then() -> None:
    assert waits(Restarts(POLICY), 8) == [0.0, 1.0, 2.0, 4.0, 8.0, 60.0, 60.0, 60.0]


def test_no_minute_sees_more_restarts_than_are_allowed() -> None:
    now, restarts, at = 0.0, Restarts(POLICY), []
    for _ in range(50):
        now += restarts.after_death(now, 0.0)
        at.append(now)

    assert max(sum(start <= other < start + POLICY.window_seconds for other in at) for start in at) == 5


def test_without_a_limit_the_wait_grows_to_its_largest_and_stays_there() -> None:
    restarts = Restarts(RestartPolicy(jitter=0.0, max_restarts=float("inf")))

    assert waits(restarts, 2000)[:7] == [0.0, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert restarts.parked is False


def test_jitter_makes_a_wait_longer_and_never_longer_than_the_largest() -> None:
    restarts = Restarts(RestartPolicy(max_restarts=float("inf")), draw=lambda: 1.0)

    assert waits(restarts, 6) == [0.0, 1.25, 2.5, 5.0, 10.0, 10.0]


def test_a_child_that_has_served_for_a_while_is_started_again_at_once() -> None:
    restarts = Restarts(POLICY)
    waits(restarts, 6)
    assert restarts.parked

    assert restarts.after_death(1000.0, POLICY.served_seconds) == 0.0
    assert not restarts.parked
    assert restarts.after_death(1000.0, 0.0) == 1.0


def test_children_that_serve_for_a_while_may_die_as_often_as_they_like() -> None:
    assert waits(Restarts(POLICY), 100, served_seconds=3.0, boot_seconds=3.0) == [0.0] * 100


def test_deaths_far_apart_do_not_add_up() -> None:
    assert max(waits(Restarts(POLICY), 100, boot_seconds=20.0)) == POLICY.max_wait_seconds


async def test_a_crash_loop_parks_the_place_and_an_operator_can_have_it_tried_now(
    autojump_clock: trio.testing.MockClock,
) -> None:
    def stillborn() -> Child:
        child = Child(boot_seconds=1.0)
        child.die.set()
        return child

    async with open_place(stillborn) as garden:
        await trio.sleep(16.0)
        assert [wait for _, wait in garden.deaths] == [0.0, 1.0, 2.0, 4.0, 8.0, 60.0]
        assert garden.place.state == "parked"

        assert await garden.place.replace(0.0, 1.0) == ""
        await trio.testing.wait_all_tasks_blocked()

        assert len(garden.deaths) == 7


async def test_a_place_is_failing_from_a_second_death_in_a_row_on_also_while_the_next_child_boots(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_place(lambda: Child(boot_seconds=10.0)) as garden:
        assert not garden.place.is_failing
        for expected in (False, True):
            garden.children[-1].die.set()
            await trio.sleep(2.0)  # past the wait, and not as long as a child takes to boot
            assert garden.place.state == "booting"
            assert garden.place.is_failing is expected

        await trio.sleep(9.5)
        assert garden.place.state == "serving"
        assert not garden.place.is_failing


async def test_a_place_that_is_parked_serves_when_a_child_comes_up_after_all(
    autojump_clock: trio.testing.MockClock,
) -> None:
    fault = True

    def frail() -> Child:
        child = Child(boot_seconds=1.0)
        if fault:
            child.die.set()
        return child

    async with open_place(frail) as garden:
        await trio.sleep(16.0)
        fault = False
        await trio.sleep(62.0)

        assert garden.place.state == "serving"


# -- replacing -------------------------------------------------------------------------------------------------------


async def test_a_successor_is_ready_before_its_predecessor_drains(autojump_clock: trio.testing.MockClock) -> None:
    async with open_place(lambda: Child(boot_seconds=3.0, drain_seconds=5.0)) as garden:
        await trio.sleep(4.0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(garden.place.replace, 10.0, 10.0)
            await trio.sleep(2.9)
            old, new = garden.children
            assert garden.place.present is old
            assert not old.draining.is_set()
        assert new.ready.is_set()
        assert old.draining.is_set()
        assert garden.place.present is new
        assert garden.place.state == "serving"
        assert garden.place.predecessors == [old]
        await trio.sleep(6.0)
        assert old.ended.is_set()
        assert garden.place.predecessors == []
    assert (garden.deaths, garden.place.restarts) == ([], 0)


async def test_a_predecessor_that_does_not_finish_is_ended_at_its_deadline(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_place(lambda: Child(drain_seconds=1000.0)) as garden:
        assert await garden.place.replace(7.0, 10.0) == ""
        began_at = trio.current_time()
        await garden.children[0].ended.wait()

        assert trio.current_time() - began_at == pytest.approx(7.0)
        assert garden.children[0].how == "was ended at its deadline"


async def test_where_the_successor_dies_the_old_child_stays(autojump_clock: trio.testing.MockClock) -> None:
    async with open_place() as garden:
        (old,) = garden.children

        def stillborn() -> Child:
            child = Child(boot_seconds=1.0)
            child.die.set()
            return child

        garden._make = stillborn
        assert await garden.place.replace(10.0, 10.0) == "died"

        assert garden.place.present is old
        assert not old.draining.is_set()
        assert (garden.deaths, garden.place.restarts) == ([], 0)


async def test_a_successor_that_is_not_ready_in_time_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    async with open_place() as garden:
        (old,) = garden.children
        garden._make = lambda: Child(boot_seconds=1000.0)

        assert await garden.place.replace(10.0, 30.0) == "was not ready after 30 s"

        assert garden.place.present is old
        assert garden.children[1].ended.is_set()


async def test_a_successor_stands_in_for_a_child_that_dies_before_it_is_ready(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_place(lambda: Child(boot_seconds=3.0)) as garden:
        await trio.sleep(4.0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(garden.place.replace, 10.0, 10.0)
            await trio.sleep(1.0)
            garden.children[0].die.set()

        assert len(garden.children) == 2
        assert garden.place.present is garden.children[1]
        assert garden.place.state == "serving"


async def test_one_replacement_at_a_time(autojump_clock: trio.testing.MockClock) -> None:
    async with open_place(lambda: Child(boot_seconds=3.0)) as garden:
        await trio.sleep(4.0)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(garden.place.replace, 10.0, 10.0)
            await trio.sleep(2.0)
            assert len(garden.children) == 2

        assert len(garden.children) == 4
        assert garden.place.present is garden.children[3]


# -- the spare -------------------------------------------------------------------------------------------------------


async def test_a_spare_takes_over_at_once_and_another_is_made(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as lives, trio.open_nursery() as places:
        spares = Kindergarten(lives, lambda: Child("spare", boot_seconds=3.0), POLICY)
        slot = Kindergarten(lives, lambda: spares.place.take() or Child("plain", boot_seconds=3.0), POLICY)
        places.start_soon(slot.place.run)
        await trio.sleep(4.0)
        places.start_soon(spares.place.run)
        await trio.sleep(4.0)

        slot.children[0].die.set()
        await trio.testing.wait_all_tasks_blocked()

        assert [child.name for child in slot.children] == ["plain", "spare"]
        assert slot.place.state == "serving"
        assert len(spares.children) == 2
        assert spares.place.state == "booting"

        await trio.sleep(2.0)
        slot.children[1].die.set()
        await trio.sleep(1.5)  # it takes three for one that has only just been started
        assert [child.name for child in slot.children] == ["plain", "spare", "spare"]
        assert slot.place.state == "serving"
        await trio.sleep(4.0)
        assert spares.children[-1].ready.is_set()
        assert spares.deaths == []
        slot.place.close(0.0)
        spares.place.close(0.0)


async def test_the_next_spare_boots_when_the_one_taken_has_come_up_and_nobody_waits_for_that(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as lives, trio.open_nursery() as places:
        spares = Kindergarten(lives, lambda: Child("spare", boot_seconds=3.0), POLICY)
        places.start_soon(spares.place.run)
        await trio.sleep(1.0)

        taken = spares.place.take()
        assert taken is spares.children[0]
        assert spares.place.take() is None  # one that has not begun is no help: whoever needs one starts it
        await trio.sleep(4.5)  # two to go for the first, and three for the next
        assert taken.ready.is_set()
        assert not spares.children[1].ready.is_set()
        await trio.sleep(1.0)
        assert spares.children[1].ready.is_set()
        assert spares.children[1].begun_at == 3.0

        assert spares.place.take() is spares.children[1]
        spares.children[1].die.set()
        await trio.sleep(3.5)
        assert spares.children[2].ready.is_set()
        spares.place.close(0.0)
        taken.die.set()


async def test_a_spare_that_drains_or_has_died_is_not_taken(autojump_clock: trio.testing.MockClock) -> None:
    async with open_place(lambda: Child(drain_seconds=5.0)) as garden:
        garden.children[0].drain(10.0)
        assert garden.place.take() is None


# -- draining --------------------------------------------------------------------------------------------------------


async def test_closing_drains_all_and_waits_for_the_last(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as lives:
        garden = Kindergarten(lives, lambda: Child(drain_seconds=5.0), POLICY)
        async with trio.open_nursery() as places:
            places.start_soon(garden.place.run)
            await trio.testing.wait_all_tasks_blocked()
            garden.place.close(20.0)
            began_at = trio.current_time()
            assert garden.place.state == "draining"
        assert trio.current_time() - began_at == pytest.approx(5.0)
    assert len(garden.children) == 1
    assert garden.deaths == []


async def test_a_close_during_a_wait_starts_nothing_more(autojump_clock: trio.testing.MockClock) -> None:
    def stillborn() -> Child:
        child = Child(boot_seconds=1.0)
        child.die.set()
        return child

    async with open_place(stillborn) as garden:
        await trio.sleep(2.0)
        made = len(garden.children)
    assert len(garden.children) == made


async def test_a_second_drain_can_only_be_shorter(autojump_clock: trio.testing.MockClock) -> None:
    async with open_place(lambda: Child(drain_seconds=1000.0)) as garden:
        began_at = trio.current_time()
        garden.place.close(20.0)
        garden.place.close(50.0)
        await trio.sleep(1.0)
        garden.place.close(2.0)
        await garden.children[0].ended.wait()

        assert trio.current_time() - began_at == pytest.approx(3.0)


# -- who is silent ---------------------------------------------------------------------------------------------------


async def test_a_child_that_falls_silent_is_found_once_and_one_that_beats_is_not(
    autojump_clock: trio.testing.MockClock,
) -> None:
    silent: list[Child] = []
    steady, hung = Child("steady"), Child("hung")
    steady.note_sign_of_life()
    hung.note_sign_of_life()
    unborn = Child("unborn")  # has never given a sign

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Vigil(10.0, 60.0).run, lambda: [steady, hung, unborn], silent.append)
        for _ in range(9):
            await trio.sleep(1.0)
            steady.note_sign_of_life()
        assert silent == []
        for _ in range(30):
            await trio.sleep(1.0)
            steady.note_sign_of_life()
        assert silent == [hung]
        for _ in range(30):
            await trio.sleep(1.0)
            steady.note_sign_of_life()
        nursery.cancel_scope.cancel()

    assert silent == [hung, unborn]


async def test_a_child_that_beats_late_and_rarely_is_busy_and_not_hung(autojump_clock: trio.testing.MockClock) -> None:
    silent: list[Child] = []
    child = Child()
    child.note_sign_of_life()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Vigil(10.0).run, lambda: [child], silent.append)
        for _ in range(20):
            await trio.sleep(9.0)
            child.note_sign_of_life()
        nursery.cancel_scope.cancel()

    assert silent == []


async def test_time_in_which_we_could_not_hear_does_not_count() -> None:
    clock = trio.testing.MockClock()
    silent: list[Child] = []

    async def main() -> None:
        child = Child()
        child.note_sign_of_life()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Vigil(10.0).run, lambda: [child], silent.append)
            await trio.testing.wait_all_tasks_blocked()
            clock.jump(30.0)  # stopped, and continued: heartbeats wait unread
            await trio.testing.wait_all_tasks_blocked()
            assert silent == []
            child.note_sign_of_life()
            for _ in range(int(10.0 / TICK_SECONDS)):
                clock.jump(TICK_SECONDS)
                await trio.testing.wait_all_tasks_blocked()
            assert silent == []
            clock.jump(TICK_SECONDS)
            await trio.testing.wait_all_tasks_blocked()
            assert silent == [child]
            nursery.cancel_scope.cancel()

    # a run of its own, with a clock that only the test moves
    await trio.to_thread.run_sync(lambda: trio.run(main, clock=clock))
