"""The supervisor's parts that need no process."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import structlog
import trio
import trio.testing

from queen.config.settings import Secret, Settings
from queen.control import ControlChannel, Drain, Failed, Heartbeat, Message, Ready, Serve, Start
from queen.errors import StartupError
from queen.supervision.children import MAX_OUTPUT_LINE_BYTES, lines, start_process
from queen.supervision.database import Foreign
from queen.supervision.listeners import Port
from queen.supervision.nursery import RestartPolicy
from queen.supervision.slot import Slot
from queen.supervisor import STATUS_SECONDS, Supervisor, first_error


def test_listening_sockets_share_a_port_that_nobody_else_can_take() -> None:
    with Port("127.0.0.1", 0) as port, port.listen(), port.listen():
        number = port.address[1]
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1 port {number}: Address already in use"):
            Port("127.0.0.1", number)
        with socket.create_connection(("127.0.0.1", number)):
            pass


def test_a_port_that_nobody_listens_on_for_a_while_stays_ours_and_takes_no_connection() -> None:
    with Port("127.0.0.1", 0) as port:
        port.listen().close()

        with pytest.raises(StartupError, match="Address already in use"):
            Port("127.0.0.1", port.address[1])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port.address[1]))
        with port.listen(), socket.create_connection(("127.0.0.1", port.address[1])):
            pass


def test_a_port_is_free_again_right_after_its_server() -> None:
    with (
        Port("127.0.0.1", 0) as port,
        port.listen() as listener,
        socket.create_connection(("127.0.0.1", port.address[1])) as client,
    ):
        listener.accept()[0].close()  # the server's side closes first: its end of the connection lingers
        assert client.recv(1) == b""

    Port("127.0.0.1", port.address[1]).close()


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", r"http://127\.0\.0\.1:\d+"), ("::1", r"http://\[::1\]:\d+")], ids=["IPv4", "IPv6"]
)
def test_the_url_of_a_port(host: str, url: str) -> None:
    with Port(host, 0) as port:
        assert re.fullmatch(url, port.url)


def test_the_first_error_of_nested_groups() -> None:
    error = StartupError("no")
    inner = ExceptionGroup("inner", [error, StartupError("nor this")])

    assert first_error(ExceptionGroup("outer", [inner])) is error


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("postgresql://me:secret@db.example:5432/queen", "database queen on db.example"),
        ("postgresql://me:secret@/queen?host=%2Frun%2Fpg", "database queen on /run/pg"),
        ("postgresql:///", "database postgres on localhost"),
        ("postgres://me:secret@one:5432,two:5433/queen?target_session_attrs=read-write", "database queen on one,two"),
        ("postgresql://[::1]:5432/queen", "database queen on ::1"),
    ],
)
def test_where_a_foreign_database_is_without_its_password(url: str, where: str) -> None:
    assert Foreign(url).where == where


async def test_lines_of_output_however_they_arrive() -> None:
    sending, receiving = trio.testing.memory_stream_one_way_pair()
    seen: list[bytes] = []

    async def read() -> None:
        seen.extend([line async for line in lines(receiving)])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        for part in (b"on", b"e\ntwo\n\nthr", b"ee"):
            await sending.send_all(part)
        await sending.aclose()

    assert seen == [b"one", b"two", b"", b"three"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("can't start new thread"), OSError),  # no process to be had, nor a thread to start it from
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), OSError),
        (RuntimeError("something else"), RuntimeError),
    ],
)
async def test_where_no_process_can_be_started_it_is_an_error_of_the_system(
    monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception]
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "Popen", fail)
    async with trio.open_nursery() as nursery:
        with pytest.raises(raised):
            await start_process(nursery, ["true"])


async def test_a_line_without_end_is_cut_instead_of_kept() -> None:
    sending, receiving = trio.testing.memory_stream_one_way_pair()

    async def write() -> None:
        await sending.send_all(b"x" * (3 * MAX_OUTPUT_LINE_BYTES))
        await sending.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        pieces = [line async for line in lines(receiving)]

    assert b"".join(pieces) == b"x" * (3 * MAX_OUTPUT_LINE_BYTES)
    assert all(len(piece) <= 4 * MAX_OUTPUT_LINE_BYTES for piece in pieces)


async def test_messages_arrive_whole_and_in_order_and_end_with_the_other_side() -> None:
    here, there = socket.socketpair()
    sent: list[Message] = [
        Ready(),
        Heartbeat(loop_lag_max_ms=0.5, rss_bytes=1),
        Failed(error="line\nbreak"),
        Drain(),
    ]
    async with ControlChannel(here) as worker, ControlChannel(there) as supervisor:
        for message in sent:
            await worker.send(message)
        await worker.aclose()

        assert [await supervisor.receive() for _ in sent] == sent
        assert await supervisor.receive() is None


async def test_half_a_message_is_not_lost_to_a_receive_that_is_cancelled() -> None:
    here, there = socket.socketpair()
    async with ControlChannel(there) as worker:
        with here:
            here.sendall(b'{"type":"dr')
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(worker.receive)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            here.sendall(b'ain"}\n')

        assert await worker.receive() == Drain()
        assert await worker.receive() is None


async def test_settings_travel_as_they_were_encoded() -> None:
    here, there = socket.socketpair()
    async with ControlChannel(here) as supervisor, ControlChannel(there) as worker:
        await supervisor.send(Start(settings=msgspec.Raw(b'{"port":1}')))
        message = await worker.receive()

    assert isinstance(message, Start)
    assert bytes(message.settings) == b'{"port":1}'


async def test_sending_to_a_process_that_is_gone_says_so() -> None:
    here, there = socket.socketpair()
    there.close()
    async with ControlChannel(here) as channel:
        with pytest.raises(trio.BrokenResourceError):
            await channel.send(Drain())


async def test_a_descriptor_travels_with_its_message(tmp_path: Path) -> None:
    here, there = socket.socketpair()
    async with ControlChannel(here) as supervisor, ControlChannel(there) as worker:
        with (tmp_path / "file").open("w+b") as file:
            file.write(b"carried")
            file.flush()
            await supervisor.send(Start(settings=msgspec.Raw(b"{}")))
            await supervisor.send(Serve(slot=2, generation=7), file.fileno())

        assert isinstance(await worker.receive(), Start)
        assert await worker.receive() == Serve(slot=2, generation=7)
        carried = worker.take_descriptor()
        assert not os.get_inheritable(carried)
        assert os.pread(carried, 7, 0) == b"carried"
        os.close(carried)


async def test_the_status_line_tells_rates_over_the_minute_and_restarts(autojump_clock: trio.testing.MockClock) -> None:
    settings = Settings(database_url=Secret("postgresql:///"), log_format="json", workers=2)
    with Port("127.0.0.1", 0) as port:
        supervisor = Supervisor(settings, port, app="none:none", announce=lambda _: None)
    with structlog.testing.capture_logs() as logged:
        async with trio.open_nursery() as nursery:
            first, second = (Slot(supervisor, index, port, nursery, RestartPolicy()) for index in range(2))
            supervisor.slots += [first, second]
            nursery.start_soon(supervisor.report_status)
            await trio.testing.wait_all_tasks_blocked()
            none = Heartbeat()
            one = Heartbeat(requests=60, pushed=600, popped=60, acked=6)
            two = Heartbeat(requests=120, pushed=1200, popped=60, acked=6)
            first.note_heartbeat(none, one)
            first.note_heartbeat(one, two)
            second.note_heartbeat(none, Heartbeat(pushed=600))
            second.place.restarts = 3
            await trio.sleep(STATUS_SECONDS + 1)
            first.note_heartbeat(two, msgspec.structs.replace(two, pushed=1800))
            await trio.sleep(STATUS_SECONDS)
            nursery.cancel_scope.cancel()

    minute, next_minute = [line for line in logged if line["event"] == "status"]
    assert minute["active_workers"] == 0
    assert minute["wanted_workers"] == 2
    assert minute["restarts"] == 3
    assert minute["uptime_seconds"] == 60
    assert (minute["requests_per_second"], minute["pushed_per_second"]) == (2.0, 30.0)
    assert (minute["popped_per_second"], minute["acked_per_second"]) == (1.0, 0.1)
    assert (next_minute["requests_per_second"], next_minute["pushed_per_second"]) == (0.0, 10.0)


def test_the_supervisor_imports_neither_app_nor_driver() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import queen.cli, sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )

    assert not {"queen.app", "queen.engine.engine", "asyncpg", "quart", "hypercorn"} & set(done.stdout.split())
