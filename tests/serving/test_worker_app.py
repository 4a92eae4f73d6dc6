"""The application of a worker: what it loads, and when."""

from __future__ import annotations

import subprocess
import sys

import pytest
import trio

from queen.config.settings import Settings
from queen.worker.app import WorkerApp, create_app

from .support import Answer, Server, open_server, request

UPGRADE = request("GET", "/livez", Upgrade="chat", Connection="upgrade")


async def ask(server: Server, data: bytes) -> Answer:
    async with await server.connect() as client:
        return await client.exchange(data)


async def test_requests_that_are_no_plain_http_are_answered_as_the_first_of_them_loads_what_serves_them(
    settings: Settings,
) -> None:
    apps: list[WorkerApp] = []

    def make(settings: Settings) -> WorkerApp:
        apps.append(create_app(settings))
        return apps[0]

    answers: list[Answer] = []

    async def ask_for_upgrade(server: Server) -> None:
        answers.append(await ask(server, UPGRADE))

    async with open_server(settings, fast=True, make=make) as server:
        assert (await ask(server, request("GET", "/livez"))).status == 200
        assert apps[0]._quart is None

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_for_upgrade, server)
            nursery.start_soon(ask_for_upgrade, server)
        quart = apps[0]._quart
        await ask_for_upgrade(server)

        assert apps[0]._quart is quart is not None
    assert [answer.status for answer in answers] == [200, 200, 200]


async def test_a_server_that_sends_everything_through_quart_loads_it_before_it_serves(settings: Settings) -> None:
    async with open_server(settings, fast=False, make=create_app) as server:
        assert {"queen.app", "queen.serving.long_way"} <= set(sys.modules)
        answer = await ask(server, request("GET", "/api/v1/resources/queues"))

    assert answer.status == 200


@pytest.mark.parametrize("module", ["queen.worker.run", "queen.worker.app"])
def test_a_worker_imports_nothing_that_only_some_servers_need(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import queen.lean, {module}, sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )

    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not {"quart", "werkzeug", "jinja2", "hypercorn", "h2", "cryptography", "jwt", "httpx", "rich"} & loaded
