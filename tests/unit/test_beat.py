"""What is due again and again is due together."""

from __future__ import annotations

from itertools import pairwise

import trio
from trio.testing import MockClock

from queen.beat import next_beat


async def test_paces_that_are_multiples_of_one_another_fall_together(autojump_clock: MockClock) -> None:
    moments: dict[float, list[float]] = {}

    async def loop(seconds: float, offset: float) -> None:
        await trio.sleep(offset)
        for _ in range(20):
            await trio.sleep_until(next_beat(seconds))
            moments.setdefault(seconds, []).append(trio.current_time())

    async with trio.open_nursery() as loops:
        for seconds, offset in ((0.25, 0.1), (0.5, 0.7), (1.0, 0.0), (0.75, 0.2)):
            loops.start_soon(loop, seconds, offset)

    beats = {round(moment * 4) for moment in moments[0.25]}
    for seconds, times in moments.items():
        assert all(later - earlier == seconds for earlier, later in pairwise(times))
        assert {round(moment * 4) for moment in times if moment <= moments[0.25][-1]} <= beats


async def test_a_beat_is_always_to_come(autojump_clock: MockClock) -> None:
    await trio.sleep(2)
    assert next_beat(0.5) == trio.current_time() + 0.5
