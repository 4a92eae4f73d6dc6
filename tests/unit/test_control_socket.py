"""The control socket with a made-up server behind it, and how its answers are shown."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from queen.cli.show import headline, row, size, span, table
from queen.cli.top import Curves, curve
from queen.config.settings import Secret, Settings
from queen.errors import StartupError
from queen.model.snapshot import SlotSnapshot, Snapshot
from queen.model.tree import Branch
from queen.supervision.control_socket import (
    ANSWER_SECONDS,
    IDLE_SECONDS,
    MAX_CLIENTS,
    MAX_COMMAND_BYTES,
    ControlSocket,
    Refused,
    _Client,
    control_path,
    make_runtime_directory,
    reach,
)

SLOTS = (
    SlotSnapshot(slot=0, state="serving", pid=11, generation=3, uptime_seconds=75, rss_bytes=80 << 20, connections=7),
    SlotSnapshot(slot=1, state="parked", generation=2, restarts=6, last_exit="exited with code 9"),
)


class Server:
    """Stands in for the supervisor."""

    def __init__(self) -> None:
        self.told: list[object] = []
        self.tree_takes_seconds = 0.0

    def snapshot(self) -> Snapshot:
        return Snapshot(
            pid=os.getpid(),
            version="1",
            state="degraded",
            uptime_seconds=3700,
            url="http://127.0.0.1:1",
            database="data in /d",
            workers_wanted=2,
            workers_active=1,
            restarts=6,
            slots=SLOTS,
        )

    async def tree(self) -> Branch:
        await trio.sleep(self.tree_takes_seconds)
        return Branch(kind="supervisor", name="queen-trio", pid=1)

    def set_workers(self, count: int) -> None:
        if count > 8:
            raise Refused("too many")
        self.told.append(count)

    def reload(self) -> None:
        self.told.append("reload")

    def upgrade(self) -> None:
        self.told.append("upgrade")

    def stop(self) -> None:
        self.told.append("stop")


@asynccontextmanager
async def client_of(server: Server) -> AsyncIterator[trio.abc.Stream]:
    """A client of that server over a stream in memory, so that time can be made up."""
    near, far = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            await _Client(far, server).run()  # type: ignore[arg-type]
            await far.aclose()

        nursery.start_soon(serve)
        yield near
        nursery.cancel_scope.cancel()


async def ask(stream: trio.abc.Stream, command: dict[str, object]) -> dict[str, Any]:
    await stream.send_all(msgspec.json.encode(command) + b"\n")
    return await reply(stream)


async def reply(stream: trio.abc.Stream) -> dict[str, Any]:
    line = bytearray()
    while not line.endswith(b"\n"):
        received = await stream.receive_some(65536)
        assert received
        line += received
    found: dict[str, Any] = msgspec.json.decode(line)
    return found


async def test_every_command_is_obeyed_and_answered_with_how_things_are_then() -> None:
    server = Server()

    async with client_of(server) as stream:
        status = await ask(stream, {"do": "status"})
        commands: list[dict[str, object]] = [
            {"do": "workers", "count": 4},
            {"do": "reload"},
            {"do": "upgrade"},
            {"do": "stop"},
        ]
        for command in commands:
            assert await ask(stream, command) == status
        tree = await ask(stream, {"do": "tree"})

    assert msgspec.convert(status["result"], Snapshot) == server.snapshot()
    assert server.told == [4, "reload", "upgrade", "stop"]
    assert tree["result"] == {"kind": "supervisor", "name": "queen-trio", "pid": 1}


@pytest.mark.parametrize(
    "line",
    [b"{}", b"status", b'{"do":"fly"}', b'{"do":"workers"}', b'{"do":"workers","count":"2"}', b"\xff\xfe", b""],
)
async def test_what_is_no_command_is_refused_and_the_next_one_is_obeyed(line: bytes) -> None:
    server = Server()

    async with client_of(server) as stream:
        await stream.send_all(line + b"\n")
        refused = await reply(stream)
        assert (await ask(stream, {"do": "status"}))["result"]["pid"] == os.getpid()

    assert refused["error"].startswith("not a command")
    assert server.told == []


async def test_a_command_that_cannot_be_obeyed_says_why() -> None:
    async with client_of(Server()) as stream:
        assert (await ask(stream, {"do": "workers", "count": 9}))["error"] == "too many"


async def test_a_line_without_end_ends_the_connection() -> None:
    async with client_of(Server()) as stream:
        await stream.send_all(b"x" * (MAX_COMMAND_BYTES + 1))

        assert await stream.receive_some(1) == b""


async def test_a_client_that_says_nothing_is_let_go(autojump_clock: trio.testing.MockClock) -> None:
    async with client_of(Server()) as stream:
        assert await stream.receive_some(1) == b""

    assert trio.current_time() == pytest.approx(IDLE_SECONDS, abs=0.1)


async def test_an_answer_that_takes_too_long_ends_the_connection(autojump_clock: trio.testing.MockClock) -> None:
    server = Server()
    server.tree_takes_seconds = 2 * ANSWER_SECONDS

    async with client_of(server) as stream:
        await stream.send_all(b'{"do":"tree"}\n')
        assert await stream.receive_some(1) == b""

    assert trio.current_time() == pytest.approx(ANSWER_SECONDS, abs=0.1)


async def connect(path: Path) -> trio.SocketStream:
    with reach(path) as address:
        return await trio.open_unix_socket(address)


async def test_a_real_socket_is_its_owners_alone_and_gone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"

    with ControlSocket(path) as control:
        async with trio.open_nursery() as nursery:
            await nursery.start(control.run, Server())
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            async with await connect(path) as stream:
                assert (await ask(stream, {"do": "status"}))["result"]["version"] == "1"
            nursery.cancel_scope.cancel()

    assert os.listdir(tmp_path) == []


async def test_more_clients_than_there_is_room_for_are_turned_away(tmp_path: Path) -> None:
    with ControlSocket(tmp_path / "control.sock") as control:
        async with trio.open_nursery() as nursery:
            await nursery.start(control.run, Server())
            streams = []
            for _ in range(MAX_CLIENTS):
                streams.append(await connect(control.path))
                await ask(streams[-1], {"do": "status"})
            one_more = await connect(control.path)

            assert await one_more.receive_some(1) == b""
            nursery.cancel_scope.cancel()
        for stream in [*streams, one_more]:
            await stream.aclose()


async def test_a_path_of_any_length_will_do(tmp_path: Path) -> None:
    directory = tmp_path / ("a long name " * 10) / ("and another " * 10)
    directory.mkdir(parents=True)

    with ControlSocket(directory / "control.sock") as control:
        async with trio.open_nursery() as nursery:
            await nursery.start(control.run, Server())
            async with await connect(control.path) as stream:
                assert (await ask(stream, {"do": "status"}))["result"]["version"] == "1"
            nursery.cancel_scope.cancel()


def test_a_socket_that_a_killed_server_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    with ControlSocket(path), socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))


def test_a_socket_that_another_server_answers_on_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"

    with ControlSocket(path):
        with pytest.raises(StartupError, match="another server answers on the control socket"):
            ControlSocket(path)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))


def test_a_successor_takes_the_path_over_and_its_predecessor_leaves_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    before = ControlSocket(path)

    with ControlSocket(path, replace=True):
        before.close()

        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
    assert not path.exists()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    path.write_text("precious")

    with pytest.raises(StartupError, match="is no socket"):
        ControlSocket(path)

    assert path.read_text() == "precious"


def test_a_directory_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot be made: No such file or directory"):
        ControlSocket(tmp_path / "nowhere" / "control.sock")


def test_a_runtime_directory_is_made_for_us_alone(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "queen-trio"

    make_runtime_directory(directory)

    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    directory.chmod(0o777)
    with pytest.raises(StartupError, match="others may write"):
        make_runtime_directory(directory)


def test_where_the_control_socket_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    foreign = Settings(database_url=Secret("postgresql://here/there"), port=7000)
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/q:/run/other")

    assert control_path(Settings(data_dir=Path("/data"))) == Path("/data/control.sock")
    assert control_path(foreign) == Path("/run/q/control-7000.sock")
    assert control_path(msgspec.structs.replace(foreign, port=0), 7001) == Path("/run/q/control-7001.sock")
    assert control_path(Settings(data_dir=Path("/data"), control_socket=tmp_path / "s")) == tmp_path / "s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0s"), (9.94, "9.9s"), (59, "59s"), (60, "1m"), (3599, "59m 59s"), (3700, "1h 1m"), (200000, "2d 7h")],
)
def test_lengths_of_time(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (80 << 20, "80 MiB"), (3 << 29, "1.5 GiB")])
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_the_headline_names_the_slots_without_a_worker() -> None:
    said = headline(Server().snapshot())

    assert said.startswith("queen-trio 1 degraded, 1 of 2 workers, without a worker: slot 1, 6 restarts, up 1h 1m")


def test_the_table_has_a_line_for_every_slot_and_explains_the_last_exit() -> None:
    head, first, second = table([row(slot) for slot in SLOTS])

    assert head.split()[:4] == ["slot", "pid", "gen", "state"]
    assert first.split()[:5] == ["0", "11", "3", "serving", "1m"]
    assert second.split()[1] == "-"
    assert second.endswith("exited with code 9")


def test_a_curve_is_as_high_as_its_greatest_value() -> None:
    curves = Curves()

    assert curve(curves.requests) == ""
    curves.requests.extend([0.0, 1.0, 2.0, 4.0])
    assert curve(curves.requests) == "▁▃▅█"
