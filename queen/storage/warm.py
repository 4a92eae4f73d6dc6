"""What the first requests of a worker would pay for, paid before it has a socket.

A connection costs 3 ms, asyncpg's first look at the types of a statement 9, the first call of a function 5, on each
connection: a push to a worker that had just come up took 20 ms and not 2, and a few at once, which share the cores,
ten times that (F8 of tests/faults).
"""

from __future__ import annotations

from typing import Final

import structlog
import trio

from queen.errors import QueenError
from queen.storage import acks, claims, pushes, turnover
from queen.storage.bridge import Bridge
from queen.storage.connect import Connection

CONNECTIONS: Final = 4  # a push, an ack and two pops at once; others are opened when there is more to do
STATEMENTS: Final = (*pushes.HOT, *claims.HOT, *acks.HOT, *turnover.HOT)
WARM_SECONDS: Final = 2.0

log = structlog.get_logger("queen.storage")


async def warm(bridge: Bridge) -> None:
    """Open connections and run on each, for nothing, what every request runs."""
    with trio.move_on_after(WARM_SECONDS):
        async with trio.open_nursery() as nursery:
            for _ in range(min(CONNECTIONS, bridge.connections)):
                nursery.start_soon(_warm_one, bridge)


async def _warm_one(bridge: Bridge) -> None:
    try:
        await bridge.run(run_for_nothing, writes=False)
    except QueenError as error:  # the requests that come will say so
        log.warning("not warmed up", error=error.detail)


async def run_for_nothing(connection: Connection) -> None:
    """asyncio flavor. Each of the functions does something for every element of the arrays that it is given."""
    for sql in STATEMENTS:
        statement = await connection.prepare(sql)
        nothing = [_nothing(type_.kind, type_.name) for type_ in statement.get_parameters()]
        await connection.fetch(sql, *nothing)


def _nothing(kind: str, name: str) -> object:
    if kind == "array":
        return []
    return 0 if name == "int4" else None
