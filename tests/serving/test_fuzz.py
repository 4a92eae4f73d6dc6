"""A slice of the fuzz, of a fixed seed, on either way of serving. All of it: nox -s fuzz."""

from __future__ import annotations

import trio

from tests.fuzz.cases import Case, cases
from tests.fuzz.client import Tally, send

from .conftest import Standing

CASES = 400


async def test_broken_requests_are_answered_and_break_nothing(standing: Standing) -> None:
    tally = Tally()
    at_once = trio.CapacityLimiter(32)

    async def send_one(case: Case) -> None:
        async with at_once:
            await send(standing.server.port, case, tally)

    async with trio.open_nursery() as senders:
        for case in cases(7, CASES):
            senders.start_soon(send_one, case)

    assert tally.findings == []
    assert sum(tally.statuses.values()) >= CASES
    async with await standing.server.connect() as client:
        assert await client.is_open()
