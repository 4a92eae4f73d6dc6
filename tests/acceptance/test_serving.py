"""The whole server: messages over HTTP through processes that start, stop and die."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .conftest import StartServer
from .support import Server, eventually, is_alive, pg_bin
from .test_start_errors import complaint


def post(server: Server, path: str, body: object, *, seconds: float = 10.0) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        return json.load(answer)


def push(server: Server, *payloads: object, queue: str = "orders") -> None:
    results = post(server, "/api/v1/push", {"items": [{"queue": queue, "payload": payload} for payload in payloads]})
    assert [result["status"] for result in results] == ["queued"] * len(payloads)


def pop(server: Server, queue: str = "orders", *, batch: int = 100) -> list[dict[str, Any]]:
    status, body = server.get(f"/api/v1/pop/queue/{queue}?batch={batch}")
    return [] if status == 204 else json.loads(body)["messages"]


def ack(server: Server, *messages: dict[str, Any]) -> None:
    acknowledgments = [
        {name: message[name] for name in ("transactionId", "partitionId", "leaseId")} | {"status": "completed"}
        for message in messages
    ]
    results = post(server, "/api/v1/ack/batch", {"acknowledgments": acknowledgments})
    assert all(result["success"] for result in results)


def sql(server: Server, statement: str) -> str:
    """What the embedded PostgreSQL of that server answers an operator."""
    done = subprocess.run(
        [
            str(pg_bin() / "psql"),
            "-XAtq",
            "-h",
            str(server.home / "run"),
            "-U",
            "queen",
            "-d",
            "postgres",
            "-c",
            statement,
        ],
        capture_output=True,
        check=True,
        text=True,
    )
    return done.stdout.strip()


def test_messages_and_what_was_acked_survive_a_restart(start_server: StartServer, user: int | None) -> None:
    first = start_server(user=user).wait_ready()
    push(first, "a", "b", "c")
    messages = pop(first, batch=2)
    assert [message["data"] for message in messages] == ["a", "b"]
    ack(first, *messages)
    assert first.stop() == 0

    second = start_server(user=user).wait_ready()

    assert [message["data"] for message in pop(second)] == ["c"]


def test_root_can_serve_what_an_ordinary_user_has_stored(
    start_server: StartServer, scratch: Path, ordinary_user: int
) -> None:
    os.chown(scratch, ordinary_user, ordinary_user)
    first = start_server(user=ordinary_user).wait_ready()
    push(first, "mine")
    assert first.stop() == 0

    second = start_server().wait_ready()

    assert [message["data"] for message in pop(second)] == ["mine"]
    assert second.stop() == 0
    assert [message["data"] for message in pop(start_server(user=ordinary_user).wait_ready())] == []


def test_messages_survive_the_death_of_every_process(start_server: StartServer) -> None:
    first = start_server().wait_ready()
    push(first, *range(100))
    for pid in (first.process.pid, *first.worker_pids, first.postgres_pid):
        os.kill(pid, signal.SIGKILL)

    second = start_server().wait_ready()

    assert [message["data"] for message in pop(second)] == list(range(100))


def test_parked_pops_end_with_nothing_when_the_server_stops(start_server: StartServer) -> None:
    server = start_server().wait_ready()

    with ThreadPoolExecutor(40) as pool:
        parked = [
            pool.submit(server.get, f"/api/v1/pop/queue/q{n}?wait=true&timeout=30000", seconds=40) for n in range(40)
        ]
        eventually(10, lambda: count_requests_taken(server.port) == 40)
        started = time.monotonic()
        assert server.stop() == 0

        assert time.monotonic() - started < 5
        assert {pop.result() for pop in parked} == {(204, b"")}


def count_requests_taken(port: int) -> int:
    """Connections to that port that the server has accepted and whose bytes it has read (proc_pid_net(5))."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(
        row[1].endswith(f":{port:04X}") and row[3] == "01" and row[4].endswith(":00000000") and row[9] != "0"
        for row in rows
    )


def test_workers_with_parked_pops_are_gone_within_a_second_of_their_supervisor(start_server: StartServer) -> None:
    server = start_server().wait_ready()
    workers = server.worker_pids
    connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    for connection in connections:
        connection.sendall(b"GET /api/v1/pop/queue/q?wait=true&timeout=30000 HTTP/1.1\r\nHost: here\r\n\r\n")
    eventually(5, lambda: count_requests_taken(server.port) == 20)

    os.kill(server.process.pid, signal.SIGKILL)

    eventually(1.0, lambda: not [pid for pid in workers if is_alive(pid)])
    for connection in connections:
        connection.close()


def test_a_stopped_worker_that_was_left_behind_goes_once_it_may_run(start_server: StartServer) -> None:
    server = start_server(workers=1).wait_ready()
    (worker,) = server.worker_pids
    os.kill(worker, signal.SIGSTOP)
    os.kill(server.process.pid, signal.SIGKILL)

    os.kill(worker, signal.SIGCONT)

    eventually(1.0, lambda: not is_alive(worker))


def test_the_server_serves_again_after_its_postgres_was_killed(start_server: StartServer) -> None:
    server = start_server().wait_ready()
    push(server, 1)
    workers = set(server.worker_pids)

    os.kill(server.postgres_pid, signal.SIGKILL)

    def pushes() -> bool:
        try:
            results = post(server, "/api/v1/push", {"items": [{"queue": "orders", "payload": 2, "transactionId": "2"}]})
        except OSError:  # a connection that PostgreSQL took along
            return False
        return results[0]["status"] in {"queued", "buffered", "duplicate"}  # kept on the disk while it is away

    popped: list[object] = []

    def pops() -> bool:
        status, body = server.get("/api/v1/pop/queue/orders?batch=2&autoAck=true")
        if status == 200:  # the other worker may be without it still
            popped.extend(message["data"] for message in json.loads(body)["messages"])
        return len(popped) >= 2

    eventually(20, pushes)
    eventually(20, pops)
    assert popped == [1, 2]
    assert set(server.worker_pids) == workers


def test_a_database_that_cannot_be_reached(start_server: StartServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nobody_there = probe.getsockname()[1]

    said = complaint(start_server("--database-url", f"postgresql://me:sesame@127.0.0.1:{nobody_there}/none"))

    assert "PostgreSQL cannot be reached" in said
    assert "sesame" not in said


def test_a_database_that_is_newer_than_the_code(start_server: StartServer) -> None:
    first = start_server(workers=1).wait_ready()
    sql(first, "INSERT INTO queen.migrations VALUES (9999, 'from_the_future', now())")
    assert first.stop() == 0

    assert "the database is newer than this queen-trio" in complaint(start_server())


def test_migrate_brings_a_database_up_to_date_and_says_so_again(scratch: Path) -> None:
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "queen", "migrate", "--data-dir", str(scratch / "data")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=False,
            text=True,
        )
        assert (done.returncode, done.stdout) == (0, "the database is up to date (1 bucket)\n"), done.stderr
