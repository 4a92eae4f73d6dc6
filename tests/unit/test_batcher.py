"""The batcher: who is written together, and by how many writers. No database."""

from __future__ import annotations

from collections.abc import Sequence

import trio
from trio.testing import wait_all_tasks_blocked

from queen.engine.batcher import Batcher


class Writes:
    """Writes that stay in flight until they are let go."""

    def __init__(self) -> None:
        self.begun: list[list[int]] = []
        self.let_go = trio.Event()

    async def write(self, items: Sequence[int]) -> list[int]:
        self.begun.append(list(items))
        await self.let_go.wait()
        return [item * 10 for item in items]


def batcher_of(writes: Writes, writers: int) -> Batcher[int, int]:
    return Batcher("test", writes.write, writers=writers, max_weight=100, max_waiting=100)


async def test_what_arrives_while_a_write_is_in_flight_is_the_next_write(nursery: trio.Nursery) -> None:
    writes = Writes()
    batcher = batcher_of(writes, writers=1)
    await nursery.start(batcher.run)
    results: dict[int, int] = {}

    async def submit(item: int) -> None:
        results[item] = await batcher.submit(item)

    async with trio.open_nursery() as callers:
        for item in (1, 2, 3):
            callers.start_soon(submit, item)
            await wait_all_tasks_blocked()
        assert writes.begun == [[1]]
        writes.let_go.set()

    assert writes.begun == [[1], [2, 3]]
    assert results == {1: 10, 2: 20, 3: 30}


async def test_every_idle_writer_hears_of_an_arrival(nursery: trio.Nursery) -> None:
    writes = Writes()
    batcher = batcher_of(writes, writers=2)
    await nursery.start(batcher.run)
    await wait_all_tasks_blocked()  # both writers are idle

    async with trio.open_nursery() as callers:
        for item in (1, 2):
            callers.start_soon(batcher.submit, item)
            await wait_all_tasks_blocked()
        assert writes.begun == [[1], [2]]
        writes.let_go.set()
