"""How workers even out their connections: the board, who is heavy, and the queue between them."""

from __future__ import annotations

import os
import resource
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress

import pytest
import trio
import trio.testing

from queen.balance import ABSENT, PATIENCE_SECONDS, Balance, Pool


@pytest.fixture
def pool() -> Iterator[Pool]:
    with closing(Pool()) as pool:
        yield pool


@pytest.fixture
def workers(pool: Pool) -> Iterator[list[Balance]]:
    """Four of them, each as if in a process of its own."""
    pool.board.slots = 4
    with ExitStack() as stack:
        yield [
            stack.enter_context(closing(Balance(slot, *(os.dup(each) for each in pool.descriptors))))
            for slot in range(4)
        ]


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The client's side and the accepted one."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        listener.accept()[0] as accepted,
    ):
        client.settimeout(5)
        yield client, accepted


def test_a_share_is_what_each_that_serves_would_have(pool: Pool, workers: list[Balance]) -> None:
    for worker, connections in zip(workers, (10, 2, 0, 4), strict=True):
        worker.note(connections)
    assert pool.board.share() == 4.0

    workers[2].leave(replaced=False)
    assert pool.board.share() == pytest.approx(16 / 3)
    pool.board.write(0, ABSENT)  # its supervisor saw it die
    assert pool.board.share() == 3.0
    pool.board.slots = 2
    assert pool.board.share() == 2.0


@pytest.mark.parametrize(
    ("connections", "heavy"),
    [
        ((1, 0, 0, 0), False),  # nobody hands on his only one
        ((2, 0, 0, 0), True),
        ((3, 2, 2, 2), False),
        ((4, 2, 2, 2), True),
        ((28, 24, 24, 24), False),  # an eighth above the share is not worth the while
        ((30, 24, 24, 24), True),
    ],
)
def test_who_is_heavy(workers: list[Balance], connections: tuple[int, ...], heavy: bool) -> None:
    for worker, count in zip(workers, connections, strict=True):
        worker.note(count)

    assert workers[0].is_heavy is heavy


def test_one_worker_alone_is_never_heavy(pool: Pool) -> None:
    pool.board.slots = 1
    with closing(Balance(0, *(os.dup(each) for each in pool.descriptors))) as alone:
        alone.note(1000)

        assert not alone.is_heavy


async def test_a_connection_that_is_handed_on_is_served_by_another(
    workers: list[Balance], connection: tuple[socket.socket, socket.socket]
) -> None:
    client, accepted = connection
    heavy, light = workers[:2]
    heavy.note(5)
    taken: list[socket.socket] = []
    came = trio.Event()

    def serve(connected: socket.socket) -> None:
        taken.append(connected)
        came.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(light.run, serve)
        assert heavy.hand_on(accepted.fileno())
        accepted.close()
        await came.wait()
        nursery.cancel_scope.cancel()

    with taken[0] as served:
        assert not served.get_inheritable()
        served.sendall(b"from another")
        assert client.recv(20) == b"from another"
    assert (heavy.handed_on, light.taken) == (1, 1)


async def test_what_no_lighter_worker_takes_a_heavy_one_takes_a_moment_later(
    workers: list[Balance],
    connection: tuple[socket.socket, socket.socket],
    autojump_clock: trio.testing.MockClock,
) -> None:
    _, accepted = connection
    heavy = workers[0]
    heavy.note(5)
    taken: list[socket.socket] = []

    assert heavy.hand_on(accepted.fileno())
    with trio.move_on_after(1):
        await heavy.run(lambda connected: taken.append(connected))

    assert len(taken) == 1
    taken[0].close()
    assert PATIENCE_SECONDS < 1


def test_where_the_queue_is_full_whoever_has_it_serves(
    workers: list[Balance], connection: tuple[socket.socket, socket.socket]
) -> None:
    _, accepted = connection

    handed_on = 0
    while workers[0].hand_on(accepted.fileno()):
        handed_on += 1

    assert 10 < handed_on == workers[0].handed_on
    while (taken := workers[1].take_nowait()) is not None:
        taken.close()
    assert workers[1].taken == handed_on


def test_who_leaves_hands_nothing_on_and_writes_no_more(
    pool: Pool, workers: list[Balance], connection: tuple[socket.socket, socket.socket]
) -> None:
    _, accepted = connection
    before = workers[3]
    before.note(8)

    with closing(Balance(3, *(os.dup(each) for each in pool.descriptors))) as successor:
        before.leave(replaced=True)
        successor.note(1)
        before.note(7)

        assert pool.board.share() == 0.25
        assert not before.hand_on(accepted.fileno())
        successor.leave(replaced=False)
        assert pool.board.share() == 0.0


async def test_who_has_no_descriptor_left_leaves_a_connection_to_others(
    workers: list[Balance],
    connection: tuple[socket.socket, socket.socket],
    autojump_clock: trio.testing.MockClock,
) -> None:
    client, accepted = connection
    assert workers[0].hand_on(accepted.fileno())
    accepted.close()

    with no_descriptor_left(), trio.move_on_after(1):
        await workers[1].run(lambda _connected: pytest.fail("it was taken"))

    with workers[2].take_nowait() or pytest.fail("it is lost") as served:
        served.sendall(b"here")
        assert client.recv(20) == b"here"


def test_what_waits_for_a_worker_that_is_gone_is_given_to_those_that_serve(pool: Pool, workers: list[Balance]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as clients:
        for _ in range(3):
            clients.enter_context(socket.create_connection(listener.getsockname()))

        assert pool.give_backlog(listener) == 3

        assert [listener_is_empty(listener), pool.give_backlog(listener)] == [True, 0]
        for _ in range(3):
            taken = workers[1].take_nowait()
            assert taken is not None
            taken.close()


def test_where_nobody_serves_what_waits_goes_on_waiting(pool: Pool) -> None:
    pool.board.slots = 2
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()),
    ):
        assert pool.give_backlog(listener) == 0

        assert not listener_is_empty(listener)


def listener_is_empty(listener: socket.socket) -> bool:
    readable, _, _ = select.select([listener], [], [], 0)
    return not readable


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """All below the limit are taken."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, before[1]))
    taken: list[int] = []
    with suppress(OSError):
        while True:
            taken.append(os.dup(0))
    try:
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
