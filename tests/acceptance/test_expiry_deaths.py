"""Workers killed while what has expired becomes dead letters: each message is one, once and whole."""

from __future__ import annotations

import json
import random
import urllib.error
import urllib.request
from typing import Any

import pytest

from .conftest import StartServer
from .support import Server, destroy, eventually

MESSAGES = 12_000
PARTITIONS = 7
KILLS = 4


def ask(server: Server, method: str, path: str, body: Any = None) -> Any:
    """The answer as JSON; again when the worker that had the request is gone."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/api/v1/{path}", data=data, method=method)

    def answered() -> list[Any]:
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return [json.loads(answer.read() or b"null")]
        except (urllib.error.URLError, OSError, ValueError):
            return []

    return eventually(60, answered)[0]


@pytest.mark.timeout(180)
def test_kills_while_messages_expire_lose_and_double_no_dead_letter(start_server: StartServer) -> None:
    often = {"EVICTION_INTERVAL": "200", "RETENTION_INTERVAL": "200"}
    server = start_server(workers=2, environment=often).wait_ready()
    ask(server, "POST", "configure", {"queue": "q", "options": {"ttl": 3, "deadLetterQueue": True}})
    assert ask(server, "GET", "pop/queue/q?consumerGroup=g") is None
    for first in range(0, MESSAGES, 1000):
        items = [
            {"queue": "q", "partition": str(n % PARTITIONS), "payload": {"n": n}, "transactionId": f"message {n}"}
            for n in range(first, first + 1000)
        ]
        assert len(ask(server, "POST", "push", {"items": items})) == 1000

    def dead() -> int:
        return int(ask(server, "GET", "dlq?queue=q&limit=1")["total"])

    chance = random.Random(1)
    eventually(60, lambda: dead() > 0)
    for _ in range(KILLS):
        destroy(chance.choice(eventually(20, lambda: server.worker_pids)))
        seen = dead()
        eventually(30, lambda seen=seen: seen >= MESSAGES or dead() > seen)  # type: ignore[misc]
    eventually(60, lambda: dead() >= MESSAGES)
    eventually(60, lambda: ask(server, "GET", "resources/queues/q")["totals"]["total"] == 0)

    letters: list[int] = []
    for offset in range(0, MESSAGES, 1000):
        page = ask(server, "GET", f"dlq?queue=q&consumerGroup=g&limit=1000&offset={offset}")
        assert {letter["errorMessage"] for letter in page["messages"]} == {"Expired: ttl of 3 s is over"}
        letters += [letter["data"]["n"] for letter in page["messages"]]
    assert sorted(letters) == list(range(MESSAGES))
    assert dead() == MESSAGES
    assert server.stop() == 0
