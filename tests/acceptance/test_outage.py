"""PostgreSQL stopped for seconds under load, workers killed meanwhile: nothing lost, doubled or out of order.

A small one of what `python -m perf.outage` does for minutes; and a server that starts, serves and drains without it.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from queen.storage import embedded

from .support import PROJECT, Server, destroy, eventually

if TYPE_CHECKING:
    from .conftest import StartServer

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("how", ["stop", "kill", "freeze"])
def test_an_outage_loses_doubles_and_reorders_nothing(how: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "perf.outage", "--how", how, "--seconds", "6", "--before", "3", "--after", "5"),
            *("--rate", "300", "--worker-every", "2.5", "--seed", "1"),
        ],
        cwd=PROJECT,
        capture_output=True,
        check=False,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["violations"] == 0
    assert counts["workers killed"] > 0
    assert counts["away"]["buffered"] > 1000
    assert counts["set aside"] == 0


class Postgres:
    """A PostgreSQL of the test's own, to be stopped and started under a server."""

    def __init__(self, cluster: embedded.Cluster, log: Path) -> None:
        self.url = cluster.url
        self._cluster = cluster
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._cluster.clear_locks()
        self._cluster.socket_directory.mkdir(exist_ok=True)
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                self._cluster.command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                **self._cluster.popen_options(),
            )
        eventually(40, lambda: embedded.READY_LINE in self._log.read_bytes())

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(60)
            self._process = None


@pytest.fixture
def database(scratch: Path) -> Iterator[Postgres]:
    async def make() -> embedded.Cluster:
        async with embedded.open_cluster(scratch / "postgres") as cluster:
            return cluster

    postgres = Postgres(trio.run(make), scratch / "postgres.log")
    postgres.start()
    yield postgres
    postgres.stop()


def post(server: Server, path: str, body: object) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("POST", path, json.dumps(body), {"Connection": "close"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def push(server: Server, *numbers: int) -> str:
    """Push to one partition. Returns what became of all of them alike."""
    items = [{"queue": "q", "payload": number, "transactionId": f"order-{number}"} for number in numbers]
    status, results = post(server, "/api/v1/push", {"items": items})
    assert status == 201, results
    (outcome,) = {result["status"] for result in results}
    return str(outcome)


def spool(server: Server) -> dict[str, Any]:
    _, body = server.get("/health")
    found: dict[str, Any] = json.loads(body)["spool"]
    return found


def received(server: Server) -> list[int]:
    status, body = server.get("/api/v1/pop/queue/q?batch=10000&autoAck=true", seconds=30)
    return [message["data"] for message in json.loads(body)["messages"]] if status == 200 else []


def test_a_server_tells_of_an_outage_and_survives_its_own_end_in_it(
    start_server: StartServer, database: Postgres
) -> None:
    flags = ("--database-url", database.url)
    server = start_server(*flags).wait_ready()
    assert push(server, 0) == "queued"
    assert server.get("/health")[0] == 200

    database.stop()
    eventually(5, lambda: server.get("/health")[0] == 503)
    assert push(server, 1, 2) == "buffered"

    assert server.get("/readyz")[0] == 200
    assert spool(server) | {"bytes": 0, "oldestSeconds": 0} == {
        "active": True,
        "pending": 2,
        "failed": 0,
        "bytes": 0,
        "maxBytes": 1024**3,
        "oldestSeconds": 0,
    }
    assert json.loads(server.get("/api/v1/status/buffers")[1])["pending"] == 2
    assert json.loads(server.get("/api/v1/system/maintenance")[1])["bufferedMessages"] == 2
    assert b"\nqueen_file_buffer_pending 2\n" in server.get("/metrics/prometheus")[1]
    status, _ = server.get("/api/v1/pop/queue/q")
    assert status == 503

    destroy(server.process.pid)  # and its workers with it
    eventually(5, lambda: not any(pid for pid in server.worker_pids))
    server = start_server(*flags).wait_ready()
    assert push(server, 3) == "buffered"
    for pid in server.worker_pids:
        destroy(pid)
    assert eventually(20, lambda: push_again(server, 4)) == "buffered"
    database.start()
    eventually(20, lambda: not spool(server)["active"])

    push(server, 5)  # the other worker may be without the database still
    everything: list[int] = []

    def all_received() -> bool:
        everything.extend(received(server))
        return len(everything) >= 6

    eventually(20, all_received)
    assert everything == [0, 1, 2, 3, 4, 5]
    assert server.stop() == 0


def push_again(server: Server, number: int) -> str:
    try:
        return push(server, number)
    except (OSError, http.client.HTTPException):
        return ""


def test_a_drain_that_is_killed_again_and_again_stores_everything_once_and_in_order(
    start_server: StartServer, database: Postgres
) -> None:
    server = start_server("--database-url", database.url, environment={"FILE_BUFFER_MAX_BATCH": "2"}).wait_ready()
    post(server, "/api/v1/system/maintenance", {"enabled": True})
    eventually(5, lambda: push(server, 0) == "buffered")
    total = 1500
    for start in range(1, total, 5):
        assert push(server, *range(start, min(start + 5, total))) == "buffered"

    post(server, "/api/v1/system/maintenance", {"enabled": False})
    for left in (1200, 900, 600):
        eventually(60, lambda left=left: pending(server) < left)  # type: ignore[misc]
        for pid in server.worker_pids:
            os.kill(pid, signal.SIGKILL)

    eventually(60, lambda: pending(server) == 0)
    assert received(server) == list(range(total))


def pending(server: Server) -> int:
    try:
        return int(spool(server)["pending"])
    except (OSError, http.client.HTTPException):
        return 1_000_000
