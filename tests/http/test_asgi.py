"""The application as others run it: under hypercorn's command, mounted in another application, under httpx, under
Quart's test client."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from hypercorn.middleware.dispatcher import TrioDispatcherMiddleware

from queen.app import QueenApp, create_app
from queen.config.settings import Settings

from .asgi_driver import Http, open_app, run_lifespan

ROOT = Path(__file__).parents[2]
KiB, MiB = 1024, 1024 * 1024


class Hypercorn:
    """``hypercorn -k trio queen.asgi:app`` in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said: list[str] = []

    def port(self) -> int:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"Running on http://127\.0\.0\.1:(\d+)", line):
                return int(found[1])
        pytest.fail("hypercorn did not start:\n" + "".join(self.said))

    def rss_bytes(self) -> int:
        """Memory of the process that serves, which is a child of the command's."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        pages = [int(Path(f"/proc/{child}/statm").read_text().split()[1]) for child in children]
        return max(pages) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def hypercorn(**environment: str) -> Iterator[Hypercorn]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "QUEEN_", "DATABASE"))}
    command = [sys.executable, "-m", "hypercorn", "-k", "trio", "queen.asgi:app", "--bind", "127.0.0.1:0"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield Hypercorn(process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the command and its worker


@pytest.fixture
def served(database_url: str, buckets: int) -> Iterator[tuple[Hypercorn, int]]:
    # Its lines go nowhere once it runs: at warning there are few.
    with hypercorn(QUEEN_DATABASE_URL=database_url, QUEEN_BUCKETS=str(buckets), LOG_LEVEL="warn") as server:
        yield server, server.port()


def ask(port: int, method: str, target: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, target, None if body is None else json.dumps(body))
        response = connection.getresponse()
        content = response.read()
        return response.status, json.loads(content) if content else None
    finally:
        connection.close()


def test_hypercorn_serves_it_with_settings_from_the_environment(served: tuple[Hypercorn, int]) -> None:
    server, port = served

    assert ask(port, "POST", "/api/v1/push", {"items": [{"queue": "a/b", "payload": 1}]})[0] == 201
    status, popped = ask(port, "GET", "/api/v1/pop/queue/a%2Fb")

    assert (status, popped["messages"][0]["data"]) == (200, 1)
    assert ask(port, "GET", "/health")[1]["status"] == "healthy"
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0


def test_hypercorn_without_a_database_ends_with_a_sentence() -> None:
    with hypercorn() as server:
        _, said = server.process.communicate(timeout=60)  # hypercorn's command exits with 0 all the same

    assert "no database: set QUEEN_DATABASE_URL" in said


def test_a_chunked_body_over_the_limit_is_refused_over_a_socket(database_url: str, buckets: int) -> None:
    environment = {"QUEEN_DATABASE_URL": database_url, "QUEEN_BUCKETS": str(buckets), "MAX_BODY_SIZE": str(MiB)}
    with hypercorn(**environment) as server:
        port = server.port()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        before = server.rss_bytes()

        connection.request("POST", "/api/v1/push", iter([b"x" * 65536] * 1600), encode_chunked=True)
        response = connection.getresponse()

        assert response.status == 413
        assert json.loads(response.read())["error"] == "Request body too large"
        assert server.rss_bytes() - before < 16 * MiB
        connection.request("GET", "/livez")  # and the connection is as good as before
        assert connection.getresponse().read() == b'{"status":"alive"}'
        connection.close()


def test_a_slow_reader_of_100_000_messages_costs_little_memory(served: tuple[Hypercorn, int]) -> None:
    """A pop whose answer is 38 MB, read 64 KiB at a time with other requests in between (issue 2, item 6)."""
    server, port = served
    items = [{"queue": "q", "payload": {"n": number}} for number in range(1000)]
    for _ in range(100):
        assert ask(port, "POST", "/api/v1/push", {"items": items})[0] == 201
    ask(port, "GET", "/api/v1/pop/queue/q?batch=100&consumerGroup=warm")
    before = peak = server.rss_bytes()

    reader = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    reader.connect()
    reader.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * KiB)  # what it does not read stays the server's
    reader.request("GET", "/api/v1/pop/queue/q?batch=100000")
    response = reader.getresponse()
    answer = bytearray()
    for _ in range(48):
        answer += response.read(64 * KiB)
        assert ask(port, "POST", "/api/v1/push", {"items": [{"queue": "other", "payload": 1}]})[0] == 201
        assert ask(port, "GET", "/api/v1/pop/queue/other?autoAck=true")[0] == 200
        peak = max(peak, server.rss_bytes())
    answer += response.read()  # and now as fast as it can
    reader.close()

    assert peak - before < 32 * MiB
    assert [message["data"]["n"] for message in json.loads(answer)["messages"]] == list(range(1000)) * 100


def test_a_client_that_hangs_up_in_the_middle_of_a_large_answer_ends_it(served: tuple[Hypercorn, int]) -> None:
    server, port = served
    items = [{"queue": "q", "payload": "x" * 1000}] * 1000
    for _ in range(20):
        assert ask(port, "POST", "/api/v1/push", {"items": items})[0] == 201

    with socket.create_connection(("127.0.0.1", port), timeout=60) as reader:
        reader.sendall(b"GET /api/v1/pop/queue/q?batch=20000 HTTP/1.1\r\nHost: queen\r\n\r\n")
        reader.recv(64 * KiB)

    assert ask(port, "GET", "/api/v1/pop/queue/q")[0] == 204  # it may have got messages: the lease stays
    server.process.send_signal(signal.SIGTERM)
    started_at = time.monotonic()
    assert server.process.wait(30) == 0
    assert time.monotonic() - started_at < 10


def test_under_asyncio_it_says_that_it_needs_trio(settings: Settings) -> None:
    told: list[dict[str, str]] = []

    async def receive() -> dict[str, str]:
        return {"type": "lifespan.startup"}

    async def send(message: dict[str, str]) -> None:
        told.append(message)

    scope: Any = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": {}}
    app: Any = create_app(settings)
    asyncio.run(app(scope, receive, send))

    assert [message["type"] for message in told] == ["lifespan.startup.failed"]
    assert "start hypercorn with -k trio" in told[0]["message"]


# -- in process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mount", ["/queen", "/a b/c", "/api"])
async def test_it_works_mounted_under_a_path_of_another_application(settings: Settings, mount: str) -> None:
    outer = TrioDispatcherMiddleware({mount: create_app(settings)})
    http, prefix = Http(outer), mount.replace(" ", "%20")

    async with run_lifespan(outer):
        pushed = await http.post(f"{prefix}/api/v1/push", {"items": [{"queue": "a/b", "payload": 1}]})
        popped = await http.get(f"{prefix}/api/v1/pop/queue/a%2Fb")
        unknown = await http.get(f"{prefix}/api/v1/nowhere")
        outside = await http.get("/api/v1/pop/queue/a%2Fb" if mount != "/api" else "/v1/push")

    assert pushed.status == 201
    assert popped.json["messages"][0]["queue"] == "a/b"
    assert unknown.json == {"error": "no_such_route", "code": "no_such_route"}
    assert (outside.status, outside.body) == (404, b"")


async def test_it_works_where_the_mount_has_cut_the_path_itself(settings: Settings) -> None:
    async with open_app(settings) as app:

        async def outer(scope: Any, receive: Any, send: Any) -> None:
            cut = scope["path"].removeprefix("/queen")
            mounted: Any = {**scope, "path": cut, "root_path": "/queen"}
            await app(mounted, receive, send)

        http = Http(outer)
        await http.post("/queen/api/v1/push", {"items": [{"queue": "a/b", "payload": 1}]})
        popped = await http.get("/queen/api/v1/pop/queue/a%2Fb")

    assert popped.json["messages"][0]["queue"] == "a/b"


@pytest.mark.parametrize("root_path", ["", "/under"])
async def test_httpx_drives_it_in_process(app: QueenApp, root_path: str) -> None:
    transport = httpx.ASGITransport(cast(Any, app), root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://queen.test{root_path}") as client:
        pushed = await client.post(
            "/api/v1/push", json={"items": [{"queue": "a/b", "payload": n} for n in range(3000)]}
        )
        popped = await client.get("/api/v1/pop/queue/a%2Fb", params={"batch": 3000})
        empty = await client.get("/api/v1/pop/queue/none")

    assert pushed.status_code == 201
    assert [message["data"] for message in popped.json()["messages"]] == list(range(3000))
    assert (empty.status_code, empty.content) == (204, b"")


async def test_the_test_client_of_quart_drives_it(settings: Settings) -> None:
    app = create_app(settings)
    async with app.test_app() as running:
        client = running.test_client()
        pushed = await client.post("/api/v1/push", json={"items": [{"queue": "q 1", "payload": {"a": 1}}]})
        popped = await client.get("/api/v1/pop/queue/q%201?batch=5")
        missing = await client.get("/api/v1/nowhere")

        assert pushed.status_code == 201
        assert (await popped.get_json())["messages"][0]["data"] == {"a": 1}
        assert await missing.get_json() == {"error": "no_such_route", "code": "no_such_route"}


async def test_an_application_of_ones_own_can_share_it(settings: Settings) -> None:
    app = create_app(settings)

    @app.get("/hello")
    async def hello() -> dict[str, str]:
        return {"queue": "here"}

    async with run_lifespan(app):
        answer = await Http(app).get("/hello")

    assert (answer.status, answer.json) == (200, {"queue": "here"})
    assert answer.headers["access-control-allow-origin"] == "*"
