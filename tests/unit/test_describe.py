"""Putting together what a worker is doing from what its parts have recorded: who waits for whom."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio.testing

from queen.cli.show import describe as in_a_line
from queen.cli.show import draw
from queen.control import MAX_LINE_BYTES, Description, encode
from queen.engine.wakeups import Lot, Topic
from queen.model.tree import Branch
from queen.observability.doing import Backend, BatchWrite, ConnectionRecord, DatabaseJob
from queen.serving.describe import MAX_SHOWN, Picture

Task = trio.lowlevel.Task


@asynccontextmanager
async def tasks(count: int) -> AsyncIterator[list[Task]]:
    """So many tasks that wait for nothing."""
    found: list[Task] = []

    async def wait() -> None:
        found.append(trio.lowlevel.current_task())
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        yield found
        nursery.cancel_scope.cancel()


def connection(
    task: Task | None, *, waits: str = "", seconds: float = 1.0, request: str = "POST /push"
) -> ConnectionRecord:
    return ConnectionRecord(lambda: "10.0.0.1:5", task, request, seconds, waits, seconds)


def backend(pid: int, *blocked_by: int) -> Backend:
    return Backend(pid, "active", "Lock tuple", "SELECT 1", 0.25, blocked_by)


async def test_a_request_shows_the_write_that_it_is_part_of_and_the_sql_of_that_and_who_blocks_it() -> None:
    async with tasks(3) as (one, two, writer):
        records = [connection(one), connection(two)]
        write = BatchWrite("push", 0.3, [one, two], writer)
        job = DatabaseJob("Pushes.push", 0.3, writer, 77)

        branches = list(Picture(records, [write], [job]).branches(2, {77: backend(77, 99)}))

    assert [branch.kind for branch in branches] == ["connection", "connection"]
    request = branches[0].branches[0]
    assert (request.kind, request.at, request.seconds) == ("request", "waits for a write", 0.3)
    (below,) = request.branches
    assert (below.kind, below.name, below.at) == ("write", "push of 2 requests", "in flight")
    (sql,) = below.branches
    assert (sql.pid, sql.blocked_by, sql.at, sql.seconds) == (77, (99,), "active, Lock tuple", 0.25)
    assert in_a_line(sql) == (
        "sql Pushes.push «SELECT 1» (pid 77): active, Lock tuple, 0.250 s; blocked by PostgreSQL pid 99"
    )


async def test_a_request_that_waits_for_the_write_before_its_own_says_so() -> None:
    async with tasks(1) as (one,):
        write = BatchWrite("ack", 0.2, [one], None)

        (branch,) = Picture([connection(one)], [write], []).branches(1, {})

    assert branch.branches[0].at == "waits for the write before its own"
    assert branch.branches[0].branches[0].at == "has not begun"


async def test_a_request_with_database_work_of_its_own_shows_that_also_while_it_waits_for_a_connection() -> None:
    async with tasks(1) as (one,):
        jobs = [DatabaseJob("Groups.seek", 0.4, one, None), DatabaseJob("Groups.seek", 0.5, one, 8)]

        (branch,) = Picture([connection(one)], [], jobs).branches(1, {})

    assert [sql.at for sql in branch.branches[0].branches] == ["waits for a connection", "on a connection"]
    assert branch.branches[0].seconds == 0.5


async def test_what_a_task_below_the_request_waits_for_is_the_requests() -> None:
    async with trio.open_nursery() as nursery:
        found: list[Task] = []

        async def child() -> None:
            found.append(trio.lowlevel.current_task())
            await trio.sleep_forever()

        async def request() -> None:
            found.append(trio.lowlevel.current_task())
            async with trio.open_nursery() as below:
                below.start_soon(child)

        nursery.start_soon(request)
        await trio.testing.wait_all_tasks_blocked()
        above, below = found
        (branch,) = Picture([connection(above)], [], [DatabaseJob("Acks.ack", 0.1, below, 5)]).branches(1, {})
        nursery.cancel_scope.cancel()

    assert branch.branches[0].branches[0].pid == 5


async def test_a_parked_pop_is_shown_by_where_it_stands() -> None:
    async with trio.open_nursery() as nursery:
        found: list[Task] = []
        lot = Lot(Topic("g", queue="q"))

        async def pop() -> None:
            found.append(trio.lowlevel.current_task())
            await lot.park()

        nursery.start_soon(pop)
        await trio.testing.wait_all_tasks_blocked()
        (branch,) = Picture([connection(found[0], request="GET /pop")], [], []).branches(1, {})
        nursery.cancel_scope.cancel()

    assert branch.branches[0].at == "waits in engine.wakeups Lot.park"


async def test_a_client_that_is_waited_for_is_named_and_idle_connections_are_counted() -> None:
    async with tasks(1) as (one,):
        records = [
            connection(one, waits="for its client to read", seconds=3.0),
            *[connection(None, waits="idle", request="") for _ in range(4)],
        ]

        busy, idle, elsewhere = Picture(records, [], []).branches(3, {})

    assert (busy.at, busy.branches[0].at) == ("waits for its client to read", "waits for its client to read")
    assert idle.name == "4 idle connections"
    assert elsewhere.name == "2 requests through hypercorn"


async def test_what_no_connection_waits_for_is_shown_once_beside_them() -> None:
    async with tasks(3) as (gone, writer, housekeeper):
        write = BatchWrite("push", 0.1, [gone], writer)
        jobs = [DatabaseJob("Pushes.push", 0.1, writer, 5), DatabaseJob("Store.expire", 2.0, housekeeper, 6)]

        left, swept = Picture([], [write], jobs).branches(0, {})

    assert (left.kind, left.branches[0].pid) == ("write", 5)
    assert (swept.kind, swept.name, swept.pid) == ("sql", "Store.expire", 6)


async def test_of_very_many_connections_those_that_wait_longest_are_shown() -> None:
    records = [connection(None, waits="for more of the body", seconds=float(number)) for number in range(MAX_SHOWN + 5)]

    *shown, more = Picture(records, [], []).branches(MAX_SHOWN + 5, {})

    assert [branch.seconds for branch in shown] == [float(number) for number in range(MAX_SHOWN + 4, 4, -1)]
    assert more.name == "5 more connections that are not idle"


async def test_what_a_worker_says_of_itself_fits_a_message_however_much_it_does() -> None:
    async with tasks(300) as many:
        records = [connection(task, request="POST /" + "x" * 200) for task in many]
        write = BatchWrite("push", 0.3, many, many[0])
        jobs = [DatabaseJob("Pushes.push", 0.3, many[0], 77) for _ in range(50)]
        jobs += [DatabaseJob("Store.expire", 0.3, trio.lowlevel.current_task(), None) for _ in range(4096)]
        statement = "SELECT " + "x" * 153
        backends = {77: Backend(77, "active", "Lock transactionid", statement, 0.25, tuple(range(99990, 100000)))}

        branches = tuple(Picture(records, [write], jobs).branches(300, backends))

    assert branches[-1].name == "3896 more that no connection waits for"
    assert len(encode(Description(1, branches))) < MAX_LINE_BYTES


def test_a_tree_is_drawn_with_its_branches_indented() -> None:
    leaf = Branch(kind="sql", name="x", at="active", seconds=1.0)
    tree = Branch(kind="supervisor", name="s", branches=(Branch(kind="worker", name="a", branches=(leaf,)), leaf))

    assert list(draw(tree)) == ["├─ worker a", "│  └─ sql x: active, 1.000 s", "└─ sql x: active, 1.000 s"]
