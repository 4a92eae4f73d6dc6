"""The broker as a client test sees it, and small words that both client generations understand.

Nothing here knows what a test asserts.
"""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import httpx

Message = dict[str, Any]

Queen: Any = importlib.import_module("queen").Queen  # the published client, untyped for us
GENERATION = os.environ["QUEEN_CLIENT_VERSION"]
IS_2 = GENERATION.startswith("2.")
WORKERS = int(os.environ["QUEEN_SERVER_WORKERS"])
LOAD = int(os.environ["QUEEN_LOAD_MESSAGES"])
MANY_PARTITIONS = int(os.environ["QUEEN_MANY_PARTITIONS"])


class Broker:
    """One test's client, its raw HTTP way in, and the queues it has named. Enter it inside the event loop.

    Against several workers, both open a connection per request: the kernel deals connections out, so that each request
    may land on another worker than the one before, and what is promised across workers is tested by every case.
    `client(keep_alive=True)` is the client as shipped, for load.
    """

    def __init__(self, url: str, test: str) -> None:
        self.url = url
        self._prefix = f"{test[:60]}-{uuid.uuid4().hex[:8]}"
        self._queues: list[str] = []
        self._clients: list[Any] = []
        self.http: httpx.AsyncClient
        self.client: Any

    async def __aenter__(self) -> Broker:
        headers = {"Connection": "close"} if WORKERS > 1 else {}
        self.http = httpx.AsyncClient(base_url=self.url, headers=headers, timeout=40)
        self.client = self.connect(keep_alive=WORKERS == 1)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for client in self._clients:
            await client.close()
        for queue in self._queues:
            answer = await self.http.delete(f"/api/v1/resources/queues/{queue}")
            assert answer.status_code == 200, f"deleting {queue!r}: {answer.status_code} {answer.text}"
        await self.http.aclose()

    def connect(self, *, keep_alive: bool) -> Any:
        """Another client. One attempt per request: a test wants to see a 500, not a retry that hides it."""
        client = Queen(
            url=self.url, retry_attempts=1, headers={} if keep_alive else {"Connection": "close"}, timeout_millis=40_000
        )
        self._clients.append(client)
        return client

    def name(self, suffix: str = "") -> str:
        """The name of a queue that belongs to this test and is deleted after it."""
        name = self._prefix + suffix
        self._queues.append(name)
        return name

    async def create(self, suffix: str = "", **options: Any) -> str:
        """A new queue with these options (snake case, as the client takes them)."""
        name = self.name(suffix)
        builder = self.client.queue(name)
        answer = await (builder.config(options) if options else builder).create()
        assert answer["configured"] is True
        return name

    async def pop(self, queue: str, batch: int = 1, **choices: Any) -> list[Message]:
        """Pop without waiting. `choices` are builder methods: `group="g"`, `partition="p"`, `partitions=3`."""
        return await self._pop(queue, batch, wait=False, **choices)

    async def wait_pop(self, queue: str, batch: int = 1, seconds: float = 10.0, **choices: Any) -> list[Message]:
        """Pop, waiting up to `seconds` for a first message."""
        return await self._pop(queue, batch, wait=True, timeout_millis=int(seconds * 1000), **choices)

    async def _pop(self, queue: str, batch: int, **choices: Any) -> list[Message]:
        builder = self.client.queue(queue).batch(batch)
        for method, value in choices.items():
            builder = getattr(builder, method)(value)
        messages: list[Message] = await builder.pop()
        return messages

    async def ack(self, messages: Message | list[Message], status: bool | str = True, **context: Any) -> Any:
        """Acknowledge and insist on success. `context`: group, error."""
        answer = await self.client.ack(messages, status, context)
        assert answer["success"] is True, answer
        for result in answer.get("results") or []:
            assert result["success"] is True, result
        return answer


def data(messages: list[Message]) -> list[Any]:
    return [message["data"] for message in messages]


def as_list(delivery: Message | list[Message]) -> list[Message]:
    """What a consume handler is given: 0.15 hands a batch of one over as a bare message."""
    return delivery if isinstance(delivery, list) else [delivery]


def collect_into(received: list[Any]) -> Callable[[Message | list[Message]], Coroutine[Any, Any, None]]:
    """A consume handler that keeps the payloads in the order they were handed over."""

    async def handler(delivery: Message | list[Message]) -> None:
        received.extend(data(as_list(delivery)))

    return handler
